"""Define STDiT3, the network of Open-Sora 1.2 (Zheng et al. 2024, arXiv 2412.20404).

Its weights have the names of the public files. Blocks take turns: one attends within
each frame, the next along time at each place. Attention is torch's own and needs no
other kernel. Prompts, and what the network was trained to predict, are in `open_sora`.
Shapes: M rows, C channels, T frames, H x W latents; S places of a frame; F features, L
tokens of text.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oss_exp.checks import require_range
from oss_exp.models.checkpoints.weights import xavier
from oss_exp.models.families.dit import Frequencies


class STDiT3(nn.Module):
    """A network of videos and texts, which predicts a velocity and its variance.

    Args:
        channels: C.
        features: F, for all heads together.
        num_layers: Blocks of each kind, within frames and along time.
        num_heads: Heads of each attention.
        text_features: Features of an encoded token of text.
        text_tokens: Tokens of the null prompt, `y_embedder.y_embedding`.
        image_size: Root of the area, in pixels, at which places count 0, 1, 2, ...
            (512).
        patch: Height and width of a place in latents.
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
        self.channels = channels
        self.features = features
        self.image_size = image_size
        self.patch = patch

        # Embedders.
        patches = nn.Conv3d(channels, features, (1, patch, patch), (1, patch, patch))
        self.x_embedder = nn.ModuleDict({"proj": patches})
        self.t_embedder = ScalarEmbedder(features)
        self.fps_embedder = ScalarEmbedder(features)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(features, 6 * features))
        self.y_embedder = TextEmbedder(text_features, text_tokens, features)
        self.rope = Rope(features // num_heads)

        # Blocks.
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
        """Return data - noise, and a variance that no ODE needs, together (M, 2 C, T, H, W).

        Args:
            x: Latents (M, C, T, H, W); zeros are added if H and W are no multiples of a
                patch.
            clock: Times (M,) from 0 to 1000.
            text: Encoded prompts (M, L, text_features).
            kept: Which tokens (M, L) are read.
            fps: Frames a second (M,).
            image_size: Root of the video's area in pixels.
            noisy: Which frames (M, T) are noisy; the others are known, at clock 0.
                None: all.
        """
        # Places with their positions.
        height, width = x.shape[3:]
        x = F.pad(x, (0, -width % self.patch, 0, -height % self.patch))
        x = self.x_embedder["proj"](x).movedim(1, -1)
        frames, rows, columns = x.shape[1:4]
        scale = image_size / self.image_size
        base = round((rows * columns) ** 0.5)
        with x.device:
            positions = position_table(rows, columns, scale, base, self.features)
        x = x.flatten(2, 3) + positions.to(x)  # (M, T, S, F)

        # Clock and frame rate.
        rate = self.fps_embedder(fps)
        noisy_clock = self.t_embedder(clock) + rate
        clean_clock = self.t_embedder(torch.zeros_like(clock)) + rate
        clocks = noisy_clock[:, None]
        if noisy is not None:
            clocks = torch.where(noisy[:, :, None], clocks, clean_clock[:, None])
        modulation = self.t_block(clocks).unflatten(-1, (6, self.features))

        # Blocks.
        text = self.y_embedder.y_proj(text)
        angles = self.rope.angles(frames)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, text, kept, modulation)
            x = x.transpose(1, 2)
            x = temporal(x, text, kept, modulation.unsqueeze(1), angles).transpose(1, 2)

        # Latents.
        x = self.final_layer(x, noisy_clock, clean_clock, noisy).unflatten(2, (rows, columns))
        x = x.unflatten(-1, (self.patch, self.patch, 2 * self.channels))
        x = x.permute(0, 6, 1, 2, 4, 3, 5)
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
        """Return x after the block.

        Args:
            x: (M, T, S, F); with `angles` (M, S, T, F).
            text: (M, L, F).
            kept: Which tokens (M, L) are read.
            modulation: (M, T or 1, 6, F); with `angles` (M, 1, T or 1, 6, F).
            angles: Rotary positions of the frames.
        """
        table = self.scale_shift_table + modulation
        if angles is None:
            table = table.unsqueeze(2)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table.unbind(-2)
        x = x + gate * self.attn(modulate(x, shift, scale), angles)
        x = x + self.cross_attn(x.flatten(1, 2), text, kept).view_as(x)
        return x + mlp_gate * self.mlp(modulate(x, mlp_shift, mlp_scale))


class Attention(nn.Module):
    """Attention with normalised heads and rotary positions."""

    def __init__(self, features: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(features, 3 * features)
        self.proj = nn.Linear(features, features)
        self.q_norm = nn.RMSNorm(features // num_heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(features // num_heads, eps=1e-6)

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        """Return the attention among the N of each of the A, for x (M, A, N, F).

        Args:
            x: (M, A, N, F).
            angles: Rotary positions (N, F / heads / 2); None for none.
        """
        qkv = self.qkv(x).flatten(0, 1).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        heads = F.scaled_dot_product_attention(q, k, v)
        return self.proj(heads.transpose(1, 2).reshape(x.shape))


class CrossAttention(nn.Module):
    """Attention to a text."""

    def __init__(self, features: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(features, features)
        self.kv_linear = nn.Linear(features, 2 * features)
        self.proj = nn.Linear(features, features)

    def forward(self, x: Tensor, text: Tensor, kept: Tensor) -> Tensor:
        """Return the attention of x (M, N, F) to the `kept` (M, L) of text (M, L, F)."""
        q = self.q_linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(text).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=kept[:, None, None])
        return self.proj(heads.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU in between."""

    def __init__(self, features: int, hidden: int, outputs: int):
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., outputs) for x (..., features)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ScalarEmbedder(nn.Module):
    """The embedding of a number."""

    def __init__(self, features: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, features), nn.SiLU(), nn.Linear(features, features))

    def forward(self, value: Tensor) -> Tensor:
        """Return the embeddings (M, F) of numbers (M,)."""
        return self.mlp(Frequencies()(value).to(self.mlp[0].weight))


class TextEmbedder(nn.Module):
    """The projection of encoded texts, and the encoding of the null prompt.

    Attributes:
        y_proj: (..., text_features) -> (..., F).
        y_embedding: The null prompt (text_tokens, text_features).
    """

    def __init__(self, text_features: int, text_tokens: int, features: int):
        super().__init__()
        self.y_proj = MLP(text_features, features, features)
        null = torch.randn(text_tokens, text_features) / text_features**0.5
        self.y_embedding = nn.Parameter(null)


class Rope(nn.Module):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864); files hold their frequencies."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("freqs", 10000.0 ** -(torch.arange(0, size, 2) / size))

    def angles(self, count: int) -> Tensor:
        """Return the angles (count, size / 2) of so many positions, float64."""
        freqs = self.freqs.double()
        return torch.arange(count, device=freqs.device)[:, None] * freqs


class FinalLayer(nn.Module):
    """The last layer, at the clocks of noisy and of known frames."""

    def __init__(self, features: int, outputs: int):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, features) / features**0.5)
        self.linear = nn.Linear(features, outputs)

    def forward(
        self, x: Tensor, noisy_clock: Tensor, clean_clock: Tensor, noisy: Tensor | None
    ) -> Tensor:
        """Return (M, T, S, outputs).

        Args:
            x: (M, T, S, F).
            noisy_clock: Embedded clock (M, F) of the noisy frames.
            clean_clock: Embedded clock (M, F) of the known frames.
            noisy: Which frames (M, T) are noisy; None: all.
        """
        x = self._modulated(x, noisy_clock)
        if noisy is not None:  # as in training: a known frame is modulated twice
            x = torch.where(noisy[:, :, None, None], x, self._modulated(x, clean_clock))
        return self.linear(x)

    def _modulated(self, x: Tensor, clock: Tensor) -> Tensor:
        """Return x at an embedded clock (M, F)."""
        table = (self.scale_shift_table + clock[:, None])[:, :, None, None]
        shift, scale = table.unbind(1)
        return modulate(x, shift, scale)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x normalised, scaled and shifted."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the neighbours 2 i and 2 i + 1 of x (..., N, D) by angles (N, D / 2)."""
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def position_table(rows: int, columns: int, scale: float, base: int, features: int) -> Tensor:
    """Return the positions of places: sines, then cosines, of the column, then of the row.

    Rows and columns both count from 0 to base / scale, however many there are, so that
    the network knows the places of images of any size and shape.

    Returns:
        (rows * columns, features), float64.
    """
    half = features // 2
    frequencies = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
    across = torch.arange(columns, dtype=torch.float64) * base / (scale * columns)
    down = torch.arange(rows, dtype=torch.float64) * base / (scale * rows)

    parts = []
    for phase in (across[None, :, None] * frequencies, down[:, None, None] * frequencies):
        parts.append(phase.sin().expand(rows, columns, -1))
        parts.append(phase.cos().expand(rows, columns, -1))
    return torch.cat(parts, dim=-1).flatten(0, 1)
