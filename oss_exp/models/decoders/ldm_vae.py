"""Decoders in latent diffusion's own files (Rombach et al. 2022, arXiv 2112.10752), such as MAR's kl16.ckpt."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from oss_exp.models.decoders.image import VAE

LEVEL = re.compile(r"^decoder\.up\.(\d+)\.")
SPELLINGS = (  # theirs -> diffusers', one after the other
    (r"^decoder\.norm_out\.", "decoder.conv_norm_out."),
    (r"^decoder\.mid\.block_1\.", "decoder.mid_block.resnets.0."),
    (r"^decoder\.mid\.block_2\.", "decoder.mid_block.resnets.1."),
    (r"^decoder\.mid\.attn_1\.norm\.", "decoder.mid_block.attentions.0.group_norm."),
    (r"^decoder\.mid\.attn_1\.([qkv])\.", r"decoder.mid_block.attentions.0.to_\1."),
    (r"^decoder\.mid\.attn_1\.proj_out\.", "decoder.mid_block.attentions.0.to_out.0."),
    (r"^(decoder\.up_blocks\.\d+)\.block\.", r"\1.resnets."),
    (r"^(decoder\.up_blocks\.\d+)\.upsample\.", r"\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)


class LDMVAE(VAE):
    """As `VAE`, from a file of latent diffusion or of diffusers."""

    FILES = ("kl16.ckpt", *VAE.FILES)

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return diffusers_layout(super().translate(tensors))


def diffusers_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A decoder's tensors by latent diffusion's keys -> by those of diffusers.AutoencoderKL; other keys stay.

    Theirs counts levels from the largest; its attention has 1 x 1 kernels (C, C, 1, 1), diffusers' matrices (C, C).
    """
    top = max((int(level[1]) for level in map(LEVEL.match, tensors) if level), default=0)
    found = {}
    for key, value in tensors.items():
        name = LEVEL.sub(lambda level: f"decoder.up_blocks.{top - int(level[1])}.", key)
        for theirs, ours in SPELLINGS:
            name = re.sub(theirs, ours, name)
        found[name] = (
            value.flatten(1) if key.startswith("decoder.mid.attn_1.") and value.ndim == 4 else value
        )
    return found
