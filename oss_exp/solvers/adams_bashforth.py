"""Adams-Bashforth methods on the velocity, exact for any spacing of the times."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_exp.solvers.base import LinearMultistep


@dataclass(frozen=True)
class AdamsBashforth(LinearMultistep):
    """x + integral from t to t' of the polynomial through the last `order` velocities (Hairer et al., ch. III.1).

    Warm-up: as many velocities as there are, so the first step is Euler's. The velocity is regular at t = 1 and t = 0,
    so neither end needs care.
    """

    order: int

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise ValueError(f"order must be 1, 2, 3 or 4, got {self.order!r}")

    def coefficients(self, times: Sequence[Tensor], t_next: Tensor) -> tuple[Tensor, list[Tensor]]:
        step = t_next - times[0]
        nodes = [(time - times[0]) / step for time in times]  # t is 0 and t' is 1
        weights = []
        for h, node in enumerate(nodes):
            # Lagrange's basis polynomial of this node, as coefficients of 1, u, u^2, ...
            basis = [torch.ones_like(step)]
            for other in nodes[:h] + nodes[h + 1 :]:
                shifted = [torch.zeros_like(step), *basis]
                basis = [(up - other * low) / (node - other) for up, low in zip(shifted, [*basis, 0.0], strict=True)]
            weights.append(step * sum(c / (power + 1) for power, c in enumerate(basis)))
        return torch.ones_like(t_next), weights
