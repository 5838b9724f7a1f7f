"""CLIP on transformers (Radford et al. 2021, arXiv 2103.00020): pictures and texts as directions in one space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CLIP(nn.Module):
    """checkpoint: a folder or a hub id, as openai/clip-vit-large-patch14; setting: its name in the configuration."""

    def __init__(self, checkpoint: str, setting: str):
        from transformers import AutoProcessor, CLIPModel

        super().__init__()
        self.processor = opened(AutoProcessor, checkpoint, setting)
        self.network = opened(CLIPModel, checkpoint, setting).eval().requires_grad_(False)

    @torch.no_grad()
    def images(self, pictures: Sequence[Tensor]) -> Tensor:
        """Pictures (3, H, W) in [0, 1], of any sizes -> unit vectors (n, D)."""
        pixels = self.processor(
            images=[as_uint8(each.cpu()) for each in pictures], return_tensors="pt"
        )["pixel_values"]
        return _unit(self.network.get_image_features(pixel_values=pixels.to(self.network.device)))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """-> unit vectors (n, D); what is longer than its 77 tokens is cut off."""
        length = self.network.config.text_config.max_position_embeddings
        tokens = self.processor(
            text=list(texts), return_tensors="pt", padding=True, truncation=True, max_length=length
        )
        return _unit(self.network.get_text_features(**tokens.to(self.network.device)))


def opened(kind: Any, checkpoint: str, setting: str) -> Any:
    """transformers' `kind` from a folder or a hub id; ValueError where there is none."""
    try:
        return kind.from_pretrained(
            checkpoint, trust_remote_code=False
        )  # whose own code is not run
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{setting}={checkpoint} cannot be opened ({' '.join(str(error).split())[:200]}); give the folder of a "
            "downloaded checkpoint, or a hub id where the hub can be reached"
        ) from None


def as_uint8(image: Tensor) -> Tensor:
    """[0, 1] -> bytes, which processors scale themselves."""
    return (image * 255).round().byte()


def _unit(answer: Tensor | Any) -> Tensor:
    """Since transformers 5 the features are in an object."""
    return F.normalize(answer if isinstance(answer, Tensor) else answer.pooler_output, dim=-1)
