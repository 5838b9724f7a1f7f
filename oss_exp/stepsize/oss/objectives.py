"""Objectives: what the samples' costs become before the minimum over parents is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from oss_exp.checks import require_choice
from oss_exp.stepsize.problem import Collective

Mean = Literal["mean", "log_mean"]
COST_FLOOR = 1e-15  # below the rounding of the inner products: -inf must not decide a mean of logarithms


class Objective(Protocol):
    """What the samples' costs (..., B) become before the minimum is taken: (..., B), or (..., 1) over all ranks."""

    def __call__(self, cost: Tensor, collective: Collective) -> Tensor: ...


class PerSample:
    """Every sample for itself."""

    def __call__(self, cost: Tensor, collective: Collective) -> Tensor:
        return cost


@dataclass(frozen=True)
class Shared:
    """All samples of all ranks together: the mean cost, or the mean log cost, which is PSNR.

    Returned as sums: they are least where the means are, and need no count from the other ranks.
    """

    objective: Mean

    def __post_init__(self) -> None:
        require_choice(get_args(Mean), objective=self.objective)

    def __call__(self, cost: Tensor, collective: Collective) -> Tensor:
        if self.objective == "log_mean":
            cost = cost.clamp(min=COST_FLOOR).log()
        return collective.sum(cost.sum(-1, keepdim=True))
