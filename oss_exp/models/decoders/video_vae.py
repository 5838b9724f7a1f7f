"""From the latents of Open-Sora 1.2 to frames: a decoder along time, then one for each frame.

(Zheng et al. 2024, arXiv 2412.20404, section 2.2.) Both are kept by the names of hpcai-tech/OpenSora-VAE-v1.2, which
holds an encoder of each besides. Legend: B videos, C channels, T latent frames, F frames, h x w latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oss_exp.checks import SettingsOf, require_range
from oss_exp.models.checkpoints.weights import locate, randomise, read_for
from oss_exp.models.decoders.image import VAE

FRAMES, LATENTS = 17, 5  # frames that are encoded together, and how many latent ones they become
OTHERS = (
    "scale",
    "shift",
    *(f"{vae}.{part}" for vae in ("spatial_vae", "temporal_vae") for part in ("enc", "quant")),
)


def latent_frames(num_frames: int) -> int:
    """Of a video of whole groups of 17 frames, or of a picture, whose one frame is its own latent one."""
    if num_frames == 1:
        return 1
    if num_frames < 1 or num_frames % FRAMES:
        raise ValueError(
            f"num_frames must be 1 or a multiple of {FRAMES}, got {num_frames}; "
            f"choose {max(1, round(num_frames / FRAMES)) * FRAMES}"
        )
    return num_frames // FRAMES * LATENTS


class VideoVAE(nn.Module):
    """(B, C, T, h, w) -> (B, 3, F, H, W) in [0, 1], of T = `latent_frames(F)`; H = 8 h with four spatial levels.

    checkpoint:   a file, a folder or a hub id; `random`: reproducible random weights.
    scale, shift: the temporal encoder's latents are the network's times `scale` plus `shift`, channel by channel.
    temporal:     `TemporalDecoder`'s arguments. spatial: `VAE`'s, without `checkpoint` and `source`.
    source:       where the public file is had, for the message when it is missing.
    """

    FILES = ("model.safetensors",)

    def __init__(
        self,
        checkpoint: str,
        scale: Sequence[float],
        shift: Sequence[float],
        temporal: Annotated[Mapping[str, Any], SettingsOf(TemporalDecoder)],
        spatial: Annotated[Mapping[str, Any], SettingsOf(VAE)],
        source: str,
    ):
        super().__init__()
        if not scale or len(scale) != len(shift):
            raise ValueError(
                f"scale and shift must have a number for each channel, got {list(scale)}, {list(shift)}"
            )
        self.temporal_vae = nn.Module()
        channels = len(scale)
        self.temporal_vae.post_quant_conv = CausalConv(channels, channels, 1)
        self.temporal_vae.decoder = TemporalDecoder(channels, **temporal)
        self.spatial_vae = VAE(checkpoint="random", source=source, **spatial)
        for name, values in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, torch.tensor(values)[:, None, None, None], persistent=False)
        if checkpoint == "random":
            randomise(self.temporal_vae, torch.Generator().manual_seed(0))
        else:
            self._load(checkpoint, source)
        self.eval().requires_grad_(False)

    def forward(self, x0: Tensor) -> Tensor:
        latents = x0.float() * self.scale + self.shift
        groups = (
            self.temporal_vae.post_quant_conv(group) for group in latents.split(LATENTS, dim=2)
        )
        frames = torch.cat([self.temporal_vae.decoder(group) for group in groups], dim=2).transpose(
            1, 2
        )
        return self.spatial_vae(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)

    def _load(self, checkpoint: str, source: str) -> None:
        """Every weight of the decoders from a file, which has encoders and the scaling besides but nothing else."""
        path = locate(checkpoint, self.FILES, source, "model.sizes.full.decoder.checkpoint")
        self.load_state_dict(read_for(path, self.state_dict(), _decoders, None, "model.decoder"))


def _decoders(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {
        key.replace("spatial_vae.module.", "spatial_vae."): value for key, value in tensors.items()
    }
    return {key: value for key, value in named.items() if not key.startswith(OTHERS)}


class TemporalDecoder(nn.Module):
    """(B, C, T, h, w) -> (B, C, 4 T - 3, h, w), with two doublings of time: the first latent frame becomes one.

    features, multipliers: its levels have features * multipliers. doublings: which levels but the last double time.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        multipliers: Sequence[int],
        doublings: Sequence[bool],
        num_layers: int,
        num_groups: int,
    ):
        super().__init__()
        require_range(at_least=1, features=features, num_layers=num_layers, num_groups=num_groups)
        if len(doublings) != len(multipliers) - 1:
            raise ValueError(
                f"doublings must have an entry for each of the {len(multipliers)} multipliers but the last, "
                f"got {len(doublings)}"
            )
        self.doublings = tuple(doublings)
        widths = [features * multiplier for multiplier in multipliers]
        self.conv1 = CausalConv(channels, widths[-1], 3)
        self.res_blocks = nn.ModuleList(
            ResBlock(widths[-1], widths[-1], num_groups) for _ in range(num_layers)
        )
        self.block_res_blocks = nn.ModuleList(
            nn.ModuleList(
                ResBlock(above if layer == 0 else width, width, num_groups)
                for layer in range(num_layers)
            )
            for width, above in zip(widths, [*widths[1:], widths[-1]], strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv(width, 2 * width, 3) if double else nn.Identity()
            for width, double in zip(widths[1:], doublings, strict=True)
        )
        self.norm1 = nn.GroupNorm(num_groups, widths[0])
        self.conv_out = CausalConv(widths[0], channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for block in self.res_blocks:
            x = block(x)
        for level in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[level]:
                x = block(x)
            if level and self.doublings[level - 1]:
                x = self.doubled(x, level - 1)
        x = self.conv_out(F.silu(self.norm1(x)))
        return x[:, :, 2 ** sum(self.doublings) - 1 :]  # what comes before the first frame

    def doubled(self, x: Tensor, level: int) -> Tensor:
        """(B, D, T, h, w) -> (B, D, 2 T, h, w), a channel's two halves as neighbours in time."""
        return self.conv_blocks[level](x).unflatten(1, (-1, 2)).transpose(2, 3).flatten(2, 3)


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, num_groups: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(num_groups, inputs), nn.GroupNorm(num_groups, outputs)
        self.conv1, self.conv2 = (
            CausalConv(inputs, outputs, 3, bias=False),
            CausalConv(outputs, outputs, 3, bias=False),
        )
        self.conv3 = (
            CausalConv(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv3(x) + self.conv2(F.silu(self.norm2(y)))


class CausalConv(nn.Module):
    """A convolution that sees no later frame: zeros before the first."""

    def __init__(self, inputs: int, outputs: int, size: int, bias: bool = True):
        super().__init__()
        self.padding = (size // 2,) * 4 + (size - 1, 0)
        self.conv = nn.Conv3d(inputs, outputs, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))
