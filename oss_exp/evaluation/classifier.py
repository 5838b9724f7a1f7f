"""A small convolutional classifier of Fashion-MNIST, whose features serve the image metrics.

It does for grey images of 32 x 32 pixels what Inception-V3 does for photographs:
Frechet and kernel distances, precision and recall are computed from its features. Its
weights are shipped with the package (`oss-exp task=fit_classifier` makes them), so
nothing is downloaded. Images of 28 x 28 get a black frame of two pixels.

Legend: M images.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oss_exp.evaluation.features import Shipped

ASSET = "fashion_features.safetensors"
WIDTH = 24  # channels after the first layer


class FashionFeatures(Shipped):
    """A classifier of grey images that also returns the 64 features behind its ten class scores.

    torchmetrics accepts it as it is:
    `FrechetInceptionDistance(feature=FashionFeatures.from_asset(), normalize=True)`.

    Args:
        name: Name of the network, used in error messages.
        fingerprint: SHA-256 of the weights; empty for an untrained network.
    """

    asset = ASSET
    task = "fit_classifier"
    what = "classifier"
    channels = 1
    size = 32
    num_features = 64
    num_classes = 10

    def __init__(self, name: str = "fashion_features", fingerprint: str = ""):
        super().__init__(name, fingerprint)
        self.body = nn.Sequential(
            _conv(self.channels, WIDTH, kernel=5, stride=2),  # 16 x 16
            _conv(WIDTH, 2 * WIDTH),
            nn.MaxPool2d(2),  # 8 x 8
            _Residual(2 * WIDTH),
            _conv(2 * WIDTH, 4 * WIDTH),
            nn.MaxPool2d(2),  # 4 x 4
            _Residual(4 * WIDTH),
            _conv(4 * WIDTH, self.num_features, kernel=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(self.num_features, self.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return `features(images)`."""
        return self.features(images)

    def features(self, images: Tensor) -> Tensor:
        """Return the features of images.

        Args:
            images: Grey images in [0, 1], shape (M, 1, 32, 32) or (M, 1, 28, 28).

        Returns:
            Non-negative features, shape (M, 64), float32.

        Raises:
            ValueError: If the images have another shape, dtype or range.
        """
        if images.ndim == 4 and images.shape[2:] == (28, 28):
            images = F.pad(images, [2] * 4)  # the black frame
        self._check(images)
        return self.body(images.float())

    def logits(self, images: Tensor) -> Tensor:
        """Return the class scores (M, 10), float32, of images as `features` takes them."""
        return self.head(self.features(images))

    def train(self, mode: bool = True) -> FashionFeatures:
        """Set the training mode; a frozen network stays in evaluation mode.

        Batch statistics would change the features.
        """
        return super().train(mode and self.head.weight.requires_grad)

    def _check(self, images: Tensor) -> None:
        # Shape.
        expected = (self.channels, self.size, self.size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"{self.name} sees grey images of 28 x 28 or 32 x 32 pixels, (M, 1, H, W), "
                f"got {tuple(images.shape)}; average colours, or choose another "
                "evaluation.extractor for other images"
            )

        # Dtype and range.
        in_range = ((images >= 0) & (images <= 1)).all()
        if not images.is_floating_point() or not bool(in_range):
            low, high = images.min().item(), images.max().item()
            raise ValueError(
                f"{self.name} sees floating-point pixels in [0, 1], "
                f"got {images.dtype} from {low:.4g} to {high:.4g}; decode, scale or clip them"
            )


@cache
def register() -> str:
    """Register the classifier with torch-fidelity and return its name there.

    The registration happens once in a process. Use it as

        torch_fidelity.calculate_metrics(input1=..., input2=..., fid=True, kid=True, prc=True,
            isc=True, feature_extractor=register(), feature_extractor_weights_path=None, ...)

    Inputs are bytes of shape (M, 3, 32, 32), as torch-fidelity reads them from image
    files, or (M, 1, 32, 32). The path of the weights is a file for
    `FashionFeatures.from_asset`; None means the shipped one. The layers are "features"
    and, for isc, "logits".
    """
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class FashionFidelityExtractor(FeatureExtractorBase):
        """An adapter of `FashionFeatures` to torch-fidelity.

        torch-fidelity names its caches after `name`, so the name includes the weights'
        hash.
        """

        def __init__(self, name, features_list, feature_extractor_weights_path=None, **settings):
            super().__init__(name, features_list)
            dtype = settings.get("feature_extractor_internal_dtype")
            if dtype not in (None, "float32"):
                raise ValueError(
                    f"{name} runs in float32, got feature_extractor_internal_dtype={dtype!r}"
                )
            self.network = FashionFeatures.from_asset(feature_extractor_weights_path)
            self.name = f"{name}-{self.network.fingerprint[:12]}"

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("features", "logits")

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, input: Tensor) -> tuple[Tensor, ...]:
            is_image = input.ndim == 4 and input.shape[1] in (1, 3)
            if input.dtype != torch.uint8 or not is_image:
                raise ValueError(
                    f"{self.name} takes uint8 images (M, 3, 32, 32) or (M, 1, 32, 32), "
                    f"got {input.dtype} {tuple(input.shape)}"
                )
            features = self.network(input.float().mean(dim=1, keepdim=True) / 255)
            layers = {"features": features, "logits": self.network.head(features)}
            return tuple(layers[layer] for layer in self.features_list)

    name = "oss-exp-fashion"
    torch_fidelity.register_feature_extractor(name, FashionFidelityExtractor)
    return name


class _Residual(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(_conv(channels, channels), *_conv(channels, channels)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.layers(x)).relu()


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution with batch normalisation and a ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())
