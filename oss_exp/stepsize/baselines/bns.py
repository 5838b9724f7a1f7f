"""BNS, bespoke non-stationary solvers (Shaul et al. 2024, arXiv 2403.01329).

All times and all weights of the steps are learned by gradient descent.

Legend: K steps, P basis vectors of fitted steps: x, noise, mean, predictions of x0,
newest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from oss_exp.schedule import StepSchedule
from oss_exp.solvers.euler import Euler
from oss_exp.solvers.sums import solver_sums
from oss_exp.stepsize.baselines.gradient import GradientDescent, Student, gap_logits, learned_times
from oss_exp.stepsize.problem import Problem
from oss_exp.stepsize.solver_weights import difference, first_parts, over_basis


@dataclass(frozen=True, kw_only=True)
class BNS(GradientDescent):
    """Learns the times, and each step's weights over the noise, the mean and all predictions.

    The weights are those of Euler steps between the learned times, plus a learned
    difference. At first the difference makes the steps those of `init`, whether they
    are its solver's or fitted. Under guidance each output of a call has its own weight.
    The paper's larger noise for strong guidance is not implemented.
    """

    def parameters(self, problem: Problem, steps: StepSchedule) -> list[Tensor]:
        logits = gap_logits(steps).to(problem.noise.device)
        euler = self._euler(problem, steps, learned_times(steps, logits))
        return [logits, difference(problem, steps, euler)]

    def student(
        self, problem: Problem, steps: StepSchedule, parameters: Sequence[Tensor]
    ) -> Student:
        logits, change = parameters
        times = learned_times(steps, logits)
        return Student(times, self._euler(problem, steps, times) + change)

    @staticmethod
    def _euler(problem: Problem, steps: StepSchedule, times: Tensor) -> Tensor:
        """Return the weights (K, P) of Euler steps between times (K+1,)."""
        sums = solver_sums(Euler(), times)
        return over_basis(sums, problem.velocity.mix, first_parts(steps, times[0]))
