"""Objectives: what the samples' costs become before a minimum over actions is taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from oss_exp.checks import require_choice
from oss_exp.stepsize.problem import Collective

Mean = Literal["mean", "root_mean", "log_mean"]

# Below the rounding of the inner products: -inf must not decide a mean of logarithms.
COST_FLOOR = 1e-15


def transformed(cost: Tensor, objective: Mean) -> Tensor:
    """Return what an objective takes the mean of, for costs (squared errors) of any shape."""
    if objective == "root_mean":
        return cost.clamp(min=COST_FLOOR).sqrt()
    if objective == "log_mean":
        return cost.clamp(min=COST_FLOOR).log()
    return cost


def restored(value: float, objective: Mean) -> float:
    """Return the cost of a value of `transformed`."""
    if objective == "root_mean":
        return value**2
    return math.exp(value) if objective == "log_mean" else value


def slope(cost: Tensor, objective: Mean) -> Tensor:
    """Return the derivative of `transformed`, up to a factor of the objective."""
    if objective == "root_mean":
        return cost.clamp(min=COST_FLOOR).rsqrt()
    if objective == "log_mean":
        return 1 / cost.clamp(min=COST_FLOOR)
    return torch.ones_like(cost)


class Objective(Protocol):
    """A reduction of the samples' costs."""

    def __call__(self, cost: Tensor, collective: Collective) -> Tensor:
        """Return (..., B) or, over all ranks, (..., 1) for the samples' costs (..., B)."""
        ...


class PerSample:
    """The objective of one schedule for each sample: the costs as they are."""

    def __call__(self, cost: Tensor, collective: Collective) -> Tensor:
        return cost


@dataclass(frozen=True, eq=False)
class Shared:
    """The objective of one schedule for all samples of all ranks.

    It returns sums. They are least where the means are, and need no count from other
    ranks.

    Args:
        objective: "mean" is the mean cost, "root_mean" the mean of its root, which is
            RMSE, and "log_mean" the mean logarithmic cost, which is PSNR. They weigh an
            unusual sample of a large cost less and less.
        rows: (B,) bool, the samples that count; None means all. The others are run with
            them and can judge the schedule that these make.
    """

    objective: Mean
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        require_choice(get_args(Mean), objective=self.objective)

    def __call__(self, cost: Tensor, collective: Collective) -> Tensor:
        cost = cost if self.rows is None else cost[..., self.rows]
        return collective.sum(transformed(cost, self.objective).sum(-1, keepdim=True))

    def emphasis(self, cost: Tensor) -> Tensor:
        """Return weights (B,) such that a lower weighted mean of costs lowers the objective.

        This holds near the given costs (B,): root and logarithm are concave, so they lie below
        their tangents there.
        """
        weights = slope(cost, self.objective)
        return weights if self.rows is None else weights * self.rows
