"""LD3: times learned by gradient descent through the solver (Tong et al. 2025, arXiv 2405.15506).

Legend: K steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.noise import DDIMSchedule
from oss_exp.schedule import FittedSteps, StepSchedule
from oss_exp.solvers.sums import solver_sums
from oss_exp.stepsize.base import StepsizeStrategy
from oss_exp.stepsize.baselines.closed_form import ClosedForm
from oss_exp.stepsize.baselines.gradient import (
    GradientDescent,
    Student,
    gap_logits,
    learned_times,
    times_from,
)
from oss_exp.stepsize.oss.objectives import Mean
from oss_exp.stepsize.problem import Problem
from oss_exp.stepsize.solver_weights import first_parts, over_basis


@dataclass(frozen=True, kw_only=True)
class LD3(GradientDescent):
    """Learns the times of the solver's steps, by RMSprop on the logits of their gaps.

    This is the descent of the released code. The paper's noises that move in a small
    ball are not implemented.

    Args:
        init: plans the schedule to begin with; its steps must be a solver's.
        momentum: that of RMSprop.
        decoupled: learn the times that the network receives apart from the solver's,
            all but the first. The solver then does not step between the network's
            times, so the result is written as fitted steps, which a list of sigmas
            cannot hold.
    """

    init: StepsizeStrategy = field(
        default_factory=lambda: ClosedForm(DDIMSchedule()), kw_only=False
    )
    learning_rate: float = 0.02
    objective: Mean = "mean"
    momentum: float = 0.9
    decoupled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(at_least=0, below=1, momentum=self.momentum)

    def parameters(self, problem: Problem, steps: StepSchedule) -> list[Tensor]:
        if isinstance(steps.steps, FittedSteps):
            raise ValueError("ld3.init must step with the solver")
        logits = gap_logits(steps).to(problem.noise.device)
        if not self.decoupled:
            return [logits]
        return [logits, (-steps.times.diff()).log().to(logits)]

    def student(
        self, problem: Problem, steps: StepSchedule, parameters: Sequence[Tensor]
    ) -> Student:
        times = learned_times(steps, parameters[0])
        if len(parameters) == 1:
            return Student(times)
        orders = None if steps.orders is None else list(steps.orders)
        sums = solver_sums(problem.solver, times, orders)
        weights = over_basis(sums, problem.velocity.mix, first_parts(steps, times[0]))
        return Student(times_from(parameters[1], times[0]), weights)

    def optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(parameters, lr=self.learning_rate, momentum=self.momentum)
