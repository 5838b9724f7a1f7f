"""DyWeight: steps whose learned weights also say how far the clock moves (2026).

Legend: K steps, H calls that a step remembers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.schedule import StepSchedule
from oss_exp.solvers.ipndm import UNIFORM
from oss_exp.stepsize.baselines.gradient import GradientDescent, Student
from oss_exp.stepsize.problem import Problem
from oss_exp.stepsize.solver_weights import first_parts, over_basis

# Least and greatest share of a time that the next one is: times decrease whatever is learned.
NEXT_TIME = (0.01, 0.99)


@dataclass(frozen=True, kw_only=True)
class DyWeight(GradientDescent):
    """Learns weights of each step's last directions, and scales of the network's times.

    The weights may have any sum. A step to the next time of `init` goes along the
    weighted directions. The clock moves by the same way times the sum of the weights.
    The network receives the clock times a learned scale, and sees the state as noise of
    that level. The clock is sigma; it is flow time where the noise is pure and sigma is
    infinite, as in the paper's form for FLUX. The weights begin as iPNDM's. The paper's
    times are those of init=edm. Its analytical first direction is not implemented.

    Args:
        history: H, the directions that a step weighs.
    """

    history: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(at_least=1, history=self.history)

    def parameters(self, problem: Problem, steps: StepSchedule) -> list[Tensor]:
        rules = ((1.0,), *UNIFORM.values())
        weights = torch.zeros(
            steps.num_steps, self.history, dtype=torch.float64, device=problem.noise.device
        )
        for step, row in enumerate(weights):
            rule = rules[min(step, self.history - 1, len(UNIFORM))]
            row[: len(rule)] = row.new_tensor(rule)
        return [weights, weights.new_ones(steps.num_steps - 1)]

    def student(
        self, problem: Problem, steps: StepSchedule, parameters: Sequence[Tensor]
    ) -> Student:
        weights, scales = parameters
        nodes = steps.times.to(weights)
        by_sigma = float(problem.grid[0]) < 1
        clock = nodes / (1 - nodes) if by_sigma else nodes

        # The state and the directions as sums over the first state and each call's x0.
        basis = torch.eye(steps.num_steps + 1, dtype=torch.float64, device=weights.device)
        state = basis[0] / (1 - nodes[0]) if by_sigma else basis[0]
        now = clock[0]
        network_times = [nodes[0]]
        directions: list[Tensor] = []
        rows = []
        for step in range(steps.num_steps):
            # The step, in the clock's coordinates.
            directions.insert(0, (state - basis[1 + step]) / now)
            row = weights[step, : len(directions)]
            way = clock[step + 1] - now
            state = state + way * sum(w * d for w, d in zip(row, directions, strict=False))
            if step + 1 == steps.num_steps:
                rows.append(state)
                break

            # The clock, and the time that the network receives.
            now = _between(now + way * row.sum(), now)
            level = scales[step] * now
            t = level / (1 + level) if by_sigma else level
            network_times.append(_between(t, network_times[-1]))
            rows.append(state * (1 - network_times[-1]) if by_sigma else state)

        times = torch.stack([*network_times, nodes[-1]])
        sums = torch.stack(rows)
        return Student(times, over_basis(sums, problem.velocity.mix, first_parts(steps, nodes[0])))


def _between(time: Tensor, last: Tensor) -> Tensor:
    """Return a time in the range that may follow the last one."""
    return time.clamp(NEXT_TIME[0] * last, NEXT_TIME[1] * last)
