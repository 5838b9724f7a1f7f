"""Wrap networks of the diffusers library in one signature.

A network is called as network(x (M, *E), clock (M,), classes (M,)) and returns (M, *E).
A class of -1 stands for none; every network with classes has one more label embedding
for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oss_exp.checks import require_range


class UNet(nn.Module):
    """A UNet2DModel of diffusers on patches of pixels.

    With patches as channels, the network of small images is three times as fast (Simple
    Diffusion, arXiv 2301.11093).

    Args:
        channels: Channels of the images.
        size: Their height and width in pixels.
        num_classes: Number of classes; None for a network without.
        patch: Height and width of a patch in pixels; 1 for none.
        layers_per_block, block_out_channels, down_block_types, up_block_types,
            attention_head_dim, norm_num_groups, resnet_time_scale_shift: Arguments of
            UNet2DModel.
    """

    adaptive_norms: ClassVar[tuple[str, ...]] = ("time_emb_proj", "time_embedding")

    def __init__(
        self,
        channels: int = 1,
        size: int = 32,
        num_classes: int | None = 10,
        patch: int = 2,
        layers_per_block: int = 1,
        block_out_channels: Sequence[int] = (64, 96, 96),
        down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types: Sequence[str] = ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim: int = 32,
        norm_num_groups: int = 16,
        resnet_time_scale_shift: Literal["default", "scale_shift"] = "default",
    ):
        from diffusers import UNet2DModel

        super().__init__()
        require_range(
            at_least=1, channels=channels, size=size, num_classes=num_classes, patch=patch
        )
        require_range(
            at_least=1, layers_per_block=layers_per_block, norm_num_groups=norm_num_groups
        )
        require_range(at_least=1, attention_head_dim=attention_head_dim)
        require_multiple(size, patch)

        self.patch = patch
        self.num_classes = num_classes
        embeddings = None if num_classes is None else num_classes + 1
        self.network = UNet2DModel(
            sample_size=size // patch,
            in_channels=channels * patch**2,
            out_channels=channels * patch**2,
            num_class_embeds=embeddings,
            layers_per_block=layers_per_block,
            block_out_channels=block_out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            resnet_time_scale_shift=resnet_time_scale_shift,
        )

    def forward(self, x: Tensor, clock: Tensor, classes: Tensor) -> Tensor:
        """Return the network's answer (M, C, H, W) at x (M, C, H, W)."""
        x = F.pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last)
        labels = None
        if self.num_classes is not None:
            labels = torch.where(classes < 0, self.num_classes, classes)
        return F.pixel_shuffle(self.network(x, clock, class_labels=labels).sample, self.patch)


class DiT(nn.Module):
    """A DiTTransformer2DModel of diffusers (Peebles & Xie 2022, arXiv 2212.09748).

    Args:
        channels: Channels of the images.
        size: Their height and width in pixels.
        num_classes: Number of classes.
        patch: Height and width of a patch in pixels.
        num_layers, num_attention_heads, attention_head_dim, norm_eps: Arguments of
            DiTTransformer2DModel.
    """

    adaptive_norms: ClassVar[tuple[str, ...]] = ("norm1.linear", "timestep_embedder", "proj_out_1")

    def __init__(
        self,
        channels: int = 1,
        size: int = 32,
        num_classes: int = 10,
        patch: int = 4,
        num_layers: int = 8,
        num_attention_heads: int = 4,
        attention_head_dim: int = 32,
        norm_eps: float = 1e-5,
    ):
        from diffusers import DiTTransformer2DModel
        from diffusers.models.embeddings import LabelEmbedding

        super().__init__()
        require_range(
            at_least=1, channels=channels, size=size, num_classes=num_classes, patch=patch
        )
        require_range(at_least=1, num_layers=num_layers, num_attention_heads=num_attention_heads)
        require_range(at_least=1, attention_head_dim=attention_head_dim)
        require_multiple(size, patch)

        self.num_classes = num_classes
        self.network = DiTTransformer2DModel(
            sample_size=size,
            patch_size=patch,
            in_channels=channels,
            out_channels=channels,
            num_embeds_ada_norm=num_classes,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            norm_eps=norm_eps,
        )

        # The trainer drops labels; each block would drop others.
        for module in self.network.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0

    def forward(self, x: Tensor, clock: Tensor, classes: Tensor) -> Tensor:
        """Return the network's answer (M, C, H, W) at x (M, C, H, W)."""
        labels = torch.where(classes < 0, self.num_classes, classes)
        return self.network(x, timestep=clock, class_labels=labels).sample


def require_multiple(size: int, patch: int) -> None:
    """Raise a ValueError for images that are not a whole number of patches wide."""
    if size % patch:
        raise ValueError(f"size must be a multiple of patch, got {size} and {patch}")
