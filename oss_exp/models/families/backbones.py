"""Networks of the diffusers library with one way of calling: network(x (M, *E), clock (M,), classes (M,)) -> (M, *E).

A class of -1 stands for none; every network has one more label embedding for it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """diffusers.UNet2DModel on `patch` x `patch` pixels at a time (1: on pixels); `config` is its own, for `channels`.

    Patches as channels make the network of small images three times as fast, as in Simple Diffusion (arXiv 2301.11093).
    """

    adaptive_norms: ClassVar[tuple[str, ...]] = ("time_emb_proj", "time_embedding")

    def __init__(self, channels: int, size: int, num_classes: int | None, patch: int, **config: Any):
        from diffusers import UNet2DModel

        super().__init__()
        if size % patch:
            raise ValueError(f"backbone.size={size} is not a multiple of backbone.patch={patch}")
        self.patch, self.num_classes = patch, num_classes
        embeddings = None if num_classes is None else num_classes + 1
        self.network = UNet2DModel(
            sample_size=size // patch,
            in_channels=channels * patch**2,
            out_channels=channels * patch**2,
            num_class_embeds=embeddings,
            **config,
        )

    def forward(self, x: Tensor, clock: Tensor, classes: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last)
        labels = None if self.num_classes is None else torch.where(classes < 0, self.num_classes, classes)
        return F.pixel_shuffle(self.network(x, clock, class_labels=labels).sample, self.patch)


class DiT(nn.Module):
    """diffusers.DiTTransformer2DModel (Peebles & Xie 2022, arXiv 2212.09748); `config` is its own, for `channels`."""

    adaptive_norms: ClassVar[tuple[str, ...]] = ("norm1.linear", "timestep_embedder", "proj_out_1")

    def __init__(self, channels: int, size: int, num_classes: int, patch: int, **config: Any):
        from diffusers import DiTTransformer2DModel
        from diffusers.models.embeddings import LabelEmbedding

        super().__init__()
        self.num_classes = num_classes
        self.network = DiTTransformer2DModel(
            sample_size=size,
            patch_size=patch,
            in_channels=channels,
            out_channels=channels,
            num_embeds_ada_norm=num_classes,
            **config,
        )
        for module in self.network.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # each block would drop labels by itself; the trainer drops them

    def forward(self, x: Tensor, clock: Tensor, classes: Tensor) -> Tensor:
        labels = torch.where(classes < 0, self.num_classes, classes)
        return self.network(x, timestep=clock, class_labels=labels).sample
