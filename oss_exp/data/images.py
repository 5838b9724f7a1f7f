"""Images that models are fitted to and statistics are made of."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from oss_exp.checks import require_choice, require_range
from oss_exp.models.families.mixture import GaussianMixture

Split = Literal["train", "test"]
Images = tuple[Tensor, Tensor]
"""images (n, C, H, W) float32 in [-1, 1], labels (n,) int64."""


def fashion_mnist(root: str | Path, split: Split = "train", size: int = 28) -> Images:
    """60,000 grey training or 10,000 test images from the IDX files under root, gzipped or not.

    root: a folder with the files, or torchvision's (root/FashionMNIST/raw). size: 28, or more with a black frame.
    """
    require_choice(get_args(Split), split=split)
    require_range(at_least=28, at_most=1024, size=size)
    if size % 2:
        raise ValueError(f"size must be an even number, got {size}")
    prefix = {"train": "train", "test": "t10k"}[split]
    folders = [Path(root), Path(root) / "FashionMNIST" / "raw", Path(root) / "raw"]
    folder = next((f for f in folders if list(f.glob(f"{prefix}-images-idx3-ubyte*"))), None)
    if folder is None:
        raise FileNotFoundError(
            f"no {prefix}-images-idx3-ubyte[.gz] in {' or '.join(map(str, folders))}; set images.root to the folder of "
            "the four Fashion-MNIST files (Debian's dataset-fashion-mnist puts them in "
            "/usr/share/datasets/fashion-mnist)"
        )
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", header=16, item=28 * 28)
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", header=8, item=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{folder} has {len(images)} images but {len(labels)} labels; the files do not belong together"
        )
    pixels = torch.from_numpy(images).reshape(-1, 1, 28, 28).float() / 127.5 - 1
    frame = (size - 28) // 2
    return F.pad(pixels, [frame] * 4, value=-1.0), torch.from_numpy(labels).flatten().long()


def digits(root: str | Path | None = None) -> Images:
    """scikit-learn's digits: (1797, 1, 8, 8) in [-1, 1] and labels. They come with the package; root stays null."""
    from sklearn.datasets import load_digits

    if root is not None:
        raise ValueError(f"root={root} is not used: the digits come with scikit-learn; set images.root=null")
    data = load_digits()
    return torch.from_numpy(data.images).float()[:, None] / 8 - 1, torch.from_numpy(data.target).long()


def mixture_samples(file: str | Path = "mixture_digits.safetensors", count: int = 50_000, seed: int = 0) -> Images:
    """Samples of a Gaussian mixture (a path or a shipped file): data whose velocity is known exactly."""
    return GaussianMixture.from_asset(file).draw(count, seed)


def image_folder(root: str | Path, size: int = 32, channels: Literal[1, 3] = 3) -> Dataset:
    """Images in one folder a class, root/<class>/<image>: items (C, size, size) in [-1, 1], label.

    The shorter side is resized to `size`, then the middle is cut out; channels 1 (grey) or 3 (RGB). Files are read
    when they are needed.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    require_choice((1, 3), channels=channels)
    require_range(at_least=1, at_most=4096, size=size)
    if not Path(root).is_dir():
        raise FileNotFoundError(f"root={root} is no folder; give one that has a folder of images for each class")
    steps = [
        v2.ToImage(),
        v2.Grayscale(channels),
        v2.Resize(size),
        v2.CenterCrop(size),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5], [0.5]),
    ]
    try:
        return ImageFolder(root, v2.Compose(steps if channels == 1 else [steps[0], *steps[2:]]))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"root={root} has no images in folders of classes: {error}") from None


def cached_latents(file: str | Path) -> Images:
    """Encoded images: `latents` (n, C, h, w), as the network takes them, and `labels` (n,), of one safetensors file."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"file={file} does not exist; it holds `latents` (n, C, h, w) and `labels` (n,)")
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"file={file} is truncated or no safetensors file: {error}") from None
    latents, labels = tensors.get("latents"), tensors.get("labels")
    if latents is None or labels is None or latents.ndim != 4 or labels.shape != latents.shape[:1]:
        found = ", ".join(f"{key} {tuple(value.shape)}" for key, value in tensors.items())
        raise ValueError(f"file={file} must hold latents (n, C, h, w) and labels (n,), has {found}")
    return latents.float(), labels.long()


def _read_idx(folder: Path, name: str, header: int, item: int) -> np.ndarray:
    # torchvision reads only unpacked IDX files; packages ship them gzipped.
    path = folder / name if (folder / name).exists() else folder / f"{name}.gz"
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if len(data) <= header or (len(data) - header) % item:
        raise ValueError(f"{path} is truncated: {len(data)} bytes are not a header of {header} and items of {item}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(-1, item).copy()
