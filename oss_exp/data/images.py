"""Images that networks are fitted to and statistics are computed from."""

from __future__ import annotations

import gzip
import struct
import zlib
from math import prod
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from oss_exp.checks import require_choice, require_range
from oss_exp.files import load_safetensors
from oss_exp.models.families.mixture import GaussianMixture
from oss_exp.models.guidance import NO_CLASS

Split = Literal["train", "test"]
Images = tuple[Tensor, Tensor]
"""Images (n, C, H, W) in [-1, 1], float32, and labels (n,), int64."""
RAW = Path("FashionMNIST") / "raw"  # where torchvision stores the files
MOST = 1 << 17  # images in a file


def fashion_mnist(
    root: str | Path, split: Split = "train", size: int = 28, download: bool = False
) -> Images:
    """Read the grey images of Fashion-MNIST from IDX files, gzipped or not.

    Args:
        root: A folder with the files, or torchvision's, which has them in
            FashionMNIST/raw.
        split: "train" for 60,000 images, "test" for 10,000.
        size: Side in pixels: 28, or more for a black frame.
        download: Whether torchvision may download missing files into its folder.

    Returns:
        Images (n, 1, size, size) in [-1, 1] and labels (n,).

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or cannot be downloaded.
    """
    require_choice(get_args(Split), split=split)
    require_range(at_least=28, at_most=1024, size=size)
    if size % 2:
        raise ValueError(f"size must be an even number, got {size}")

    # Folder of the files.
    root = Path(root).expanduser()
    prefix = {"train": "train", "test": "t10k"}[split]
    folder = _folder_of(root, prefix)
    if folder is None and download:
        _download_fashion(root, split)
        folder = _folder_of(root, prefix)
    if folder is None:
        raise FileNotFoundError(
            f"no {prefix}-images-idx3-ubyte[.gz] in {root} or {root / RAW}; set images.root to the "
            "folder of the four Fashion-MNIST files (Debian's dataset-fashion-mnist puts them in "
            "/usr/share/datasets/fashion-mnist), or to any folder with images.download=true to "
            "have them downloaded into it"
        )

    # Images and labels.
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", 2051, (28, 28))
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", 2049, ())
    if len(images) != len(labels):
        raise ValueError(
            f"{folder} has {len(images)} images but {len(labels)} labels; "
            "the files do not belong together"
        )
    pixels = torch.from_numpy(images)[:, None].float() / 127.5 - 1
    frame = (size - 28) // 2
    return F.pad(pixels, [frame] * 4, value=-1.0), torch.from_numpy(labels).long()


def digits(root: str | Path | None = None) -> Images:
    """Return scikit-learn's digits: images (1797, 1, 8, 8) in [-1, 1] and labels.

    Args:
        root: Must be None: the digits come with scikit-learn.
    """
    from sklearn.datasets import load_digits
    from sklearn.utils import Bunch

    if root is not None:
        raise ValueError(
            f"root={root} is not used: the digits come with scikit-learn; set images.root=null"
        )
    data = load_digits()
    assert isinstance(data, Bunch)  # return_X_y=True would give a tuple
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    return images, torch.from_numpy(data.target).long()


def mixture_samples(
    file: str | Path = "mixture_digits.safetensors", count: int = 50_000, seed: int = 0
) -> Images:
    """Draw samples of a Gaussian mixture, whose velocity is known exactly.

    Args:
        file: A path, or the name of a shipped file.
        count: Number of samples.
        seed: Seed of the draw.
    """
    return GaussianMixture.from_asset(file).draw(count, seed)


def cached_latents(file: str | Path) -> Images:
    """Read encoded images from a safetensors file.

    Args:
        file: Holds `latents` (n, C, h, w), of videos (n, C, F, h, w), as the network
            takes them, and `labels` (n,).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold these tensors.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"file={file} does not exist; it holds `latents` (n, C, h, w) and `labels` (n,)"
        )
    tensors = load_safetensors(path, "file")

    # Shapes.
    latents, labels = tensors.get("latents"), tensors.get("labels")
    if (
        latents is None
        or labels is None
        or latents.ndim not in (4, 5)
        or labels.shape != latents.shape[:1]
        or not len(labels)
    ):
        shapes = [f"{key} {tuple(tensor.shape)}" for key, tensor in list(tensors.items())[:20]]
        raise ValueError(
            f"file={file} must hold latents (n, C, h, w) and labels (n,), "
            f"has {', '.join(shapes):.400}"
        )

    # Labels.
    if labels.is_floating_point() or not bool((labels >= NO_CLASS).all()):
        raise ValueError(
            f"file={file}: labels must be whole numbers from 0 on, or {NO_CLASS} for no class"
        )
    return latents.float(), labels.long()


def _folder_of(root: Path, prefix: str) -> Path | None:
    """Return the folder that has the images of a split; None if there is none."""
    for folder in (root, root / RAW, root / "raw"):
        if list(folder.glob(f"{prefix}-images-idx3-ubyte*")):
            return folder
    return None


def _download_fashion(root: Path, split: Split) -> None:
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(root), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a mirror fails, or a wrong checksum
        raise ValueError(
            f"Fashion-MNIST could not be downloaded into {root}: {error}; set images.root to a "
            "folder that can be written, or to one with the four files"
        ) from None


def _read_idx(folder: Path, name: str, magic: int, item: tuple[int, ...]) -> np.ndarray:
    """Read an IDX file, unpacked or gzipped.

    Nothing is read beyond the items that its header declares, at most MOST.

    Args:
        folder: Folder of the file.
        name: The file's name without ".gz".
        magic: The number that the header starts with.
        item: Shape of an item.

    Returns:
        Shape (n, *item), uint8.
    """
    path = folder / name if (folder / name).exists() else folder / f"{name}.gz"
    sizes = struct.Struct(f">{2 + len(item)}i")
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rb") as file:
            # Header.
            header = file.read(sizes.size)
            kind, count, *shape = sizes.unpack(header) if len(header) == sizes.size else (None, 0)
            if kind != magic or tuple(shape) != item or not 0 < count <= MOST:
                raise ValueError(
                    f"{path} is truncated or no IDX file of {item or 'labels'}; get it again"
                )

            # Items, and a byte more if there is one.
            data = file.read(count * prod(item) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None

    if len(data) != count * prod(item):
        raise ValueError(
            f"{path} is truncated or damaged: not the {count} items of its header; get it again"
        )
    return np.frombuffer(data, np.uint8).reshape(count, *item).copy()
