"""Files of images, of any format, depth and orientation, some of them not images at all.

A file is opened by what is in it, its header is checked before its pixels are read, and a broken one is called by its
name. Legend: C channels.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

Background = Literal["white", "black"]

FORMATS = (
    "PNG",
    "JPEG",
    "BMP",
    "GIF",
    "TIFF",
    "WEBP",
    "AVIF",
    "PPM",
)  # none of them starts another program
ENDINGS = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".webp",
    ".avif",
    ".ppm",
    ".pgm",
    ".pnm",
)
DEEP = (
    "I;16",
    "I;16B",
    "I;16L",
    "I;16N",
    "I",
)  # one channel of 16 bits, which older files keep in 32


class BrokenImage(ValueError):
    """A file that is no image that can be read; what it says is one line, from a worker process too."""

    def __str__(self) -> str:
        return super().__str__().rstrip().rpartition(f"{type(self).__name__}: ")[2]


def read_image(path: str | Path, channels: int, background: Background) -> Tensor:
    """(C, height, width): uint8, or float32 in [0, 1] of images of more than 8 bits. BrokenImage: which file, and why.

    Turned as its camera says, transparent parts on `background`; of an animation the first frame. The numbers of 16-bit
    images are shares of 65535; floats must be in [0, 1] as they are.
    """
    try:
        image = open_image(path)
        image.load()
        return _pixels(_upright(image), channels, background)
    except BrokenImage:
        raise
    except Exception as error:  # decoders raise many kinds
        raise BrokenImage(
            f"image {path} cannot be read: {' '.join(str(error).split()):.200}; replace it"
        ) from None


def open_image(path: str | Path) -> Image.Image:
    """An image whose header has been read, of a format that is no program. BrokenImage where it has too many pixels."""
    if Path(path).exists() and not Path(path).is_file():  # a pipe or a device, which may never end
        raise BrokenImage(f"image {path} is no file; remove it")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(path, formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            most = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
            raise BrokenImage(
                f"image {path} has more than {most} million pixels, the most that is read; reduce it"
            ) from None
        except Image.UnidentifiedImageError:
            raise BrokenImage(
                f"image {path} is damaged, or none of {', '.join(FORMATS)}; replace it"
            ) from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken notes about an image do not say how it was held
        return image


def _pixels(image: Image.Image, channels: int, background: Background) -> Tensor:
    if image.mode in DEEP or image.mode == "F":
        return _deep(image).expand(channels, -1, -1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = image.convert("RGB")
    return v2.functional.pil_to_tensor(image.convert("L") if channels == 1 else image)


def _deep(image: Image.Image) -> Tensor:
    """(1, height, width) float32 in [0, 1]."""
    values = torch.from_numpy(np.array(image, dtype=np.float32))[None]
    most = 1 if image.mode == "F" else 65535
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= most):  # NaN too
        kind = "floats" if image.mode == "F" else "whole numbers of more than 8 bits"
        raise ValueError(
            f"{kind} must be from 0 to {most}, these are from {low:g} to {high:g}; scale them"
        )
    return values / most
