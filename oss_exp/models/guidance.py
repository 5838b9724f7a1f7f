"""Classifier-free guidance around any conditional network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.velocity import BoundVelocity

NO_CLASS = -1


@dataclass(frozen=True)
class Guidance:
    """v(x | y) + (scale - 1) (v(x | y) - v(x)) (Ho & Salimans 2022, arXiv 2207.12598).

    scale:    1 is none.
    channels: guide only the first so many, as DiT guides 3 of its 4 latent ones; null: all.
    interval: [low, high], the canonical times that are guided; elsewhere the conditional answer stands alone and costs
              one network row instead of two (Kynkaanniemi et al. 2024, arXiv 2404.07724); null: all.
    """

    scale: float = 1.0
    channels: int | None = None
    interval: Sequence[float] | None = None

    def __post_init__(self) -> None:
        require_range(at_least=-1000, at_most=1000, scale=self.scale)
        require_range(at_least=1, channels=self.channels)
        if self.interval is not None:
            ends = list(self.interval)
            if len(ends) != 2 or not 0 <= ends[0] < ends[1] <= 1:
                raise ValueError(
                    f"interval must be [low, high] within [0, 1], got {self.interval!r}"
                )
            object.__setattr__(
                self, "interval", ends
            )  # a plain list: it is written into step schedules

    def bind(
        self,
        network: Callable[[Tensor, Tensor, Tensor], Tensor],
        condition: Tensor | None,
        micro_batch: int,
    ) -> BoundVelocity:
        """network(x (M, *E), t (M,), classes (M,), NO_CLASS for none) -> v; condition (B,) classes, or None."""
        if condition is None:
            if self.scale != 1:
                raise ValueError(
                    f"model.guidance.scale={self.scale} needs class labels; set data.classes, or scale 1"
                )
            return BoundVelocity(lambda x, t, _: network(x, t, _none(t)), None, micro_batch)
        if self.scale == 1:
            return BoundVelocity(network, condition, micro_batch)
        low, high = self.interval or (0.0, 1.0)

        def both(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            rows = ((t >= low) & (t <= high)).nonzero()[:, 0]
            v = network(
                torch.cat([x, x[rows]]), torch.cat([t, t[rows]]), torch.cat([y, _none(rows)])
            )
            conditional, free = v[: len(x)], v[: len(x)].clone()
            free[rows, : self.channels] = v[len(x) :, : self.channels]
            return torch.stack([conditional, free], dim=1)

        mix = (self.scale, 1 - self.scale)
        return BoundVelocity(
            both, condition, max(1, micro_batch // 2), mix, mixed_within=(low, high)
        )


UNGUIDED = Guidance()


def _none(like: Tensor) -> Tensor:
    return torch.full((len(like),), NO_CLASS, device=like.device)
