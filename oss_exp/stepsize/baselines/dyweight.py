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

KEPT = (0.01, 0.99)  # of the last time, at least and at most: times decrease whatever is learned


@dataclass(frozen=True, kw_only=True)
class DyWeight(GradientDescent):
    """Learns the weights of each step's last `history` directions, of any sum, and scales of the times that are told.

    A step towards the next time of `init` goes along the weighted directions, and moves the clock by the sum of their
    weights of the way. The network is told the clock times a learned scale; it sees the state as noise of that level.
    The clock is sigma, or flow time where the noise is pure and sigma is infinite, as in the paper's form for FLUX. It
    begins with the weights of iPNDM. The paper's times are those of init=edm; its analytical first direction is
    not taken over.
    """

    history: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(at_least=1, history=self.history)

    def parameters(self, problem: Problem, steps: StepSchedule) -> list[Tensor]:
        weights = torch.zeros(
            steps.num_steps, self.history, dtype=torch.float64, device=problem.noise.device
        )
        for step, row in enumerate(weights):
            known = ((1.0,), *UNIFORM.values())[min(step, self.history - 1, len(UNIFORM))]
            row[: len(known)] = row.new_tensor(known)
        return [weights, weights.new_ones(steps.num_steps - 1)]

    def student(
        self, problem: Problem, steps: StepSchedule, parameters: Sequence[Tensor]
    ) -> Student:
        weights, scales = parameters
        nodes = steps.times.to(weights)
        by_sigma = float(problem.grid[0]) < 1
        clock = nodes / (1 - nodes) if by_sigma else nodes
        basis = torch.eye(steps.num_steps + 1, dtype=torch.float64, device=weights.device)

        # The state and the directions as sums over the first state and each call's x0.
        state = basis[0] / (1 - nodes[0]) if by_sigma else basis[0]
        now, told, directions, rows = clock[0], [nodes[0]], [], []
        for step in range(steps.num_steps):
            directions.insert(0, (state - basis[1 + step]) / now)
            row = weights[step, : len(directions)]
            way = clock[step + 1] - now
            state = state + way * sum(w * d for w, d in zip(row, directions, strict=False))
            if step + 1 == steps.num_steps:
                rows.append(state)
                break
            now = (now + way * row.sum()).clamp(KEPT[0] * now, KEPT[1] * now)
            level = scales[step] * now
            t = level / (1 + level) if by_sigma else level
            told.append(t.clamp(KEPT[0] * told[-1], KEPT[1] * told[-1]))
            rows.append(state * (1 - told[-1]) if by_sigma else state)

        parts = first_parts(steps, nodes[0])
        return Student(
            torch.stack([*told, nodes[-1]]),
            over_basis(torch.stack(rows), problem.velocity.mix, parts),
        )
