"""STDiT3, the network of Open-Sora 1.2 (Zheng et al. 2024, arXiv 2412.20404), by the names of its public weights.

Blocks take turns: one attends within each frame, the next along time at each place. Attention is torch's own, so it
needs no kernel besides. What it was trained to give, and the prompts, are in `open_sora`.
Legend: M rows, C channels, T frames, H x W latents; S places of a frame; F features, L tokens of text.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oss_exp.checks import require_range
from oss_exp.models.checkpoints.weights import xavier
from oss_exp.models.families.dit import Frequencies


class STDiT3(nn.Module):
    """A velocity and its variance, on the public checkpoints' keys.

    channels: C. features: F, with `num_heads` heads and `num_layers` blocks of each kind.
    text_features, text_tokens: of an encoding (text_tokens, text_features); `y_embedder.y_embedding` is the null one.
    image_size: pixels; the root of the area at which places have their own numbers (512).
    patch: a place is patch x patch latents.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        num_layers: int,
        num_heads: int,
        text_features: int,
        text_tokens: int,
        image_size: int,
        patch: int = 2,
    ):
        super().__init__()
        require_range(
            at_least=1,
            channels=channels,
            features=features,
            num_layers=num_layers,
            num_heads=num_heads,
        )
        require_range(
            at_least=1, text_features=text_features, text_tokens=text_tokens, image_size=image_size
        )
        require_range(at_least=1, patch=patch)
        if features % (2 * num_heads):
            raise ValueError(
                f"features must be a multiple of 2 num_heads={2 * num_heads}, got {features}"
            )
        self.channels, self.features, self.image_size, self.patch = (
            channels,
            features,
            image_size,
            patch,
        )
        self.x_embedder = nn.ModuleDict(
            {"proj": nn.Conv3d(channels, features, (1, patch, patch), (1, patch, patch))}
        )
        self.t_embedder, self.fps_embedder = ScalarEmbedder(features), ScalarEmbedder(features)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(features, 6 * features))
        self.y_embedder = TextEmbedder(text_features, text_tokens, features)
        self.rope = Rope(features // num_heads)
        self.spatial_blocks = nn.ModuleList(Block(features, num_heads) for _ in range(num_layers))
        self.temporal_blocks = nn.ModuleList(Block(features, num_heads) for _ in range(num_layers))
        self.final_layer = FinalLayer(features, patch**2 * 2 * channels)
        self.apply(xavier)

    def forward(
        self,
        x: Tensor,
        clock: Tensor,
        text: Tensor,
        kept: Tensor,
        fps: Tensor,
        image_size: float,
        noisy: Tensor | None = None,
    ) -> Tensor:
        """x (M, C, T, H, W), clock (M,) of 0 .. 1000 -> (M, 2 C, T, H, W): data - noise, then what no ODE needs.

        text (M, L, text_features), of which `kept` (M, L) are read; fps (M,) frames a second.
        image_size: the root of the video's area in pixels. noisy (M, T): False where a frame is given, at clock 0.
        H and W that are no multiples of a patch are filled up with zeros.
        """
        height, width = x.shape[3:]
        x = self.x_embedder["proj"](
            F.pad(x, (0, -width % self.patch, 0, -height % self.patch))
        ).movedim(1, -1)
        frames, rows, columns = x.shape[1:4]
        scale = image_size / self.image_size
        with x.device:
            places = position_table(
                rows, columns, scale, round((rows * columns) ** 0.5), self.features
            )
        x = x.flatten(2, 3) + places.to(x)  # (M, T, S, F)
        rate = self.fps_embedder(fps)
        own, clean = self.t_embedder(clock) + rate, self.t_embedder(torch.zeros_like(clock)) + rate
        clocks = (
            own[:, None]
            if noisy is None
            else torch.where(noisy[:, :, None], own[:, None], clean[:, None])
        )
        modulation = self.t_block(clocks).unflatten(-1, (6, self.features))
        text, angles = self.y_embedder.y_proj(text), self.rope.angles(frames)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, text, kept, modulation)
            x = temporal(x.transpose(1, 2), text, kept, modulation.unsqueeze(1), angles).transpose(
                1, 2
            )
        x = self.final_layer(x, own, clean, noisy).unflatten(2, (rows, columns))
        x = x.unflatten(-1, (self.patch, self.patch, 2 * self.channels)).permute(
            0, 6, 1, 2, 4, 3, 5
        )
        return x.flatten(5, 6).flatten(3, 4)[..., :height, :width]


class Block(nn.Module):
    """Attention along the last axis but one, attention to the text, and an MLP."""

    def __init__(self, features: int, num_heads: int):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, features) / features**0.5)
        self.attn = Attention(features, num_heads)
        self.cross_attn = CrossAttention(features, num_heads)
        self.mlp = MLP(features, 4 * features, features)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        kept: Tensor,
        modulation: Tensor,
        angles: Tensor | None = None,
    ) -> Tensor:
        """x (M, T, S, F) with modulation (M, T or 1, 6, F), or (M, S, T, F) with (M, 1, T or 1, 6, F) and angles."""
        table = self.scale_shift_table + modulation
        if angles is None:
            table = table.unsqueeze(2)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table.unbind(-2)
        x = x + gate * self.attn(modulate(x, shift, scale), angles)
        x = x + self.cross_attn(x.flatten(1, 2), text, kept).view_as(x)
        return x + mlp_gate * self.mlp(modulate(x, mlp_shift, mlp_scale))


class Attention(nn.Module):
    """x (M, A, N, F): among the N of each of the A, heads normalised, then turned by `angles` (N, F / heads / 2)."""

    def __init__(self, features: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.q_norm, self.k_norm = (nn.RMSNorm(features // num_heads, eps=1e-6) for _ in range(2))

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        q, k, v = (
            self.qkv(x).flatten(0, 1).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = turned(q, angles), turned(k, angles)
        found = F.scaled_dot_product_attention(q, k, v)
        return self.proj(found.transpose(1, 2).reshape(x.shape))


class CrossAttention(nn.Module):
    """x (M, N, F) to the `kept` (M, L) of text (M, L, F)."""

    def __init__(self, features: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear, self.kv_linear = (
            nn.Linear(features, features),
            nn.Linear(features, 2 * features),
        )
        self.proj = nn.Linear(features, features)

    def forward(self, x: Tensor, text: Tensor, kept: Tensor) -> Tensor:
        q = self.q_linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(text).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=kept[:, None, None])
        return self.proj(found.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, features: int, hidden: int, outputs: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(features, hidden), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ScalarEmbedder(nn.Module):
    """(M,) -> (M, F)."""

    def __init__(self, features: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, features), nn.SiLU(), nn.Linear(features, features))

    def forward(self, value: Tensor) -> Tensor:
        return self.mlp(Frequencies()(value).to(self.mlp[0].weight))


class TextEmbedder(nn.Module):
    """y_proj: (..., text_features) -> (..., F). y_embedding: the null prompt's encoding."""

    def __init__(self, text_features: int, text_tokens: int, features: int):
        super().__init__()
        self.y_proj = MLP(text_features, features, features)
        self.y_embedding = nn.Parameter(
            torch.randn(text_tokens, text_features) / text_features**0.5
        )


class Rope(nn.Module):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864); the public files hold their frequencies."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("freqs", 10000.0 ** -(torch.arange(0, size, 2) / size))

    def angles(self, count: int) -> Tensor:
        """(count, size / 2) float64."""
        freqs = self.freqs.double()
        return torch.arange(count, device=freqs.device)[:, None] * freqs


class FinalLayer(nn.Module):
    """x (M, T, S, F) -> (M, T, S, outputs), at the clock (M, F) of noisy frames or of clean ones."""

    def __init__(self, features: int, outputs: int):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, features) / features**0.5)
        self.linear = nn.Linear(features, outputs)

    def forward(self, x: Tensor, own: Tensor, clean: Tensor, noisy: Tensor | None) -> Tensor:
        x = self._modulated(x, own)
        if noisy is not None:  # as the network was trained: a given frame is modulated twice
            x = torch.where(noisy[:, :, None, None], x, self._modulated(x, clean))
        return self.linear(x)

    def _modulated(self, x: Tensor, clock: Tensor) -> Tensor:
        return modulate(x, *(self.scale_shift_table + clock[:, None])[:, :, None, None].unbind(1))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """x (..., N, D): neighbours 2 i, 2 i + 1 turned by angles (N, D / 2)."""
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def position_table(rows: int, columns: int, scale: float, base: int, features: int) -> Tensor:
    """(rows * columns, features) float64: sines, then cosines, of the column, then of the row.

    Both count from 0 to base / scale, whatever their number, so that a place of any size and shape is known.
    """
    frequencies = 10000.0 ** -(
        torch.arange(0, features // 2, 2, dtype=torch.float64) / (features // 2)
    )
    across, down = (
        torch.arange(count, dtype=torch.float64) * base / (scale * count)
        for count in (columns, rows)
    )
    phases = (across[None, :, None] * frequencies, down[:, None, None] * frequencies)
    parts = [
        part.expand(rows, columns, -1) for phase in phases for part in (phase.sin(), phase.cos())
    ]
    return torch.cat(parts, dim=-1).flatten(0, 1)
