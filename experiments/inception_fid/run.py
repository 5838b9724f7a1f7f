"""FID between sets of real CIFAR-10 images, where the literature knows the answer: is our Inception the literature's?

python -m experiments.inception_fid.run --inception default_1.pt --cifar10 FOLDER [--cache FOLDER]

Every 1000 images' features are kept in the cache, so an interrupted run goes on where it was; `--only-test` stops after
the sets that need the first 10,000 training images (a third of the work).
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from oss_exp.files import write_atomically

CHUNK, BATCH = 1000, 50


def features(extractor: nn.Module, images: Tensor, name: str, folder: Path) -> Tensor:
    """images (n, 3, 32, 32) in [-1, 1] -> (n, 2048) float32, from the cache where they are there."""
    parts = []
    for first in track(range(0, len(images), CHUNK), name):
        path = folder / f"{name}_{first:05d}.npy"
        if not path.exists():
            chunk = (images[first : first + CHUNK] + 1) / 2
            buffer = io.BytesIO()
            np.save(buffer, torch.cat([extractor(batch) for batch in chunk.split(BATCH)]).numpy())
            write_atomically(path, buffer.getvalue())
        parts.append(torch.from_numpy(np.load(path)))
    return torch.cat(parts)
