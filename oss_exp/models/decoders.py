"""From the space that a network works in to pixels."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from oss_exp.models.weights import locate, randomise, read


class Pixels(nn.Module):
    """The network works on pixels in [-1, 1]."""

    def forward(self, x0: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W) in [0, 1]."""
        return ((x0 + 1) / 2).clamp(0, 1)


ATTENTION = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")  # as older files of diffusers say
TODAY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class VAE(nn.Module):
    """The network works on latents of diffusers.AutoencoderKL (Rombach et al. 2022, arXiv 2112.10752).

    Only the decoder is kept, in float32.

    checkpoint:     a file, a folder or a hub id; `random`: reproducible random weights.
    scaling_factor: the network's latents are the encoder's times this.
    micro_batch:    images decoded at a time.
    source:         where the public file is had, for the message when it is missing.
    config:         AutoencoderKL's own.
    """

    FILES = tuple(
        f"{folder}diffusion_pytorch_model.{kind}" for folder in ("vae/", "") for kind in ("safetensors", "bin")
    )

    def __init__(self, checkpoint: str, scaling_factor: float, micro_batch: int, source: str, **config: Any):
        from diffusers import AutoencoderKL

        super().__init__()
        self.scaling_factor, self.micro_batch, self.source = scaling_factor, micro_batch, source
        whole = AutoencoderKL(**config)
        self.post_quant_conv, self.decoder = whole.post_quant_conv, whole.decoder
        if checkpoint == "random":
            randomise(self, torch.Generator().manual_seed(0))
        else:
            self._load(checkpoint)
        self.eval().requires_grad_(False)

    def forward(self, x0: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) in [0, 1], H = 8 h with four levels."""
        latents = (x0.float() / self.scaling_factor).split(self.micro_batch)
        images = torch.cat([self.decoder(self.post_quant_conv(rows)) for rows in latents])
        return ((images + 1) / 2).clamp(0, 1)

    def _load(self, checkpoint: str) -> None:
        """Every weight of the decoder from a file, which may hold an encoder besides but nothing else."""
        path = locate(checkpoint, self.FILES, self.source, "model.sizes.full.decoder.checkpoint")
        tensors = {
            ATTENTION.sub(lambda old: TODAY[old[0]], key): value
            for key, value in read(path).items()
            if not key.startswith(("encoder.", "quant_conv."))
        }
        try:
            self.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"VAE {path} is of another architecture than model.decoder: {error!s:.400}") from None
