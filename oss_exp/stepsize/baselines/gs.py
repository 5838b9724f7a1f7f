"""GS, the generalized solver: DPM-Solver++ with learned times and differences to its weights.

It is GAS of 2025 without the adversarial loss.

Legend: K steps, P basis vectors of fitted steps: x, noise, mean, predictions of x0,
newest first.
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
    """Learns times and weights of DPM-Solver++ of order 3, and the network's times.

    Its weights get learned differences, over the state, the noise, the mean and all
    predictions so far. At first they make the steps those of `init`. The times that the
    network receives begin as the solver's, and all but the first are learned apart from
    them. The paper has 1,400 samples, 10,000 iterations and LPIPS; this has the
    search's samples, `iterations` and distance.
    """

    def parameters(self, problem: Problem, steps: StepSchedule) -> list[Tensor]:
        logits = gap_logits(steps).to(problem.noise.device)
        network_logits = (-steps.times.diff()).log().to(logits)
        base = self._base(problem, learned_times(steps, logits))
        return [logits, network_logits, difference(problem, steps, base)]

    def student(
        self, problem: Problem, steps: StepSchedule, parameters: Sequence[Tensor]
    ) -> Student:
        logits, network_logits, change = parameters
        times = learned_times(steps, logits)
        weights = self._base(problem, times) + change
        return Student(times_from(network_logits, times[0]), weights)

    @staticmethod
    def _base(problem: Problem, times: Tensor) -> Tensor:
        """Return the weights (K, P) of DPM-Solver++ between times (K+1,)."""
        return step_weights(DPMSolverPP(3, lower_order_final=True), times, problem.velocity.mix)
