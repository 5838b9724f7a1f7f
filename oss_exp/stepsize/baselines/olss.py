"""OLSS: least-squares coefficients on the teacher's states, along a path of equal errors.

"Optimal Linear Subspace Search" (Duan et al. 2023, arXiv 2305.14677). The state at the
next node is approximated by the initial noise and the network's outputs so far, by
ordinary least squares over all elements of all samples. States and outputs are the
teacher's: unlike `OSSFit`, it never sees how a student's errors grow, but one run of
the teacher serves every K.

Legend: B samples, N+1 nodes, K steps, *E event dims. Columns: the noise, the velocities
at nodes 0 to N-1, the states at nodes 1 to N.
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

    From each node the path goes to the farthest one that is reached with an error of at
    most a bound, found by bisection over the nodes. The bound, also found by bisection,
    is the least for which K steps are enough. The authors' network predicts noise. Here
    its outputs are velocities, because at t = 1 a prediction of noise is the noise.
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
        """Return the schedule of a path of K nodes."""
        nodes = [*path, problem.num_nodes]
        coefficients = torch.zeros(len(path), 1 + len(path), dtype=torch.float64)
        for step, node in enumerate(nodes[1:]):
            coefficients[step, : step + 2] = fits.weights((*path[: step + 1],), node)
        times = problem.grid[nodes].cpu()
        return linear_steps(problem, times, coefficients[:, 0], coefficients[:, 1:])


def triangular_factor(problem: Problem) -> Tensor:
    """Return R of a QR decomposition of the columns, (2N+1, 2N+1) float64 on the CPU.

    The rows of the decomposed matrix are the elements of all ranks' samples. Least
    squares on columns of R is least squares on those of the whole matrix, without the
    squared condition number of inner products. R is made one sample at a time, and
    divided so that squared lengths are means over the elements.
    """
    # This rank's samples.
    states = problem.teacher.states
    velocities = list(teacher_velocities(problem))
    factor = problem.grid.new_zeros(0, 2 * problem.num_nodes + 1)
    for sample, noise in enumerate(problem.noise):
        columns = [noise]
        columns.extend(v[sample] for v in velocities)
        columns.extend(states[1:, sample])
        elements = torch.stack([column.flatten().double() for column in columns], dim=1)
        factor = torch.linalg.qr(torch.cat([factor, elements]), mode="r").R

    # All ranks.
    count = problem.collective.sum(factor.new_tensor(problem.noise.numel()))
    factor = torch.linalg.qr(problem.collective.gather(factor), mode="r").R
    return (factor / count.sqrt()).cpu()


class LeastSquares:
    """Coefficients and errors of steps, from the columns of a triangular factor.

    See `triangular_factor`.
    """

    def __init__(self, factor: Tensor, num_nodes: int):
        self.factor = factor
        self.num_nodes = num_nodes
        self.solved = lru_cache(maxsize=None)(self._solve)

    def weights(self, path: tuple[int, ...], node: int) -> Tensor:
        """Return the weights (1 + k,) of the step from the last of k nodes to a later node.

        They are over the noise and the velocities at the k nodes of the path.
        """
        weights, _ = self.solved(path)
        return weights[:, node - path[-1] - 1]

    def path(self, num_steps: int) -> list[int]:
        """Return the nodes of exactly num_steps calls."""
        _, errors = self.solved((0,))
        path = [0]
        low = 0.0
        high = float(errors.max())
        for _ in range(HALVINGS):
            bound = (low + high) / 2
            candidate = self._greedy(bound, num_steps)
            if candidate is None:
                low = bound
            else:
                path = candidate
                high = bound
        while len(path) < num_steps:  # where one bound saves two calls
            path = self._halved(path)
        return path

    def _greedy(self, bound: float, num_steps: int) -> list[int] | None:
        """Return the nodes of the longest steps within the bound, or None for too many steps."""
        path = [0]
        while len(path) <= num_steps:
            # The farthest node within the bound, by bisection.
            _, errors = self.solved((*path,))
            low = path[-1] + 1
            high = self.num_nodes
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
        """Return the path with one more node, in the middle of the step of the largest error.

        Steps between neighbours have no middle.
        """
        ends = [*path[1:], self.num_nodes]
        step_errors: dict[int, float] = {}
        for step, (start, end) in enumerate(zip(path, ends, strict=True)):
            if end - start > 1:
                _, errors = self.solved((*path[: step + 1],))
                step_errors[step] = float(errors[end - start - 1])
        worst = max(step_errors, key=step_errors.__getitem__)
        return sorted([*path, (path[worst] + ends[worst]) // 2])

    def _solve(self, path: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return weights (1 + k, J) and mean squared errors (J,) of steps to all J later nodes."""
        basis = self.factor[:, [0, *(1 + node for node in path)]]
        targets = self.factor[:, self.num_nodes + 1 + path[-1] :]
        weights = torch.linalg.lstsq(basis, targets).solution
        return weights, (basis @ weights - targets).square().sum(0)
