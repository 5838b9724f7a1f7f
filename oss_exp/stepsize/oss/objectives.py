"""Objectives: what the samples' costs become before the minimum over parents is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from oss_exp.stepsize.problem import Collective

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

    objective: Literal["mean", "log_mean"]

    def __post_init__(self) -> None:
        if self.objective not in ("mean", "log_mean"):
            raise ValueError(f"objective must be mean or log_mean, got {self.objective!r}")

    def __call__(self, cost: Tensor, collective: Collective) -> Tensor:
        if self.objective == "log_mean":
            cost = cost.clamp(min=COST_FLOOR).log()
        return collective.sum(cost.sum(-1, keepdim=True))
