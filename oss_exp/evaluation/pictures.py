"""Conversion of images and videos to bytes, PNG and GIF."""

from __future__ import annotations

import io

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

LARGEST = 256  # longest side, in pixels, of pictures that are only looked at


def frames_of(videos: Tensor) -> Tensor:
    """Flatten videos (B, C, F, H, W) to images (B F, C, H, W), a video's frames in a row.

    Images (B, C, H, W) are returned unchanged.
    """
    return videos.movedim(2, 1).flatten(0, 1) if videos.ndim == 5 else videos


def reduced(images: Tensor) -> Tensor:
    """Shrink images or videos so that no side exceeds 256 pixels; smaller ones stay as they are.

    Args:
        images: Shape (B, C, H, W) or (B, C, F, H, W).

    Returns:
        The same shape up to H and W.
    """
    factor = LARGEST / max(images.shape[-2:])
    if factor >= 1:
        return images
    size = [max(1, round(factor * side)) for side in images.shape[-2:]]
    small = F.interpolate(frames_of(images), size=size, mode="area")
    if images.ndim == 4:
        return small
    return small.unflatten(0, (len(images), images.shape[2])).movedim(1, 2)


def as_bytes(images: Tensor) -> Tensor:
    """Convert pixels from [0, 1] to bytes, channels last.

    Args:
        images: Shape (B, C, H, W) or (B, C, F, H, W), in [0, 1].

    Returns:
        Shape (B, H, W, C) or (B, F, H, W, C), uint8.
    """
    return (images * 255).round().byte().movedim(1, -1).contiguous()


def encoded(picture: np.ndarray, milliseconds: int = 125) -> bytes:
    """Encode an image as PNG, a video as an animated GIF.

    Args:
        picture: uint8, (H, W, C) for an image or (F, H, W, C) for a video.
        milliseconds: How long a frame of the GIF is shown.
    """
    grey = picture.shape[-1] == 1
    picture = picture[..., 0] if grey else picture
    buffer = io.BytesIO()

    # One image.
    if picture.ndim == (2 if grey else 3):
        Image.fromarray(picture).save(buffer, "png")
        return buffer.getvalue()

    # Frames of a video.
    first, *others = map(Image.fromarray, picture)
    first.save(buffer, "gif", save_all=True, append_images=others, duration=milliseconds, loop=0)
    return buffer.getvalue()
