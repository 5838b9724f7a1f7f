"""Read image files of many formats, depths and orientations, some of which may be broken.

A file is recognised by its content, its header is checked before its pixels are read,
and an error names the file. Legend: C channels.
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

# Formats whose decoders do not start another program.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "PPM")
ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff"),
    *(".webp", ".avif", ".ppm", ".pgm", ".pnm"),
)
# Modes with one channel of 16 bits; older files keep it in 32.
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")


class BrokenImage(ValueError):
    """An error for a file that cannot be read as an image.

    Its message is one line, even when a worker process has added its traceback.
    """

    def __str__(self) -> str:
        return super().__str__().rstrip().rpartition(f"{type(self).__name__}: ")[2]


def read_image(path: str | Path, channels: int, background: Background) -> Tensor:
    """Return the pixels of an image file, (C, height, width).

    The image is turned upright and transparent parts show the background. Of an
    animation the first frame is read. Integers of 16 bits are divided by 65535; floats
    must be in [0, 1].

    Args:
        path: The file.
        channels: C, 1 (grey) or 3 (RGB).
        background: Colour behind transparent parts.

    Returns:
        uint8, or float32 in [0, 1] for images of more than 8 bits.

    Raises:
        BrokenImage: If the file cannot be read. The message names the file and the
            reason.
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
    """Open an image file and read its header.

    Raises:
        BrokenImage: If it is not an image of one of `FORMATS`, or has too many pixels.
    """
    if Path(path).exists() and not Path(path).is_file():  # a pipe or a device, which may never end
        raise BrokenImage(f"image {path} is not a file; remove it")

    # Header. Pillow only warns of images somewhat too large.
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(path, formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            most = (Image.MAX_IMAGE_PIXELS or 0) // 10**6

            raise BrokenImage(
                f"image {path} has more than {most} million pixels, the limit; reduce it"
            ) from None
        except Image.UnidentifiedImageError:
            raise BrokenImage(
                f"image {path} is damaged or not one of {', '.join(FORMATS)}; replace it"
            ) from None


def _upright(image: Image.Image) -> Image.Image:
    """Return the image turned as its EXIF orientation says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data holds no orientation
        return image


def _pixels(image: Image.Image, channels: int, background: Background) -> Tensor:
    """Return the pixels (C, height, width) of an upright image."""
    if image.mode in DEEP_MODES or image.mode == "F":
        return _deep(image).expand(channels, -1, -1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = image.convert("RGB")
    return v2.functional.pil_to_tensor(image.convert("L") if channels == 1 else image)


def _deep(image: Image.Image) -> Tensor:
    """Return the pixels (1, height, width), float32 in [0, 1], of a deep grey image."""
    values = torch.from_numpy(np.array(image, dtype=np.float32))[None]
    most = 1 if image.mode == "F" else 65535
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= most):  # NaN too
        kind = "floats" if image.mode == "F" else "whole numbers of more than 8 bits"
        raise ValueError(
            f"{kind} must be from 0 to {most}, these are from {low:g} to {high:g}; scale them"
        )
    return values / most
