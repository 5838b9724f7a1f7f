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
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from oss_exp.data.images import Split, cached_latents, fashion_mnist
from oss_exp.geneval.garments import COLOURS, GARMENTS
from oss_exp.models.checkpoints.weights import digest

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


class CaptionedLatents(Dataset):
    """Encoded pictures with captions, from one safetensors file that an autoencoder filled.

    Items are (latent (C, h, w) as the network takes it, number of its caption). The file holds
    `latents` (n, C, h, w) and `labels` (n,), and in its metadata `captions`, a JSON list.
    """

    def __init__(self, file: str | Path):
        self.latents, self.labels = cached_latents(file)
        with safe_open(Path(file).expanduser(), framework="pt") as tensors:
            captions = (tensors.metadata() or {}).get("captions", "null")
        try:
            self.captions = TypeAdapter(list[str]).validate_json(captions)
        except ValidationError:
            raise ValueError(
                f"file={file} must have `captions` in its metadata, a JSON list of texts; "
                f"has {captions:.100}"
            ) from None
        if int(self.labels.max()) >= len(self.captions) or int(self.labels.min()) < 0:
            raise ValueError(
                f"file={file} has {len(self.captions)} captions and labels from "
                f"{int(self.labels.min())} to {int(self.labels.max())}; number the captions from 0"
            )
        self.fingerprint = digest({"latents": self.latents, "labels": self.labels})

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.latents[i].float(), int(self.labels[i])
