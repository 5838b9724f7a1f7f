"""Use FLUX's transformer (Black Forest Labs 2024) as the backbone of small networks of prompts.

The network's clock is canonical time, and it predicts v.
Shapes: M rows, P prompts, L tokens, D features.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from oss_exp.checks import require_range
from oss_exp.models.checkpoints.weights import xavier
from oss_exp.models.text.prompted import PromptedBackbone


class PromptedFlux(PromptedBackbone):
    """A FluxTransformer2DModel of diffusers with the encodings of its prompts.

    Args:
        network: The transformer.
        guidance: Guidance that a distilled network gets as an input; None if it has
            none.
        patch: Height and width of a token in latents.
        tables: Encodings of the prompts, the last row for none: `pooled` (P + 1, D) and
            `text` (P + 1, L, D).
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
        self.guidance = guidance
        self.patch = patch
        network.time_text_embed.register_forward_pre_hook(_exact)

    def initialise(self) -> None:
        """Set DiT's initial weights (arXiv 2212.09748, section 3.2): each block is the identity."""
        zero = ("proj_out.weight", *(f"{layer}.weight" for layer in self.adaptive_norms[:-1]))
        self.network.apply(xavier)
        for name, parameter in self.network.named_parameters():
            if name == zero[0] or name.endswith(zero[1:]):  # not the clock's embedding
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, clock: Tensor, prompts: Tensor) -> Tensor:
        """Return v (M, C, h, w) at x (M, C, h, w).

        Args:
            x: Latents (M, C, h, w).
            clock: Canonical times (M,).
            prompts: Indices of prompts (M,), -1 for none.
        """
        text = self.text[prompts]
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        places = [torch.arange(count, device=x.device) for count in (1, rows, columns)]

        # Time, and guidance where it is an input.
        times = [1000 * clock]
        if self.guidance is not None:
            times.append(torch.full_like(clock, 1000 * self.guidance))

        tokens = self.network(
            hidden_states=pixel_unshuffle(x, self.patch).flatten(2).mT,
            encoder_hidden_states=text,
            pooled_projections=(*times, self.pooled[prompts]),  # see _exact
            timestep=clock,
            img_ids=torch.cartesian_prod(*places),
            txt_ids=torch.zeros(text.shape[1], 3, dtype=torch.long, device=x.device),
        ).sample
        return pixel_shuffle(tokens.mT.unflatten(2, (rows, columns)), self.patch)


def _exact(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Replace all arguments by the last one, which holds them unrounded.

    Before this module, diffusers rounds time and guidance to the dtype of the weights.
    In bfloat16 these are multiples of 0.004 near t = 1, more than a step there of a
    shifted grid of 100.
    """
    return arguments[-1]
