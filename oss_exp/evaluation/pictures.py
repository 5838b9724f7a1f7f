"""Images and videos of models as bytes, PNG and GIF."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from torch import Tensor


def frames_of(videos: Tensor) -> Tensor:
    """(B, C, F, H, W) -> (B F, C, H, W), those of a video in a row; images (B, C, H, W) as they are."""
    return videos.movedim(2, 1).flatten(0, 1) if videos.ndim == 5 else videos


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
        first.save(buffer, "gif", save_all=True, append_images=others, duration=milliseconds, loop=0)
    return buffer.getvalue()
