"""GS, the generalized solver: DPM-Solver++ with learned times and differences (GAS of 2025, without its adversary).

Legend: K steps, P vectors of fitted steps: x, noise, mean, predictions of x0, newest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from oss_exp.schedule import StepSchedule
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.stepsize.baselines.gradient import (
    GradientDescent,
    Student,
    gap_logits,
    learned_times,
    times_from,
)
from oss_exp.stepsize.problem import Problem
from oss_exp.stepsize.solver_weights import difference, step_weights


@dataclass(frozen=True, kw_only=True)
class GS(GradientDescent):
    """Learns the times of DPM-Solver++ of order 3, differences to its weights, and the times that the network is told.

    The difference is over the state, the noise, the mean and all predictions so far; it first makes the steps those of
    `init`. The times that the network is told begin as the solver's, and all but the first are learned apart. The
    paper has 1,400 samples, 10,000 iterations and LPIPS; here the search's samples, `iterations` and distance count.
    """

    def parameters(self, problem: Problem, steps: StepSchedule) -> list[Tensor]:
        logits = gap_logits(steps).to(problem.noise.device)
        told = (-steps.times.diff()).log().to(logits)
        return [
            logits,
            told,
            difference(problem, steps, self._base(problem, learned_times(steps, logits))),
        ]

    def student(
        self, problem: Problem, steps: StepSchedule, parameters: Sequence[Tensor]
    ) -> Student:
        logits, told, change = parameters
        times = learned_times(steps, logits)
        return Student(times_from(told, times[0]), self._base(problem, times) + change)

    @staticmethod
    def _base(problem: Problem, times: Tensor) -> Tensor:
        return step_weights(DPMSolverPP(3, lower_order_final=True), times, problem.velocity.mix)
