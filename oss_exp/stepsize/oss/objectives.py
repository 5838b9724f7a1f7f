"""Objectives: what the samples' costs become before the minimum over parents is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from oss_exp.checks import require_choice
from oss_exp.stepsize.problem import Collective

Mean = Literal["mean", "log_mean"]
COST_FLOOR = (
    1e-15  # below the rounding of the inner products: -inf must not decide a mean of logarithms
)


class Objective(Protocol):
    """What the samples' costs (..., B) become before the minimum is taken: (..., B), or (..., 1) over all ranks."""

    def __call__(self, cost: Tensor, collective: Collective) -> Tensor: ...


class PerSample:
    """Every sample for itself."""

    def __call__(self, cost: Tensor, collective: Collective) -> Tensor:
        return cost


@dataclass(frozen=True, eq=False)
class Shared:
    """All samples of all ranks together: the mean cost, or the mean log cost, which is PSNR.

    Returned as sums: they are least where the means are, and need no count from the other ranks.
    rows: (B,) bool, the samples that count; None: all. The others are run with them, and can judge what these made.
    """

    objective: Mean
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        require_choice(get_args(Mean), objective=self.objective)

    def __call__(self, cost: Tensor, collective: Collective) -> Tensor:
        cost = cost if self.rows is None else cost[..., self.rows]
        if self.objective == "log_mean":
            cost = cost.clamp(min=COST_FLOOR).log()
        return collective.sum(cost.sum(-1, keepdim=True))

    def emphasis(self, cost: Tensor) -> Tensor:
        """Return the weights (B,) with which a weighted mean of costs near these (B,) lowers the objective.

        Of a mean of logarithms: log c <= log c0 + c / c0 - 1, so that lowering sum c / c0 lowers it.
        """
        weights = (
            1 / cost.clamp(min=COST_FLOOR)
            if self.objective == "log_mean"
            else torch.ones_like(cost)
        )
        return weights if self.rows is None else weights * self.rows
