"""From the space that a network works in to pixels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oss_exp.checks import require_range
from oss_exp.models.checkpoints.weights import locate, randomise, read_for


class Pixels(nn.Module):
    """The network works on pixels in [-1, 1]."""

    def forward(self, x0: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W) in [0, 1]."""
        return ((x0 + 1) / 2).clamp(0, 1)


ATTENTION = re.compile(
    r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)"
)  # as older files of diffusers say
TODAY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class VAE(nn.Module):
    """diffusers.AutoencoderKL (Rombach et al. 2022, arXiv 2112.10752): (B, C, h, w) -> (B, 3, H, W).

    H = 8 h with four levels. Only the decoder is kept, in float32.

    checkpoint:   a file, a folder or a hub id; `random`: reproducible random weights.
    micro_batch:  images decoded at a time.
    source:       where the public file is had, for the message when it is missing.
    scaling_factor, shift_factor: the network's latents are (the encoder's - shift) times scale.
    latent_channels ... norm_num_groups, config: AutoencoderKL's own, with its defaults.
    """

    FILES = tuple(
        f"{folder}diffusion_pytorch_model.{kind}"
        for folder in ("vae/", "")
        for kind in ("safetensors", "bin")
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
        require_range(above=0, at_most=1e6, scaling_factor=scaling_factor)
        require_range(at_least=-1e6, at_most=1e6, shift_factor=shift_factor)
        require_range(at_least=1, micro_batch=micro_batch, latent_channels=latent_channels)
        require_range(
            at_least=1, layers_per_block=layers_per_block, norm_num_groups=norm_num_groups
        )
        if not block_out_channels or any(
            width < 1 or width % norm_num_groups for width in block_out_channels
        ):
            raise ValueError(
                f"block_out_channels must be multiples of norm_num_groups={norm_num_groups}, got "
                f"{list(block_out_channels)}"
            )
        network = AutoencoderKL(
            latent_channels=latent_channels,
            block_out_channels=block_out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            **config,
        )
        self.micro_batch, self.source = micro_batch, source
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor or 0.0
        network.encoder = network.quant_conv = None
        self.post_quant_conv, self.decoder = (
            network.post_quant_conv or nn.Identity(),
            network.decoder,
        )
        self._network = (network,)  # no part beside its own parts
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
        """Every weight of the decoder from a file, which may hold an encoder besides but nothing else."""
        path = locate(checkpoint, self.FILES, self.source, "model.sizes.full.decoder.checkpoint")
        self.load_state_dict(
            read_for(path, self.state_dict(), self.translate, None, "model.decoder")
        )

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors by our names, without its encoder and what it was trained by."""
        return {
            ATTENTION.sub(lambda old: TODAY[old[0]], key): value
            for key, value in tensors.items()
            if not key.startswith(("encoder.", "quant_conv.", "loss."))
        }
