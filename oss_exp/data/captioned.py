"""Images and videos with captions, made from Fashion-MNIST, to train small networks on prompts.

Item i is a function of i alone.
"""

from __future__ import annotations

import abc
import hashlib
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from oss_exp.data.images import Split, fashion_mnist
from oss_exp.geneval.garments import COLOURS, GARMENTS

FRAMES, SIDE = 8, 32

# Motion over all frames: to the right and down, in halves of the picture, and factor of the size.
MOVES = {
    "moving left": (-0.7, 0.0, 1.0),
    "moving right": (0.7, 0.0, 1.0),
    "rising": (0.0, -0.7, 1.0),
    "falling": (0.0, 0.7, 1.0),
    "growing": (0.0, 0.0, 1.9),
    "shrinking": (0.0, 0.0, 1 / 1.9),
}


class CaptionedImages(Dataset, abc.ABC):
    """Base class of data sets whose items are x0 in [-1, 1] and the number of its caption.

    Args:
        root: Folder of Fashion-MNIST.
        split: "train" or "test".
        items_each: Items made from each garment.
        download: Whether missing files may be downloaded.

    Attributes:
        captions: All captions.
        garments: Fashion-MNIST's images, shape (n, 1, 32, 32).
        labels: Their classes, shape (n,).
        fingerprint: SHA-256 of what determines the items.
    """

    captions: list[str]

    def __init__(self, root: str | Path, split: Split, items_each: int, download: bool = False):
        self.garments, self.labels = fashion_mnist(root, split, SIDE, download)
        self.items_each = items_each

        content = hashlib.sha256(self.garments.numpy().tobytes() + self.labels.numpy().tobytes())
        content.update(repr((type(self).__name__, self.captions, items_each)).encode())
        self.fingerprint = content.hexdigest()

    def __len__(self) -> int:
        return self.items_each * len(self.garments)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._make(i)

    @abc.abstractmethod
    def _make(self, i: int) -> tuple[Tensor, int]:
        """Return item i."""


class ColouredFashion(CaptionedImages):
    """Images (3, 32, 32) of every garment in each of eight colours, on black: "a red sneaker"."""

    def __init__(self, root: str | Path, split: Split = "train", download: bool = False):
        self.captions = []
        for garment, colour in product(GARMENTS, COLOURS):
            article = "an" if colour == "orange" else "a"
            self.captions.append(f"{article} {colour} {garment}")
        self.colours = torch.tensor(list(COLOURS.values()))[:, :, None, None]
        super().__init__(root, split, len(COLOURS), download)

    def _make(self, i: int) -> tuple[Tensor, int]:
        garment, colour = divmod(i, len(COLOURS))
        caption = int(self.labels[garment]) * len(COLOURS) + colour
        return (self.garments[garment] + 1) * self.colours[colour] - 1, caption


class MovingFashion(CaptionedImages):
    """Videos (1, 8, 32, 32) of every garment in each of six motions: "boot rising".

    Each video has a place and a size of its own.
    """

    def __init__(self, root: str | Path, split: Split = "train", download: bool = False):
        self.captions = [f"{garment} {move}" for garment, move in product(GARMENTS, MOVES)]
        super().__init__(root, split, len(MOVES), download)

    def _make(self, i: int) -> tuple[Tensor, int]:
        garment, move = divmod(i, len(MOVES))
        *travel, growth = list(MOVES.values())[move]
        draw = np.random.default_rng((0, i))

        # Centre and size in every frame; the centre varies most across the motion.
        if growth != 1:
            jitter = (0.1, 0.1)
        elif travel[0]:
            jitter = (0.04, 0.3)
        else:
            jitter = (0.3, 0.04)
        middle = torch.tensor(draw.uniform(-1, 1, 2) * jitter, dtype=torch.float32)
        clock = torch.linspace(-0.5, 0.5, FRAMES)[:, None]
        size = draw.uniform(0.6, 0.7) * growth**clock
        centre = middle + clock * torch.tensor(travel)

        # Frames, by affine maps from the canvas to the garment.
        maps = torch.cat([torch.eye(2) / size[..., None], -(centre / size)[..., None]], dim=2)
        grid = F.affine_grid(maps, [FRAMES, 1, SIDE, SIDE], align_corners=False)
        images = (self.garments[garment] + 1).expand(FRAMES, -1, -1, -1)
        frames = F.grid_sample(images, grid, align_corners=False)
        return frames.movedim(0, 1) - 1, int(self.labels[garment]) * len(MOVES) + move
