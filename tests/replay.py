"""Running what a search found by nothing but the sampling loop, to compare with what the search's tables say.

Legend: B samples, J targets of a round, k steps, b = B or 1 (the same for all samples).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oss_exp.schedule import FittedSteps, SolverSteps, StepSchedule
from oss_exp.solvers import LinearMultistep, sample, walk
from oss_exp.stepsize import Problem
from oss_exp.stepsize.base import student_start
from oss_exp.stepsize.oss.coefficients import FittedPath
from oss_exp.stepsize.oss.recursion import SolverPath, Stage


def schedule(problem: Problem, path: SolverPath | FittedPath, start: str) -> StepSchedule:
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
    """The distance (B,) to the teacher's last state."""
    group = problem.group if steps.mean is not None else None
    x0 = sample(problem.solver, problem.velocity, problem.noise, steps, group)
    return problem.cost(x0, torch.tensor([problem.num_nodes]))


def table_paths(stages: Sequence[Stage]) -> tuple[Tensor, Tensor]:
    """Nodes (r+1, J, b) and orders (r, J, b) of the best path to every target of the last of these stages."""
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
    tables = (torch.stack(torch.broadcast_tensors(*found[::-1])) for found in (nodes, orders))
    return tuple(tables)


def table_costs(problem: Problem, stages: Sequence[Stage], start: str) -> Tensor:
    """(J, B): every path to a target of the last of these stages, sampled; nonsense where there is no path."""
    count = len(problem.noise)
    nodes, orders = (table.expand(-1, -1, count) for table in table_paths(stages))
    times = problem.grid[nodes].flatten(1)
    x = problem.noise.repeat(nodes.shape[1], 1)
    if start == "analytic":
        ratio = times[0][:, None] / problem.grid[0]
        x = ratio * x + (1 - ratio) * problem.teacher.mean[problem.group].to(x).repeat(
            nodes.shape[1], 1
        )
    for state in walk(problem.solver, problem.velocity, x, times, list(orders.flatten(1))):
        final = state.x.unflatten(0, (-1, count))
    return torch.stack(
        [problem.cost(x, target) for x, target in zip(final, nodes[-1], strict=True)]
    )


def assert_tables_replay(problem: Problem, stages: Sequence[Stage], start: str) -> None:
    """Every entry of every round's table is what sampling its path costs."""
    for r in range(1, len(stages) + 1):
        alive = stages[r - 1].cost.isfinite()
        found = table_costs(problem, stages[:r], start)
        torch.testing.assert_close(found[alive], stages[r - 1].cost[alive], rtol=1e-9, atol=1e-14)
