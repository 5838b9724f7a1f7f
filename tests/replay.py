"""Run the schedules of a search by the sampling loop alone, to compare with the search's tables.

Legend: B samples, J targets of a round, k steps, b = B or 1 (the same for all samples).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from oss_exp.schedule import FittedSteps, SolverSteps, StepSchedule
from oss_exp.solvers import LinearMultistep, sample, walk
from oss_exp.stepsize import Problem
from oss_exp.stepsize.base import student_start
from oss_exp.stepsize.oss.coefficients import FittedPath
from oss_exp.stepsize.oss.recursion import SolverPath, Stage
from oss_exp.stepsize.problem import Collective


def schedule(problem: Problem, path: SolverPath | FittedPath, start: str) -> StepSchedule:
    """Return the step schedule of a path of the search."""
    nodes = torch.nn.functional.pad(path.nodes.T, (0, 1), value=problem.num_nodes)
    shared = len(nodes) == 1
    steps = SolverSteps()

    if isinstance(path, FittedPath):
        steps = FittedSteps(path.weights, problem.teacher.mean)
    elif isinstance(problem.solver, LinearMultistep):
        steps = SolverSteps(path.orders[:, 0] if shared else path.orders.T)
    return StepSchedule(
        problem.grid[nodes[0] if shared else nodes],
        student_start(problem, start),
        steps,
        samples=None if shared else tuple(range(len(nodes))),
    )


def final_error(problem: Problem, steps: StepSchedule) -> Tensor:
    """Return the distance (B,) of the samples to the teacher's last state."""
    group = problem.group if steps.mean is not None else None
    x0 = sample(problem.solver, problem.velocity, problem.noise, steps, group)
    return problem.cost(x0, torch.tensor([problem.num_nodes]))


def table_paths(stages: Sequence[Stage]) -> tuple[Tensor, Tensor]:
    """Return nodes (r+1, J, b) and orders (r, J, b) of the best path to each last target."""
    last = stages[-1]
    position = torch.arange(len(last.targets))[:, None]
    nodes = [last.targets]
    orders = []

    for step in reversed(stages):
        width = max(step.parent.shape[1], position.shape[1])
        position = position.expand(-1, width)
        orders.append(step.orders.expand(-1, width).gather(0, position))
        position = step.parent.expand(-1, width).gather(0, position)
        nodes.append(step.sources.expand(-1, width).gather(0, position))
    node_table = torch.stack(torch.broadcast_tensors(*reversed(nodes)))
    order_table = torch.stack(torch.broadcast_tensors(*reversed(orders)))
    return node_table, order_table


def table_costs(problem: Problem, stages: Sequence[Stage], start: str) -> Tensor:
    """Return the cost (J, B) of sampling the best path to each target; undefined without a path."""
    count = len(problem.noise)
    nodes, orders = (table.expand(-1, -1, count) for table in table_paths(stages))
    num_targets = nodes.shape[1]

    # The start of every path.
    times = problem.grid[nodes].flatten(1)
    x = problem.noise.repeat(num_targets, 1)
    if start == "analytic":
        ratio = times[0][:, None] / problem.grid[0]
        mean = problem.teacher.mean[problem.group].to(x)
        x = ratio * x + (1 - ratio) * mean.repeat(num_targets, 1)

    # All paths in one batch.
    *_, last = walk(problem.solver, problem.velocity, x, times, list(orders.flatten(1)))
    final = last.x.unflatten(0, (-1, count))
    costs = [problem.cost(x, target) for x, target in zip(final, nodes[-1], strict=True)]
    return torch.stack(costs)


def assert_tables_replay(problem: Problem, stages: Sequence[Stage], start: str) -> None:
    """Assert that every entry of every round's table is the cost of sampling its path."""
    for r in range(1, len(stages) + 1):
        alive = stages[r - 1].cost.isfinite()
        costs = table_costs(problem, stages[:r], start)
        torch.testing.assert_close(costs[alive], stages[r - 1].cost[alive], rtol=1e-9, atol=1e-14)


class SameSamplesTwice(Collective):
    """Two ranks that have the same samples: sums double, means stay."""

    def sum(self, tensor: Tensor) -> Tensor:
        return 2 * tensor


class RowCounter:
    """A network function that counts the rows that it is called with."""

    def __init__(self, fn: Callable[..., Tensor]):
        self.fn = fn
        self.rows = 0

    def __call__(self, x: Tensor, t: Tensor, *condition: Tensor | None) -> Tensor:
        self.rows += len(x)
        return self.fn(x, t, *condition)
