"""BNS, bespoke non-stationary solvers: all times and all weights by gradient (Shaul et al. 2024, arXiv 2403.01329).

Legend: K steps, P vectors of fitted steps: x, noise, mean, predictions of x0, newest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from oss_exp.schedule import StepSchedule
from oss_exp.solvers.euler import Euler
from oss_exp.stepsize.baselines.gradient import GradientDescent, Student, gap_logits, learned_times
from oss_exp.stepsize.problem import Problem
from oss_exp.stepsize.solver_weights import difference, first_parts, over_basis, solver_sums


@dataclass(frozen=True, kw_only=True)
class BNS(GradientDescent):
    """Learns the times, and each step's weights over the noise, the mean and all predictions so far, for PSNR.

    The weights are those of Euler steps between the times, which they follow, and a learned difference, which first
    makes the steps those of `init`, be they its solver's or fitted ones. Under guidance each output of a call has
    a weight of its own. Not taken over: a larger noise for strong guidance.
    """

    def parameters(self, problem: Problem, steps: StepSchedule) -> list[Tensor]:
        logits = gap_logits(steps).to(problem.noise.device)
        return [
            logits,
            difference(problem, steps, self._euler(problem, steps, learned_times(steps, logits))),
        ]

    def student(
        self, problem: Problem, steps: StepSchedule, parameters: Sequence[Tensor]
    ) -> Student:
        logits, change = parameters
        times = learned_times(steps, logits)
        return Student(times, self._euler(problem, steps, times) + change)

    @staticmethod
    def _euler(problem: Problem, steps: StepSchedule, times: Tensor) -> Tensor:
        return over_basis(
            solver_sums(Euler(), times), problem.velocity.mix, first_parts(steps, times[0])
        )
