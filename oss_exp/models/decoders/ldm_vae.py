"""Decoders in the file layout of latent diffusion, such as MAR's kl16.ckpt.

Source: Rombach et al. 2022, arXiv 2112.10752.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from oss_exp.models.decoders.image import VAE

LEVEL = re.compile(r"^decoder\.up\.(\d+)\.")

# Names of latent diffusion and those of diffusers, replaced one after the other.
SPELLINGS = (
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
    """A `VAE` from a file of latent diffusion or of diffusers."""

    FILES = ("kl16.ckpt", *VAE.FILES)

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return diffusers_layout(super().translate(tensors))


def diffusers_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a decoder's tensors from latent diffusion's keys to those of AutoencoderKL.

    Other keys stay. Latent diffusion counts levels from the largest, and its attention has kernels
    (C, C, 1, 1) where diffusers has matrices (C, C).
    """
    # The number of levels.
    top = 0
    for key in tensors:
        if match := LEVEL.match(key):
            top = max(top, int(match[1]))

    renamed = {}
    for key, value in tensors.items():
        name = LEVEL.sub(lambda level: f"decoder.up_blocks.{top - int(level[1])}.", key)
        for pattern, replacement in SPELLINGS:
            name = re.sub(pattern, replacement, name)
        is_kernel = key.startswith("decoder.mid.attn_1.") and value.ndim == 4
        renamed[name] = value.flatten(1) if is_kernel else value
    return renamed
