"""Classifier-free guidance around any conditional network.

Legend: B samples, M rows (any multiple of B), *E event dims.
"""

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
    """The guided velocity v(x | y) + (scale - 1) (v(x | y) - v(x)).

    Source: Ho & Salimans 2022, arXiv 2207.12598; the interval is from Kynkaanniemi et al. 2024,
    arXiv 2404.07724.

    Args:
        scale: 1 switches guidance off.
        channels: Guide only this many channels, as DiT guides 3 of its 4 latent ones. None for
            all.
        interval: [low, high], the canonical times that are guided. Elsewhere the conditional
            output stands alone, and costs one network row instead of two. None for all.
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
            # A plain list can be written into step schedules.
            object.__setattr__(self, "interval", ends)

    def bind(
        self,
        network: Callable[[Tensor, Tensor, Tensor], Tensor],
        condition: Tensor | None,
        micro_batch: int,
    ) -> BoundVelocity:
        """Bind a network to its condition and this guidance.

        Args:
            network: Maps x (M, *E), t (M,) and classes (M,), NO_CLASS for none, to v (M, *E).
            condition: Classes (B,), or None.
            micro_batch: Number of network rows evaluated at a time.

        Raises:
            ValueError: If there is guidance but no condition.
        """
        if condition is None:
            if self.scale != 1:
                raise ValueError(
                    f"model.guidance.scale={self.scale} needs class labels; "
                    "set data.classes, or scale 1"
                )
            return BoundVelocity(lambda x, t, _: network(x, t, _none(t)), None, micro_batch)
        if self.scale == 1:
            return BoundVelocity(network, condition, micro_batch)
        low, high = self.interval or (0.0, 1.0)

        def both(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            """Return the conditional and the unconditional velocity, (M, 2, *E)."""
            # One call for all rows, those within the interval twice. Finding them waits for a GPU.
            guided = slice(None)
            if self.interval is not None:
                guided = ((t >= low) & (t <= high)).nonzero()[:, 0]
            rows = torch.cat([x, x[guided]])
            classes = torch.cat([y, _none(t[guided])])
            v = network(rows, torch.cat([t, t[guided]]), classes)

            # Where nothing is guided, both are the conditional one.
            conditional = v[: len(x)]
            unconditional = conditional.clone()
            unconditional[guided, : self.channels] = v[len(x) :, : self.channels]
            return torch.stack([conditional, unconditional], dim=1)

        mix = (self.scale, 1 - self.scale)
        pairs = max(1, micro_batch // 2)
        return BoundVelocity(both, condition, pairs, mix, mixed_within=(low, high))


UNGUIDED = Guidance()


def _none(like: Tensor) -> Tensor:
    """Return NO_CLASS for every row."""
    return torch.full((len(like),), NO_CLASS, device=like.device)
