"""The decoder of Open-Sora 1.2: one network along time, then one for every frame.

Both have the names of hpcai-tech/OpenSora-VAE-v1.2, which contains the encoders too.
Source: Zheng et al. 2024, arXiv 2412.20404, section 2.2.

Legend: B videos, C channels, T latent frames, F frames, h x w latents.
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

FRAMES = 17  # frames that are encoded together
LATENTS = 5  # latent frames that they become

# Beginnings of keys in the public file that decoding does not need.
OTHERS = (
    "scale",
    "shift",
    "spatial_vae.enc",
    "spatial_vae.quant",
    "temporal_vae.enc",
    "temporal_vae.quant",
)


def latent_frames(num_frames: int) -> int:
    """Return the number of latent frames T of F frames: 1, or 5 for every 17 frames.

    Raises ValueError for other numbers of frames.
    """
    if num_frames == 1:
        return 1
    if num_frames < 1 or num_frames % FRAMES:
        raise ValueError(
            f"num_frames must be 1 or a multiple of {FRAMES}, got {num_frames}; "
            f"choose {max(1, round(num_frames / FRAMES)) * FRAMES}"
        )
    return num_frames // FRAMES * LATENTS


class VideoVAE(nn.Module):
    """A decoder of latents (B, C, T, h, w) to videos (B, 3, F, H, W) in [0, 1].

    T = `latent_frames(F)`, and H = 8 h with four spatial levels.

    Args:
        checkpoint: A file, a folder or a hub id; `random` for reproducible random weights.
        scale: The temporal encoder's latents are the network's times `scale` plus `shift`, by
            channel.
        shift: See `scale`.
        temporal: Arguments of `TemporalDecoder`.
        spatial: Arguments of `VAE`, without `checkpoint` and `source`.
        source: URL of the public checkpoint, quoted in the error when it is missing.
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
                "scale and shift must have a number for each channel, "
                f"got {list(scale)}, {list(shift)}"
            )

        # Networks.
        channels = len(scale)
        self.temporal_vae = nn.Module()
        self.temporal_vae.post_quant_conv = CausalConv(channels, channels, 1)
        self.temporal_vae.decoder = TemporalDecoder(channels, **temporal)
        self.spatial_vae = VAE(checkpoint="random", source=source, **spatial)
        for name, values in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, torch.tensor(values)[:, None, None, None], persistent=False)

        # Weights.
        if checkpoint == "random":
            randomise(self.temporal_vae, torch.Generator().manual_seed(0))
        else:
            self._load(checkpoint, source)
        self.eval().requires_grad_(False)

    def forward(self, x0: Tensor) -> Tensor:
        # Time, one group after the other.
        latents = x0.float() * self.scale + self.shift
        groups = []
        for group in latents.split(LATENTS, dim=2):
            groups.append(self.temporal_vae.decoder(self.temporal_vae.post_quant_conv(group)))
        frames = torch.cat(groups, dim=2).transpose(1, 2)

        # Space, all frames as images.
        images = self.spatial_vae(frames.flatten(0, 1))
        return images.unflatten(0, frames.shape[:2]).transpose(1, 2)

    def _load(self, checkpoint: str, source: str) -> None:
        """Read every weight of the decoders; only encoders and the scaling may be left over."""
        path = locate(checkpoint, self.FILES, source, "model.sizes.full.decoder.checkpoint")
        self.load_state_dict(read_for(path, self.state_dict(), _decoders, None, "model.decoder"))


def _decoders(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the decoders, by our names."""
    decoders = {}
    for key, value in tensors.items():
        name = key.replace("spatial_vae.module.", "spatial_vae.")
        if not name.startswith(OTHERS):
            decoders[name] = value
    return decoders


class TemporalDecoder(nn.Module):
    """A decoder along time, (B, C, T, h, w) to (B, C, 4 T - 3, h, w) with two doublings of time.

    The first latent frame becomes one frame.

    Args:
        channels: C.
        features: Levels have features * multipliers channels.
        multipliers: One for every level.
        doublings: Whether a level doubles time, for all levels but the last.
        num_layers: Residual blocks of a level.
        num_groups: Groups of all normalisations.
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
                f"doublings must have an entry for each of the {len(multipliers)} multipliers but "
                f"the last, got {len(doublings)}"
            )
        self.doublings = tuple(doublings)
        widths = [features * multiplier for multiplier in multipliers]

        # Input, at the last level.
        self.conv1 = CausalConv(channels, widths[-1], 3)
        self.res_blocks = nn.ModuleList(
            ResBlock(widths[-1], widths[-1], num_groups) for _ in range(num_layers)
        )

        # Levels, and what doubles time between them.
        self.block_res_blocks = nn.ModuleList()
        for width, inputs in zip(widths, [*widths[1:], widths[-1]], strict=True):
            level = nn.ModuleList()
            for layer in range(num_layers):
                level.append(ResBlock(inputs if layer == 0 else width, width, num_groups))
            self.block_res_blocks.append(level)
        self.conv_blocks = nn.ModuleList()
        for width, doubles in zip(widths[1:], doublings, strict=True):
            self.conv_blocks.append(CausalConv(width, 2 * width, 3) if doubles else nn.Identity())

        # Output.
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
        return x[:, :, 2 ** sum(self.doublings) - 1 :]  # without padding before the first frame

    def doubled(self, x: Tensor, level: int) -> Tensor:
        """Double the time of (B, D, T, h, w): two halves of the channels alternate in time."""
        return self.conv_blocks[level](x).unflatten(1, (-1, 2)).transpose(2, 3).flatten(2, 3)


class ResBlock(nn.Module):
    """Two causal convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, num_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, inputs)
        self.norm2 = nn.GroupNorm(num_groups, outputs)
        self.conv1 = CausalConv(inputs, outputs, 3, bias=False)
        self.conv2 = CausalConv(outputs, outputs, 3, bias=False)
        self.conv3 = nn.Identity()
        if inputs != outputs:
            self.conv3 = CausalConv(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv3(x) + self.conv2(F.silu(self.norm2(y)))


class CausalConv(nn.Module):
    """A convolution that uses no later frames; there are zeros before the first one."""

    def __init__(self, inputs: int, outputs: int, size: int, bias: bool = True):
        super().__init__()
        self.padding = (size // 2,) * 4 + (size - 1, 0)
        self.conv = nn.Conv3d(inputs, outputs, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))
