"""FLUX's rectified-flow transformer (Black Forest Labs 2024) as the backbone of small networks of prompts.

The network's clock is canonical time itself, and it gives v. Legend: M rows, P prompts, L tokens, D features.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from oss_exp.checks import require_range
from oss_exp.models.text.prompted import PromptedBackbone


class PromptedFlux(PromptedBackbone):
    """diffusers.FluxTransformer2DModel(x (M, C, h, w), clock (M,), prompts (M,), -1 for none) -> v (M, C, h, w).

    A token is patch x patch latents of all channels. tables: `pooled` (P + 1, D) and `text` (P + 1, L, D).
    """

    adaptive_norms: ClassVar[tuple[str, ...]] = (
        "norm1.linear",
        "norm1_context.linear",
        "norm.linear",
        "norm_out.linear",
        "timestep_embedder",
    )

    def __init__(self, network: nn.Module, guidance: float | None, patch: int, **tables: Tensor):
        super().__init__(network, **tables)
        require_range(at_least=1, patch=patch)
        require_range(at_least=0, at_most=1000, guidance=guidance)
        self.guidance, self.patch = guidance, patch
        network.time_text_embed.register_forward_pre_hook(_exact)

    def forward(self, x: Tensor, clock: Tensor, prompts: Tensor) -> Tensor:
        text, rows, columns = self.text[prompts], x.shape[2] // self.patch, x.shape[3] // self.patch
        places = [torch.arange(count, device=x.device) for count in (1, rows, columns)]
        times = [1000 * clock] + (
            [] if self.guidance is None else [torch.full_like(clock, 1000 * self.guidance)]
        )
        tokens = self.network(
            hidden_states=pixel_unshuffle(x, self.patch).flatten(2).mT,
            encoder_hidden_states=text,
            pooled_projections=(*times, self.pooled[prompts]),  # whole to _exact
            timestep=clock,
            img_ids=torch.cartesian_prod(*places),
            txt_ids=torch.zeros(text.shape[1], 3, dtype=torch.long, device=x.device),
        ).sample
        return pixel_shuffle(tokens.mT.unflatten(2, (rows, columns)), self.patch)


def _exact(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The last argument in place of all: diffusers rounds time and guidance to the weights' dtype on the way here.

    In bfloat16 that is to multiples of 0.004 near t = 1, more than a step there of a shifted grid of 100.
    """
    return arguments[-1]
