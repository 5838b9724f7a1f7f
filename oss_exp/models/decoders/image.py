"""Decoders from the space that a network works in to pixels.

Legend: B images, C channels, h x w latents, H x W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oss_exp.checks import require_range
from oss_exp.models.checkpoints.weights import locate, randomise, read_for


class Pixels(nn.Module):
    """The decoder of a network that works on pixels in [-1, 1]."""

    def forward(self, x0: Tensor) -> Tensor:
        """Map x0 (B, C, H, W) from [-1, 1] to [0, 1]."""
        return ((x0 + 1) / 2).clamp(0, 1)


# Names in older files of diffusers, and those of today.
OLDER_NAMES = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
CURRENT_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class VAE(nn.Module):
    """The decoder of diffusers.AutoencoderKL, (B, C, h, w) to (B, 3, H, W), in float32.

    H = 8 h with four levels. Source: Rombach et al. 2022, arXiv 2112.10752.

    Args:
        checkpoint: A file, a folder or a hub id; `random` for reproducible random weights.
        scaling_factor: The network's latents are (the encoder's - shift_factor) * scaling_factor.
        micro_batch: Number of images decoded at a time.
        source: URL of the public checkpoint, quoted in the error when it is missing.
        shift_factor: See `scaling_factor`; None for 0.
        latent_channels: Argument of AutoencoderKL, like all that follow, with its default.
    """

    FILES = (
        "vae/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.bin",
    )

    def __init__(
        self,
        checkpoint: str,
        scaling_factor: float,
        micro_batch: int,
        source: str,
        shift_factor: float | None = None,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (64,),
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        layers_per_block: int = 1,
        norm_num_groups: int = 32,
        **config: Any,
    ):
        from diffusers import AutoencoderKL

        super().__init__()

        # Checks.
        require_range(above=0, at_most=1e6, scaling_factor=scaling_factor)
        require_range(at_least=-1e6, at_most=1e6, shift_factor=shift_factor)
        require_range(at_least=1, micro_batch=micro_batch, latent_channels=latent_channels)
        require_range(
            at_least=1, layers_per_block=layers_per_block, norm_num_groups=norm_num_groups
        )
        widths = list(block_out_channels)
        if not widths or any(width < 1 or width % norm_num_groups for width in widths):
            raise ValueError(
                f"block_out_channels must be multiples of norm_num_groups={norm_num_groups}, "
                f"got {widths}"
            )

        # The decoder.
        network = AutoencoderKL(
            latent_channels=latent_channels,
            block_out_channels=block_out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            **config,
        )
        network.encoder = None
        network.quant_conv = None
        self.post_quant_conv = network.post_quant_conv or nn.Identity()
        self.decoder = network.decoder
        self._network = (network,)  # in a tuple, so that its parts are registered once
        self.micro_batch = micro_batch
        self.source = source
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor or 0.0

        # Weights.
        if checkpoint == "random":
            randomise(self, torch.Generator().manual_seed(0))
        else:
            self._load(checkpoint)
        self.eval().requires_grad_(False)

    def forward(self, x0: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) in [0, 1]; videos (B, C, F, h, w) frame by frame."""
        if x0.ndim == 5:
            frames = x0.transpose(1, 2)
            return self(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)
        (network,) = self._network
        latents = x0.float() / self.scaling_factor + self.shift_factor
        pixels = [network.decode(rows).sample for rows in latents.split(self.micro_batch)]
        return ((torch.cat(pixels) + 1) / 2).clamp(0, 1)

    def _load(self, checkpoint: str) -> None:
        """Read every weight of the decoder; only an encoder may be left over."""
        path = locate(checkpoint, self.FILES, self.source, "model.sizes.full.decoder.checkpoint")
        weights = read_for(path, self.state_dict(), self.translate, None, "model.decoder")
        self.load_state_dict(weights)

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a file's tensors of the decoder, by current names."""
        decoder = {}
        for key, value in tensors.items():
            if not key.startswith(("encoder.", "quant_conv.", "loss.")):
                name = OLDER_NAMES.sub(lambda match: CURRENT_NAMES[match[0]], key)
                decoder[name] = value
        return decoder
