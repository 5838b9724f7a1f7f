"""Images and videos of models as bytes, PNG and GIF."""

from __future__ import annotations

import io

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

LARGEST = 256  # pixels a side of pictures that are only for looking


def frames_of(videos: Tensor) -> Tensor:
    """(B, C, F, H, W) -> (B F, C, H, W), those of a video in a row; images (B, C, H, W) as they are."""
    return videos.movedim(2, 1).flatten(0, 1) if videos.ndim == 5 else videos


def reduced(images: Tensor) -> Tensor:
    """(B, C, H, W) or (B, C, F, H, W), any B -> of at most 256 pixels a side, the shape kept."""
    factor = LARGEST / max(images.shape[-2:])
    if factor >= 1:
        return images
    size = [max(1, round(factor * side)) for side in images.shape[-2:]]
    small = F.interpolate(frames_of(images), size=size, mode="area")
    return (
        small.unflatten(0, (len(images), images.shape[2])).movedim(1, 2)
        if images.ndim == 5
        else small
    )


def as_bytes(images: Tensor) -> Tensor:
    """(B, C, H, W) or (B, C, F, H, W) in [0, 1] -> uint8 (B, H, W, C) or (B, F, H, W, C)."""
    return (images * 255).round().byte().movedim(1, -1).contiguous()


def encoded(picture: np.ndarray, milliseconds: int = 125) -> bytes:
    """uint8 (H, W, C) -> PNG; (F, H, W, C) -> animated GIF whose frames last that long."""
    grey, buffer = picture.shape[-1] == 1, io.BytesIO()
    picture = picture[..., 0] if grey else picture
    if picture.ndim == (2 if grey else 3):
        Image.fromarray(picture).save(buffer, "png")
    else:
        first, *others = map(Image.fromarray, picture)
        first.save(
            buffer, "gif", save_all=True, append_images=others, duration=milliseconds, loop=0
        )
    return buffer.getvalue()
