"""Run the published DiT networks (Peebles & Xie 2022, arXiv 2212.09748).

Their files have the keys of the original code or of diffusers. The network is that of
diffusers, except where it differs from the one that was trained: the frequencies of the
clock (i / 127 in place of i / 128) and the epsilon of one norm (1e-5 in place of 1e-6).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from oss_exp.models.families.backbones import DiT
from oss_exp.models.network import shape

LAYOUTS = ("own", "original", "diffusers")
# Our keys -> the original ones, one pattern after the other.
SPELLINGS = (
    (r"^network\.", ""),
    (r"^transformer_blocks\.\d+\.norm1\.emb\.", ""),  # a copy in each of our blocks
    (r"^transformer_blocks\.", "blocks."),
    (r"timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"class_embedder\.", "y_embedder."),
    (r"norm1\.linear\.", "adaLN_modulation.1."),
    (r"attn1\.to_[qkv]\.", "attn.qkv."),
    (r"attn1\.to_out\.0\.", "attn.proj."),
    (r"ff\.net\.0\.proj\.", "mlp.fc1."),
    (r"ff\.net\.2\.", "mlp.fc2."),
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out_2\.", "final_layer.linear."),
)


class PublishedDiT(DiT):
    """A public DiT, which predicts eps.

    The public networks return 2 C channels. The second half, the learned variance, is
    not needed for an ODE. Arguments are those of `DiT`, all of them required.
    """

    FILES = (
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.bin",
        "DiT-XL-2-256x256.pt",
        "DiT-XL-2-512x512.pt",
    )

    def __init__(
        self,
        channels: int,
        size: int,
        num_classes: int,
        patch: int,
        num_layers: int,
        num_attention_heads: int,
        attention_head_dim: int,
    ):
        super().__init__(
            channels,
            size,
            num_classes,
            patch,
            num_layers,
            num_attention_heads,
            attention_head_dim,
            norm_eps=1e-6,
        )

        # The channels of eps and of its variance, and the frequencies of the training.
        self.network.out_channels = 2 * channels
        self.network.proj_out_2 = nn.Linear(
            self.network.inner_dim, patch**2 * self.network.out_channels
        )

        for block in self.network.transformer_blocks:
            block.norm1.emb.time_proj = Frequencies()

    def forward(self, x: Tensor, clock: Tensor, classes: Tensor) -> Tensor:
        """Return eps (M, C, h, w) at x (M, C, h, w).

        Args:
            x: Latents (M, C, h, w).
            clock: DDPM indices (M,).
            classes: Classes (M,), -1 for none.
        """
        return super().forward(x, clock, classes).chunk(2, dim=1)[0]

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a file's tensors by our keys; unknown keys stay, so that loading refuses them.

        Args:
            tensors: Tensors of a file in any of `LAYOUTS`.

        Raises:
            ValueError: The fixed table of positions is that of another image size.
        """
        # Positions.
        remaining = dict(tensors)
        for name in ("pos_embed", "pos_embed.pos_embed"):
            if name in remaining:
                self._require_positions(remaining.pop(name))

        # Our keys, or those of diffusers.
        translated = {}
        if "x_embedder.proj.weight" not in remaining:
            for key, value in remaining.items():
                translated[f"network.{key.removeprefix('network.')}"] = value
            return translated

        # The original's.
        for name, keys in self._originals().items():
            if name in remaining:
                value = remaining.pop(name)
                parts = value.tensor_split(3) if ".qkv." in name else [value] * len(keys)
                translated |= zip(keys, parts, strict=True)
        return translated | remaining

    def to_public(self, layout: str) -> dict[str, Tensor]:
        """Return the weights in one of `LAYOUTS`.

        Raises:
            ValueError: No such layout, or "original" cannot hold the weights, because
                the copies of an embedder in the blocks differ.
        """
        # Our keys, or those of diffusers.
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        weights = self.state_dict()
        if layout == "own":
            return weights
        if layout == "diffusers":
            return {key.removeprefix("network."): value for key, value in weights.items()}

        # The original's.
        public = {"pos_embed": self._positions}
        for name, keys in self._originals().items():
            values = [weights[key] for key in keys]
            if ".qkv." in name:
                public[name] = torch.cat(values)
                continue
            if not all(torch.equal(value, values[0]) for value in values):
                raise ValueError(
                    f"the blocks' copies of {name} differ; the original layout has one, "
                    "choose diffusers"
                )
            public[name] = values[0]
        return public

    def _originals(self) -> dict[str, list[str]]:
        """Return our keys for each original one: one, or q, k and v, or a copy in each block."""
        keys: dict[str, list[str]] = {}
        for key in self.state_dict():
            name = key
            for pattern, original in SPELLINGS:
                name = re.sub(pattern, original, name)
            keys.setdefault(name, []).append(key)
        return keys

    @property
    def _positions(self) -> Tensor:
        return self.network.pos_embed.pos_embed

    def _require_positions(self, table: Tensor) -> None:
        """Raise a ValueError unless a file's table of positions is ours."""
        positions = self._positions
        equal = table.shape == positions.shape and torch.allclose(
            table.to(positions), positions, rtol=0, atol=1e-5
        )
        if not equal:
            raise ValueError(
                f"the file's pos_embed {shape(table)} is not the fixed table {shape(positions)} of "
                "this network; choose the model of the file's image size"
            )


class Frequencies(nn.Module):
    """The embedding of a clock: cos, then sin, of clock 10000^(-i / 128), i = 0, ..., 127."""

    def forward(self, clock: Tensor) -> Tensor:
        """Return the embedding (M, 256) of a clock (M,), in float64."""
        exponent = torch.arange(128, dtype=torch.float64, device=clock.device) / 128
        phase = clock.double()[:, None] * torch.exp(-math.log(10000) * exponent)
        return torch.cat([phase.cos(), phase.sin()], dim=1)
