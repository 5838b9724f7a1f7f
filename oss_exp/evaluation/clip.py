"""CLIP, which maps images and texts to unit vectors in one space.

Radford et al. 2021, arXiv 2103.00020, through transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CLIP(nn.Module):
    """A frozen CLIP network with its processor.

    Args:
        checkpoint: A folder or a hub id, such as openai/clip-vit-large-patch14.
        setting: The name of this setting in the configuration, quoted in errors.
    """

    def __init__(self, checkpoint: str, setting: str):
        from transformers import AutoProcessor, CLIPModel

        super().__init__()
        self.processor = open_pretrained(AutoProcessor, checkpoint, setting)
        self.network = open_pretrained(CLIPModel, checkpoint, setting)
        self.network.eval().requires_grad_(False)

    @torch.no_grad()
    def images(self, pictures: Sequence[Tensor]) -> Tensor:
        """Return unit vectors (n, D) of images (3, H, W) in [0, 1], which may differ in size."""
        arrays = [as_uint8(picture.cpu()) for picture in pictures]
        pixels = self.processor(images=arrays, return_tensors="pt")["pixel_values"]
        features = self.network.get_image_features(pixel_values=pixels.to(self.network.device))
        return _unit(features)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (n, D) of texts, cut off after the network's 77 tokens."""
        length = self.network.config.text_config.max_position_embeddings
        tokens = self.processor(
            text=list(texts), return_tensors="pt", padding=True, truncation=True, max_length=length
        )
        return _unit(self.network.get_text_features(**tokens.to(self.network.device)))


def open_pretrained(kind: Any, checkpoint: str, setting: str) -> Any:
    """Load a transformers class from a folder or a hub id; none of its own code runs.

    Raises:
        ValueError: If the checkpoint cannot be opened; the message names `setting`.
    """
    try:
        return kind.from_pretrained(checkpoint, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{setting}={checkpoint} cannot be opened ({reason}); give the folder of a "
            "downloaded checkpoint, or a hub id where the hub can be reached"
        ) from None


def as_uint8(image: Tensor) -> Tensor:
    """Convert pixels from [0, 1] to bytes, which processors scale themselves."""
    return (image * 255).round().byte()


def _unit(output: Tensor | Any) -> Tensor:
    """Normalise features, which transformers 5 wraps in an object."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(features, dim=-1)
