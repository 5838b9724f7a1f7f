"""Metrics of generated images: FID, KID, precision and recall, class agreement, LPIPS, CLIP score.

Every metric is a `torchmetrics.Metric` with one interface: `update(images, teacher,
labels)` with each sample once, over any number of batches and ranks, then `compute()`
-> {name: number}. FID, KID and precision and recall compare with statistics of real
images (`statistics.Reference`). A metric whose constructor has an argument `extractor`,
`reference` or `classifier` gets the evaluation's object of that name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from oss_exp.checks import require_choice, require_range
from oss_exp.evaluation.clip import CLIP
from oss_exp.evaluation.features import as_rgb, load_weights
from oss_exp.evaluation.statistics import REMEDY, Reference, check_pixels, frechet, gram, moments

Backbone = Literal["alex", "vgg"]
BACKBONES = {  # torchvision's files, on download.pytorch.org
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
}
ALEXNET = (
    f"to torchvision's weights, such as https://download.pytorch.org/models/{BACKBONES['alex']}"
)


class ImageMetric(Metric):
    """Base class of the metrics.

    Attributes:
        needs: What every image must have been made from: of "classes" and "prompts".
        at_the_end: Settings that only `compute` uses, so that they may change after all
            images have been seen.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    at_the_end: ClassVar[tuple[str, ...]] = ()

    full_state_update = False

    def update(
        self, images: Tensor, teacher: Tensor, labels: Tensor, prompts: Sequence[str] | None = None
    ) -> None:
        """Add a batch of images.

        Args:
            images: Generated images, shape (B, C, H, W), in [0, 1]; B may be 0.
            teacher: The teacher's images from the same noises and conditions, same
                shape.
            labels: Classes, shape (B,), with -1 for none.
            prompts: B prompts, where the model takes prompts.

        Raises:
            ValueError: If shapes disagree or pixels are not in [0, 1].
        """
        if images.ndim != 4 or images.shape != teacher.shape or labels.shape != images.shape[:1]:
            raise ValueError(
                "a metric needs images and the teacher's, both (B, C, H, W), and labels (B,), "
                f"got {tuple(images.shape)}, {tuple(teacher.shape)} and {tuple(labels.shape)}"
            )
        if len(images) == 0:  # all of a rank's samples may be repetitions
            return
        check_pixels(images, "images")
        check_pixels(teacher, "the teacher's images")
        self.add(images.float(), teacher.float(), labels, prompts)

    @abstractmethod
    def add(
        self, images: Tensor, teacher: Tensor, labels: Tensor, prompts: Sequence[str] | None
    ) -> None:
        """Add a checked, non-empty float32 batch."""

    def require(self, count: int) -> None:
        """Raise ValueError if this number of images cannot be measured."""
        del count

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return the metric's numbers by name."""


# --------------------------------------------------------------------------------------------------
# Distances between distributions of features
# --------------------------------------------------------------------------------------------------


class FeatureMetric(ImageMetric):
    """Base class of metrics that compare features of generated and real images.

    Args:
        extractor: Network from images (B, C, H, W) in [0, 1] to features (B, F).
        reference: Statistics of real images, made with the same extractor.
        num_images: Number of images that is required in the end; None for any.
    """

    at_the_end = ("num_images",)

    def __init__(self, extractor: nn.Module, reference: Reference, num_images: int | None = None):
        super().__init__()
        require_range(at_least=1, num_images=num_images)
        reference.check_extractor(extractor)
        self.extractor = extractor.eval().requires_grad_(False)
        self.reference = reference
        self.num_images = num_images

    def add(
        self, images: Tensor, teacher: Tensor, labels: Tensor, prompts: Sequence[str] | None
    ) -> None:
        features = self.extractor(images)
        self.reference.check_features(features, channels=images.shape[1])
        self.add_features(features)

    @abstractmethod
    def add_features(self, features: Tensor) -> None:
        """Add the features (B, F) of a batch."""

    def require(self, count: int) -> None:
        if self.num_images not in (None, count):
            raise ValueError(
                f"{type(self).__name__} of {count} images where {self.num_images} are expected: "
                "it depends on the number of images (FID falls as it grows), so only equal "
                f"numbers compare; evaluate {self.num_images}, or set num_images to null "
                "and say the number"
            )


class FID(FeatureMetric):
    """Frechet distance between Gaussians fitted to features (Heusel et al. 2017).

    It is biased: fewer images give a higher FID.
    """

    total: Tensor

    def __init__(self, extractor: nn.Module, reference: Reference, num_images: int | None = None):
        super().__init__(extractor, reference, num_images)
        size = len(reference.mu) + 1
        self.add_state("total", torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx="sum")

    def add_features(self, features: Tensor) -> None:
        self.total += gram(features)

    def compute(self) -> dict[str, float]:
        self.require(round(self.total[-1, -1].item()))
        mu, sigma, _ = moments(self.total)
        return {"fid": frechet(mu, sigma, self.reference.mu, self.reference.sigma)}


class GatheredMetric(FeatureMetric):
    """Base class of metrics that need single features of generated and of real images.

    Attributes:
        least: Least number of images on both sides, and the setting that requires it.
    """

    rows: list[Tensor]
    least: tuple[int, str]

    def __init__(self, extractor: nn.Module, reference: Reference, num_images: int | None = None):
        super().__init__(extractor, reference, num_images)
        if reference.features is None:
            raise ValueError(
                f"{type(self).__name__} needs single features, but {reference.path} has only "
                f"their mean and covariance, as published statistics do; {REMEDY}"
            )
        self.add_state("rows", [], dist_reduce_fx="cat")

    def add_features(self, features: Tensor) -> None:
        # Flat, since torchmetrics gathers a rank without images as an empty vector.
        self.rows.append(features.float().flatten())

    def require(self, count: int) -> None:
        super().require(count)
        least, setting = self.least
        assert self.reference.features is not None
        real = len(self.reference.features)
        if min(count, real) < least:
            raise ValueError(
                f"{type(self).__name__} needs at least {least} images on both sides, "
                f"got {count} generated ones and {real} in {self.reference.path}; "
                f"evaluate more, or choose a smaller {setting}"
            )

    def features(self) -> tuple[Tensor, Tensor]:
        """Return generated features (n, F) and real ones (m, F).

        Generated features are sorted, so that ranks and batches do not change their
        order.

        Raises:
            ValueError: If there are too few of either.
        """
        real = torch.from_numpy(self.reference.features)
        rows = dim_zero_cat(self.rows) if len(self.rows) else real.new_zeros(0)
        generated = rows.reshape(-1, real.shape[1])
        self.require(len(generated))
        return generated[generated.double().sum(dim=1).argsort()], real.to(generated)


class KID(GatheredMetric):
    """Kernel distance: unbiased squared MMD of a cubic kernel (Binkowski et al. 2018).

    Args:
        extractor: As for `FeatureMetric`.
        reference: As for `FeatureMetric`.
        num_images: As for `FeatureMetric`.
        subsets: Number of random subsets, over which mean and standard deviation are
            taken.
        subset_size: Images in a subset.
    """

    at_the_end = ("num_images", "subsets", "subset_size")

    def __init__(
        self,
        extractor: nn.Module,
        reference: Reference,
        num_images: int | None = None,
        subsets: int = 100,
        subset_size: int = 1000,
    ):
        super().__init__(extractor, reference, num_images)
        require_range(at_least=1, subsets=subsets)
        require_range(at_least=2, subset_size=subset_size)
        self.subsets = subsets
        self.subset_size = subset_size
        self.least = subset_size, "subset_size"

    def compute(self) -> dict[str, float]:
        from torch_fidelity.metric_kid import (
            KEY_METRIC_KID_MEAN,
            KEY_METRIC_KID_STD,
            kid_features_to_metric,
        )

        values = kid_features_to_metric(
            *self.features(),
            kid_subsets=self.subsets,
            kid_subset_size=self.subset_size,
            rng_seed=0,
            verbose=False,
        )
        return {"kid": values[KEY_METRIC_KID_MEAN], "kid_std": values[KEY_METRIC_KID_STD]}


class PrecisionRecall(GatheredMetric):
    """Precision and recall of generated images (Kynkaanniemi et al. 2019).

    Precision is the share of generated images within the distance from a real image to
    its k-th nearest neighbour; recall exchanges the two sides. Both depend on the
    numbers of images.

    Args:
        extractor: As for `FeatureMetric`.
        reference: As for `FeatureMetric`.
        num_images: As for `FeatureMetric`.
        k: Number of the neighbour.
    """

    at_the_end = ("num_images", "k")

    def __init__(
        self, extractor: nn.Module, reference: Reference, num_images: int | None = None, k: int = 3
    ):
        super().__init__(extractor, reference, num_images)
        require_range(at_least=1, k=k)
        self.k = k
        self.least = k + 1, "k"

    def compute(self) -> dict[str, float]:
        from torch_fidelity.metric_prc import (
            KEY_METRIC_PRECISION,
            KEY_METRIC_RECALL,
            prc_features_to_metric,
        )

        values = prc_features_to_metric(
            *self.features(),
            prc_neighborhood=self.k,
            prc_batch_size=1000,
            save_cpu_ram=True,  # never all distances at once
            verbose=False,
        )
        return {"precision": values[KEY_METRIC_PRECISION], "recall": values[KEY_METRIC_RECALL]}


# --------------------------------------------------------------------------------------------------
# Means over images
# --------------------------------------------------------------------------------------------------


class MeanMetric(ImageMetric):
    """Base class of metrics that are the mean of one number for each image.

    Attributes:
        name: Name of the metric in `compute`'s result.
    """

    name: str
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @abstractmethod
    def values(
        self, images: Tensor, teacher: Tensor, labels: Tensor, prompts: Sequence[str] | None
    ) -> Tensor:
        """Return one number for each image, shape (B,)."""

    def add(
        self, images: Tensor, teacher: Tensor, labels: Tensor, prompts: Sequence[str] | None
    ) -> None:
        self.total += self.values(images, teacher, labels, prompts).double().sum()
        self.count += len(images)

    def compute(self) -> dict[str, float]:
        if self.count == 0:
            raise ValueError(f"{type(self).__name__} has seen no images")
        return {self.name: (self.total / self.count).item()}


@runtime_checkable
class Classifier(Protocol):
    """A network that scores classes, such as `classifier.FashionFeatures`."""

    def logits(self, images: Tensor) -> Tensor:
        """Return class scores (B, classes) of images (B, C, H, W) in [0, 1]."""
        ...


class ClassAgreement(MeanMetric):
    """Share of images, in %, that a classifier assigns to the class they were generated for.

    Args:
        classifier: A `Classifier`.
    """

    name = "class_agreement"
    needs = ("classes",)

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)

    def values(
        self, images: Tensor, teacher: Tensor, labels: Tensor, prompts: Sequence[str] | None
    ) -> Tensor:
        assert isinstance(self.classifier, Classifier)
        logits = self.classifier.logits(images)
        if labels.min() < 0 or labels.max() >= logits.shape[1]:
            raise ValueError(
                f"class agreement needs a class from 0 to {logits.shape[1] - 1} for every image "
                f"(-1 is none), got {sorted(set(labels.tolist()))}; set data.classes, "
                "or leave this metric out"
            )
        return 100 * (logits.argmax(dim=1) == labels)


class LPIPS(MeanMetric):
    """Perceptual distance to the teacher's image (Zhang et al. 2018), through torchmetrics.

    Grey images become RGB. Images with a side under 64 pixels are enlarged to 64,
    bilinearly, which is the least that the network takes.

    Args:
        weights: torchvision's file of the backbone, local; the linear heads come with
            torchmetrics.
        net: Backbone, "alex" or "vgg".
        sha256: Hash of the file; needed for a TorchScript archive, which is a program.
    """

    name = "lpips"

    def __init__(
        self,
        weights: Annotated[str | Path, ALEXNET],
        net: Backbone = "alex",
        sha256: str | None = None,
    ):
        # The public class would download the backbone.
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        super().__init__()
        require_choice(BACKBONES, net=net)
        url = f"https://download.pytorch.org/models/{BACKBONES[net]}"
        state = load_weights(weights, "LPIPS weights", url, sha256)

        # Backbone; its slice3.6.weight is torchvision's features.6.weight.
        self.network = _NoTrainLpips(net=net, pnet_rand=True)
        names: dict[str, Any] = self.network.net.state_dict()
        try:
            self.network.net.load_state_dict(
                {name: state[f"features.{name.split('.', 1)[1]}"] for name in names}
            )
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"{weights} is not torchvision's {BACKBONES[net]}: {reason}") from None

    def values(
        self, images: Tensor, teacher: Tensor, labels: Tensor, prompts: Sequence[str] | None
    ) -> Tensor:
        return self.network(_enlarged(images), _enlarged(teacher), normalize=True).flatten()


def _enlarged(images: Tensor) -> Tensor:
    """Return RGB images whose sides are at least 64 pixels."""
    images = as_rgb(images)
    factor = 64 / min(images.shape[2:])
    if factor <= 1:
        return images
    size = [round(factor * side) for side in images.shape[2:]]
    return nn.functional.interpolate(images, size, mode="bilinear", align_corners=False)


class CLIPScore(MeanMetric):
    """Agreement of images with their prompts: 100 max(cos, 0) of CLIP's features.

    Hessel et al. 2021, arXiv 2104.08718. torchmetrics' class does not work with
    transformers 5.

    Args:
        checkpoint: A folder or a hub id; openai/clip-vit-base-patch16 and
            openai/clip-vit-large-patch14 are common. Scores of different checkpoints do
            not compare.
    """

    name = "clip_score"
    needs = ("prompts",)

    def __init__(
        self,
        checkpoint: Annotated[str, "such as openai/clip-vit-large-patch14, or the folder of it"],
    ):
        super().__init__()
        self.clip = CLIP(checkpoint, "metric.clip_score.checkpoint")

    def values(
        self, images: Tensor, teacher: Tensor, labels: Tensor, prompts: Sequence[str] | None
    ) -> Tensor:
        if prompts is None:
            raise ValueError(
                "clip_score needs prompts, and the model takes none; leave it out of metric"
            )
        cosines = (self.clip.images(list(as_rgb(images))) * self.clip.texts(prompts)).sum(1)
        return 100 * cosines.clamp(min=0)
