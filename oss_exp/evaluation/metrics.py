"""FID, KID, precision and recall, class agreement and LPIPS, batch after batch and over any number of ranks.

Every metric is a `torchmetrics.Metric` with one interface: `update(images, teacher, labels)` with each sample once,
then `compute()` -> {name: number}. The first three compare with statistics of real images (`statistics.Reference`).
Those that take `extractor`, `reference` or `classifier` are given the evaluation's, by the name of the argument.
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
BACKBONES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
}  # torchvision's, on download.pytorch.org
ALEXNET = (
    f"to torchvision's weights, such as https://download.pytorch.org/models/{BACKBONES['alex']}"
)


class ImageMetric(Metric):
    """What the metrics share: images and the teacher's (B, C, H, W) in [0, 1], labels (B,) with -1 for no class.

    prompts (B): those of a model that takes prompts.
    needs: of `classes` and `prompts`, those that every image must have been made for.
    at_the_end: settings that only `compute` heeds, so that they may change when all images have been seen.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    at_the_end: ClassVar[tuple[str, ...]] = ()

    full_state_update = False

    def update(
        self, images: Tensor, teacher: Tensor, labels: Tensor, prompts: Sequence[str] | None = None
    ) -> None:
        if images.ndim != 4 or images.shape != teacher.shape or labels.shape != images.shape[:1]:
            raise ValueError(
                "a metric needs images and the teacher's, both (B, C, H, W), and labels (B,), got "
                f"{tuple(images.shape)}, {tuple(teacher.shape)} and {tuple(labels.shape)}"
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
        """Take in a checked batch of at least one image, float32."""

    def require(self, count: int) -> None:
        """Raise ValueError where so many images cannot be measured."""
        del count

    @abstractmethod
    def compute(self) -> dict[str, float]: ...


# --------------------------------------------------------------------------------------------------------------
# Distances between distributions of features
# --------------------------------------------------------------------------------------------------------------


class FeatureMetric(ImageMetric):
    """Compares the features that an extractor, images (B, C, H, W) in [0, 1] -> (B, F), sees with those of real images.

    num_images: how many images there must be in the end; null: however many.
    """

    at_the_end = ("num_images",)

    def __init__(self, extractor: nn.Module, reference: Reference, num_images: int | None = None):
        super().__init__()
        require_range(at_least=1, num_images=num_images)
        reference.check_extractor(extractor)
        self.extractor = extractor.eval().requires_grad_(False)
        self.reference, self.num_images = reference, num_images

    def add(
        self, images: Tensor, teacher: Tensor, labels: Tensor, prompts: Sequence[str] | None
    ) -> None:
        features = self.extractor(images)
        self.reference.check_features(features, channels=images.shape[1])
        self.keep(features)

    @abstractmethod
    def keep(self, features: Tensor) -> None: ...

    def require(self, count: int) -> None:
        if self.num_images not in (None, count):
            raise ValueError(
                f"{type(self).__name__} of {count} images where {self.num_images} are expected: it depends on the "
                f"number of images (FID falls as it grows), so only equal numbers compare; evaluate {self.num_images}, "
                "or set num_images to null and say the number"
            )


class FID(FeatureMetric):
    """Frechet distance between Gaussians fitted to features (Heusel et al. 2017). Biased: fewer images, higher FID."""

    total: Tensor

    def __init__(self, extractor: nn.Module, reference: Reference, num_images: int | None = None):
        super().__init__(extractor, reference, num_images)
        size = len(reference.mu) + 1
        self.add_state("total", torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx="sum")

    def keep(self, features: Tensor) -> None:
        self.total += gram(features)

    def compute(self) -> dict[str, float]:
        self.require(round(self.total[-1, -1].item()))
        mu, sigma, _ = moments(self.total)
        return {"fid": frechet(mu, sigma, self.reference.mu, self.reference.sigma)}


class GatheredMetric(FeatureMetric):
    """Needs every single feature, of the real images too, and at least so many of both as `least` says."""

    rows: list[Tensor]
    least: tuple[int, str]  # and the setting that asks for them

    def __init__(self, extractor: nn.Module, reference: Reference, num_images: int | None = None):
        super().__init__(extractor, reference, num_images)
        if reference.features is None:
            raise ValueError(
                f"{type(self).__name__} needs single features, but {reference.path} has only their mean and "
                f"covariance, as published statistics do; {REMEDY}"
            )
        self.add_state("rows", [], dist_reduce_fx="cat")

    def keep(self, features: Tensor) -> None:
        self.rows.append(
            features.float().flatten()
        )  # torchmetrics gathers a rank without any as an empty vector

    def require(self, count: int) -> None:
        super().require(count)
        least, setting = self.least
        assert self.reference.features is not None
        real = len(self.reference.features)
        if min(count, real) < least:
            raise ValueError(
                f"{type(self).__name__} needs at least {least} images on both sides, got {count} generated ones and "
                f"{real} in {self.reference.path}; evaluate more, or choose a smaller {setting}"
            )

    def features(self) -> tuple[Tensor, Tensor]:
        """Generated (n, F) and real (m, F), as many as needed; in an order that ranks and batches do not change."""
        real = torch.from_numpy(self.reference.features)
        rows = dim_zero_cat(self.rows) if len(self.rows) else real.new_zeros(0)
        generated = rows.reshape(-1, real.shape[1])
        self.require(len(generated))
        return generated[generated.double().sum(dim=1).argsort()], real.to(generated)


class KID(GatheredMetric):
    """Unbiased squared MMD of a cubic kernel, mean and spread over random subsets (Binkowski et al. 2018)."""

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
        self.subsets, self.subset_size = subsets, subset_size
        self.least = subset_size, "subset_size"

    def compute(self) -> dict[str, float]:
        from torch_fidelity.metric_kid import (
            KEY_METRIC_KID_MEAN,
            KEY_METRIC_KID_STD,
            kid_features_to_metric,
        )

        found = kid_features_to_metric(
            *self.features(),
            kid_subsets=self.subsets,
            kid_subset_size=self.subset_size,
            rng_seed=0,
            verbose=False,
        )
        return {"kid": found[KEY_METRIC_KID_MEAN], "kid_std": found[KEY_METRIC_KID_STD]}


class PrecisionRecall(GatheredMetric):
    """Share of generated images among the real ones, and the reverse: within the distance of a k-th nearest neighbour.

    Kynkaanniemi et al. 2019. Both depend on the numbers of images.
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

        found = prc_features_to_metric(
            *self.features(),
            prc_neighborhood=self.k,
            prc_batch_size=1000,
            save_cpu_ram=True,  # never all distances at once
            verbose=False,
        )
        return {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL]}


# --------------------------------------------------------------------------------------------------------------
# Means over images
# --------------------------------------------------------------------------------------------------------------


class MeanMetric(ImageMetric):
    """The mean of a number that every image has for itself."""

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
        """One number an image, (B,)."""

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
    """A network that knows classes, as `classifier.FashionFeatures` does."""

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> (B, classes)."""
        ...


class ClassAgreement(MeanMetric):
    """How often a classifier, a `Classifier`, sees the class that was asked for, in %."""

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
                f"class agreement needs a class from 0 to {logits.shape[1] - 1} for every image (-1 is none), got "
                f"{sorted(set(labels.tolist()))}; set data.classes, or leave this metric out"
            )
        return 100 * (logits.argmax(dim=1) == labels)


class LPIPS(MeanMetric):
    """Perceptual distance to the teacher's image of the same noise (Zhang et al. 2018), through torchmetrics.

    Grey images become RGB; an image with a side under 64 pixels is enlarged to 64, bilinearly, for the network's sake.

    net: "alex" or "vgg". weights: torchvision's file of that backbone, local; the linear heads come with torchmetrics.
    sha256: of that file; needed where it is a TorchScript archive, for that is a program.
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
        state = load_weights(
            weights,
            "LPIPS weights",
            f"https://download.pytorch.org/models/{BACKBONES[net]}",
            sha256,
        )
        self.network = _NoTrainLpips(net=net, pnet_rand=True)
        backbone: dict[str, Any] = self.network.net.state_dict()
        try:  # slice3.6.weight is torchvision's features.6.weight
            self.network.net.load_state_dict(
                {name: state[f"features.{name.split('.', 1)[1]}"] for name in backbone}
            )
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"{weights} is not torchvision's {BACKBONES[net]}: {reason}") from None

    def values(
        self, images: Tensor, teacher: Tensor, labels: Tensor, prompts: Sequence[str] | None
    ) -> Tensor:
        factor = 64 / min(images.shape[2:])
        pair = [as_rgb(images), as_rgb(teacher)]
        if factor > 1:
            size = [round(factor * side) for side in images.shape[2:]]
            pair = [
                nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
                for x in pair
            ]
        return self.network(*pair, normalize=True).flatten()


class CLIPScore(MeanMetric):
    """How well images fit their prompts: 100 max(cos, 0) of CLIP's features (Hessel et al. 2021, arXiv 2104.08718).

    torchmetrics' own does not know the answers of transformers 5.

    checkpoint: a folder or a hub id; openai/clip-vit-base-patch16 or openai/clip-vit-large-patch14 are common, and
                numbers of one do not compare with those of another.
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
