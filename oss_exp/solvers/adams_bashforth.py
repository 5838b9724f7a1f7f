"""Adams-Bashforth methods on the velocity, exact for any spacing of the times."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.solvers.base import LinearMultistep
from oss_exp.solvers.lagrange import integral_weights


@dataclass(frozen=True)
class AdamsBashforth(LinearMultistep):
    """x + the integral from t to t' of the polynomial through the last `order` velocities.

    The velocity is regular at t = 1 and t = 0, so neither end needs a lower order
    (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, chapter
    III.1).

    Args:
        order: 1 to 4.
    """

    prediction = "v"

    order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(at_least=1, at_most=4, order=self.order)

    def higher_order(self, times: Sequence[Tensor], t_next: Tensor) -> list[Tensor]:
        return [torch.ones_like(t_next), *integral_weights(times, t_next)]
