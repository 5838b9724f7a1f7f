"""DiT-XL/2 and its kin as they are published (Peebles & Xie 2022, arXiv 2212.09748): a file of theirs or of diffusers.

The network is diffusers', except where that differs from what was trained: its frequencies (i / 127 for i / 128) and
one norm's epsilon (1e-5 for 1e-6).
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
SPELLINGS = (  # ours -> the original's, one after the other; ours are diffusers' after "network."
    (r"^network\.", ""),
    (
        r"^transformer_blocks\.\d+\.norm1\.emb\.",
        "",
    ),  # one embedder in the original, a copy in each block of ours
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
    """x (M, C, h, w), clock (M,) in DDPM indices, classes (M,), -1 for none -> eps (M, C, h, w).

    The public networks give 2 C channels; the second half, the learned variance, is not needed for an ODE.
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
        self.network.out_channels = 2 * channels
        self.network.proj_out_2 = nn.Linear(
            self.network.inner_dim, patch**2 * self.network.out_channels
        )
        for block in self.network.transformer_blocks:
            block.norm1.emb.time_proj = Frequencies()

    def forward(self, x: Tensor, clock: Tensor, classes: Tensor) -> Tensor:
        return super().forward(x, clock, classes).chunk(2, dim=1)[0]

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors in any of LAYOUTS -> by our keys. What we have no name for stays as it is, to be refused.

        The position table is fixed; ValueError where the file's is of another size.
        """
        left = dict(tensors)
        for name in ("pos_embed", "pos_embed.pos_embed"):
            if name in left:
                self._require_positions(left.pop(name))
        if "x_embedder.proj.weight" not in left:
            return {
                key if key.startswith("network.") else f"network.{key}": value
                for key, value in left.items()
            }
        own = {}
        for name, keys in self._originals().items():
            if name in left:
                value = left.pop(name)
                own |= zip(
                    keys,
                    value.tensor_split(3) if ".qkv." in name else [value] * len(keys),
                    strict=True,
                )
        return own | left

    def to_public(self, layout: str) -> dict[str, Tensor]:
        """The weights in one of LAYOUTS. ValueError where `original` cannot say them: the blocks' embedders differ."""
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        own = self.state_dict()
        if layout == "own":
            return own
        if layout == "diffusers":
            return {key.removeprefix("network."): value for key, value in own.items()}
        public = {"pos_embed": self._positions}
        for name, keys in self._originals().items():
            values = [own[key] for key in keys]
            if ".qkv." not in name and not all(torch.equal(value, values[0]) for value in values):
                raise ValueError(
                    f"the blocks' copies of {name} differ; the original layout has one, choose diffusers"
                )
            public[name] = torch.cat(values) if ".qkv." in name else values[0]
        return public

    def _originals(self) -> dict[str, list[str]]:
        """The original's name -> our keys for it: one, or q, k and v, or a copy in each block."""
        keys: dict[str, list[str]] = {}
        for key in self.state_dict():
            name = key
            for ours, theirs in SPELLINGS:
                name = re.sub(ours, theirs, name)
            keys.setdefault(name, []).append(key)
        return keys

    @property
    def _positions(self) -> Tensor:
        return self.network.pos_embed.pos_embed

    def _require_positions(self, table: Tensor) -> None:
        own = self._positions
        if table.shape != own.shape or not torch.allclose(table.to(own), own, rtol=0, atol=1e-5):
            raise ValueError(
                f"the file's pos_embed {shape(table)} is not the fixed table {shape(own)} of this network; "
                "choose the model of the file's image size"
            )


class Frequencies(nn.Module):
    """clock (M,) -> (M, 256) float64: cos, then sin, of clock 10000^(-i / 128)."""

    def forward(self, clock: Tensor) -> Tensor:
        exponent = torch.arange(128, dtype=torch.float64, device=clock.device) / 128
        phase = clock.double()[:, None] * torch.exp(-math.log(10000) * exponent)
        return torch.cat([phase.cos(), phase.sin()], dim=1)
