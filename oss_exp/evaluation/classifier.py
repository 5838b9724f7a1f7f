"""A small convnet that knows Fashion-MNIST: what Inception-V3 is to photographs, for grey images of 32 x 32.

Its weights are shipped (`oss-exp task=fit_classifier` makes them): Frechet and kernel distances, precision and recall
need no download. 28 x 28 images get a black frame of two pixels. Legend: M images.
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
    """Grey images (M, 1, 32, 32) in [0, 1] -> 64 features (M, 64), the averages that the ten class scores are made of.

    torchmetrics takes it as it is: FrechetInceptionDistance(feature=FashionFeatures.from_asset(), normalize=True).
    """

    asset, task, what = ASSET, "fit_classifier", "classifier"
    channels, size, num_features, num_classes = 1, 32, 64, 10

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
        """The same as `features`."""
        return self.features(images)

    def features(self, images: Tensor) -> Tensor:
        """(M, 1, 32, 32) or 28 x 28, in [0, 1] -> (M, 64) float32, none negative. ValueError for any other images."""
        if images.ndim == 4 and images.shape[2:] == (28, 28):
            images = F.pad(images, [2] * 4)  # the black frame
        self._check(images)
        return self.body(images.float())

    def logits(self, images: Tensor) -> Tensor:
        """Images as for `features` -> (M, 10) float32, the scores of the classes."""
        return self.head(self.features(images))

    def train(self, mode: bool = True) -> FashionFeatures:
        """Batch statistics would change the features: a frozen network stays in eval mode."""
        return super().train(mode and self.head.weight.requires_grad)

    def _check(self, images: Tensor) -> None:
        wanted = (self.channels, self.size, self.size)
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
            raise ValueError(
                f"{self.name} sees grey images of 28 x 28 or 32 x 32 pixels, (M, 1, H, W), got {tuple(images.shape)}; "
                "average colours, or choose another evaluation.extractor for other images"
            )
        if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
            found = f"{images.dtype} from {images.min().item():.4g} to {images.max().item():.4g}"
            raise ValueError(
                f"{self.name} sees floating-point pixels in [0, 1], got {found}; decode, scale or clip them"
            )


@cache
def register() -> str:
    """Make the network known to torch-fidelity, once in a process; returns the name it has there.

    torch_fidelity.calculate_metrics(input1=..., input2=..., fid=True, kid=True, prc=True, isc=True,
        feature_extractor=register(), feature_extractor_weights_path=None, ...)

    Inputs are bytes (M, 3, 32, 32), as torch-fidelity reads them from image files, or (M, 1, 32, 32). The weights' path
    is a file for `from_asset`, None the shipped one. Layers: "features", and "logits" for isc.
    """
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class FashionFidelityExtractor(FeatureExtractorBase):
        """`FashionFeatures` as torch-fidelity calls it; its caches are named after the weights too."""

        def __init__(self, name, features_list, feature_extractor_weights_path=None, **settings):
            super().__init__(name, features_list)
            if (dtype := settings.get("feature_extractor_internal_dtype")) not in (None, "float32"):
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
            if input.dtype != torch.uint8 or input.ndim != 4 or input.shape[1] not in (1, 3):
                found = f"{input.dtype} {tuple(input.shape)}"
                raise ValueError(
                    f"{self.name} takes uint8 images (M, 3, 32, 32) or (M, 1, 32, 32), got {found}"
                )
            features = self.network(input.float().mean(dim=1, keepdim=True) / 255)
            layers = {"features": features, "logits": self.network.head(features)}
            return tuple(layers[layer] for layer in self.features_list)

    name = "oss-exp-fashion"
    torch_fidelity.register_feature_extractor(name, FashionFidelityExtractor)
    return name


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(_conv(channels, channels), *_conv(channels, channels)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.layers(x)).relu()


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())
