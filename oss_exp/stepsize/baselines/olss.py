"""OLSS: least-squares coefficients on the teacher's states, along a path of equal errors (Duan et al. 2023).

"Optimal Linear Subspace Search" (arXiv 2305.14677). The state at the next node is approximated by the initial noise and
the network's answers so far, by ordinary least squares over all elements of all samples. States and answers are the
teacher's: unlike `OSSFit` it never sees how a student's errors travel, but one run of the teacher serves every K.

Legend: B samples, N+1 nodes, K steps, *E event dims. Columns: the noise, the velocities at nodes 0 .. N-1, the states
at nodes 1 .. N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from oss_exp.schedule import StepSchedule
from oss_exp.stepsize.base import check_num_steps, teacher_velocities
from oss_exp.stepsize.baselines.linear_steps import linear_steps
from oss_exp.stepsize.problem import Problem

HALVINGS = 50  # of the bound on a step's error


@dataclass(frozen=True)
class OLSS:
    """The paper's path and coefficients.

    From each node the path goes to the farthest one that is reached with an error of at most a bound, found by
    bisection over the nodes; the bound is one, by bisection too, below which K steps are no longer enough. The authors'
    network predicts noise; here its answers are velocities, for at t = 1 a prediction of noise is the noise itself.
    """

    per_sample: ClassVar[bool] = False
    baseline: ClassVar[bool] = True

    @torch.no_grad()
    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        budgets = check_num_steps(num_steps, problem.num_nodes)
        fits = LeastSquares(triangular_factor(problem), problem.num_nodes)
        return {k: self._schedule(problem, fits, fits.path(k)) for k in budgets}

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        return num_nodes - 1

    def _schedule(self, problem: Problem, fits: LeastSquares, path: list[int]) -> StepSchedule:
        nodes = [*path, problem.num_nodes]
        coefficients = torch.zeros(len(path), 1 + len(path), dtype=torch.float64)
        for step, node in enumerate(nodes[1:]):
            coefficients[step, : step + 2] = fits.weights((*path[: step + 1],), node)
        return linear_steps(
            problem, problem.grid[nodes].cpu(), coefficients[:, 0], coefficients[:, 1:]
        )


def triangular_factor(problem: Problem) -> Tensor:
    """(2N+1, 2N+1) float64 on the CPU: R of a QR decomposition of the columns, whose rows are all ranks' elements.

    Least squares on columns of R is least squares on those of the whole matrix, without the squared condition of
    inner products. It is made one sample at a time; divided so that squared lengths are means over the elements.
    """
    states, velocities = problem.teacher.states, list(teacher_velocities(problem))
    factor = problem.grid.new_zeros(0, 2 * problem.num_nodes + 1)
    for sample, noise in enumerate(problem.noise):
        columns = [noise, *(v[sample] for v in velocities), *states[1:, sample]]
        elements = torch.stack([column.flatten().double() for column in columns], dim=1)
        factor = torch.linalg.qr(torch.cat([factor, elements]), mode="r").R
    count = problem.collective.sum(factor.new_tensor(problem.noise.numel()))
    factor = torch.linalg.qr(problem.collective.gather(factor), mode="r").R
    return (factor / count.sqrt()).cpu()


class LeastSquares:
    """Coefficients and errors of steps from the columns of a triangular factor (see `triangular_factor`)."""

    def __init__(self, factor: Tensor, num_nodes: int):
        self.factor, self.num_nodes = factor, num_nodes
        self.solved = lru_cache(maxsize=None)(self._solve)

    def weights(self, path: tuple[int, ...], node: int) -> Tensor:
        """(1 + k,) over the noise and the velocities at the k nodes of the path, for the step to a later node."""
        return self.solved(path)[0][:, node - path[-1] - 1]

    def path(self, num_steps: int) -> list[int]:
        """The nodes of exactly num_steps calls."""
        best, low, high = [0], 0.0, float(self.solved((0,))[1].max())
        for _ in range(HALVINGS):
            bound = (low + high) / 2
            path = self._greedy(bound, num_steps)
            if path is None:
                low = bound
            else:
                best, high = path, bound
        while len(best) < num_steps:  # where one bound saves two calls
            best = self._halved(best)
        return best

    def _greedy(self, bound: float, num_steps: int) -> list[int] | None:
        """The nodes of the longest steps within the bound, None where these are more than num_steps."""
        path = [0]
        while len(path) <= num_steps:
            errors = self.solved((*path,))[1]
            low, high = path[-1] + 1, self.num_nodes
            while low < high:
                middle = (low + high + 1) // 2
                if errors[middle - path[-1] - 1] > bound:
                    high = middle - 1
                else:
                    low = middle
            if low == self.num_nodes:
                return path
            path.append(low)
        return None

    def _halved(self, path: list[int]) -> list[int]:
        """The path with one more node: in the middle of the step of the largest error, of those that have one."""
        ends = [*path[1:], self.num_nodes]
        errors = {
            step: float(self.solved((*path[: step + 1],))[1][end - start - 1])
            for step, (start, end) in enumerate(zip(path, ends, strict=True))
            if end - start > 1
        }
        worst = max(errors, key=errors.__getitem__)
        return sorted([*path, (path[worst] + ends[worst]) // 2])

    def _solve(self, path: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Weights (1 + k, J) and mean squared errors (J,) of the steps to all J later nodes."""
        basis = self.factor[:, [0, *(1 + node for node in path)]]
        aims = self.factor[:, self.num_nodes + 1 + path[-1] :]
        weights = torch.linalg.lstsq(basis, aims).solution
        return weights, (basis @ weights - aims).square().sum(0)
