"""Coordinate descent on a schedule's nodes and orders, over the search batch's true final error.

The recursion is greedy: it keeps one state per node. Changing one step at a time, with everything after it sampled
anew, repairs what that missed, most of all a free start node. Legend: B samples, k nodes, b = B or 1 (shared).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from oss_exp.schedule import StartKind
from oss_exp.solvers.base import LinearMultistep, State
from oss_exp.stepsize.oss.coefficients import FittedPath, FittedStudent
from oss_exp.stepsize.oss.objectives import Objective
from oss_exp.stepsize.oss.recursion import SolverPath, start_states
from oss_exp.stepsize.oss.required import Required
from oss_exp.stepsize.problem import Problem

MOVES = (8, 4, 2, 1)  # nodes, coarse to fine
MAX_SWEEPS = 4  # passes over all nodes at one move size
FIT_CALLS = 1000  # a sample, at most, for each budget of fitted steps

Path = TypeVar("Path", SolverPath, FittedPath)
Stage = TypeVar("Stage")


class Student(Protocol[Path, Stage]):
    """What runs a path. highest: the most that a step's order can be; 0: its steps have none."""

    problem: Problem
    start: StartKind
    highest: int

    def run(
        self, path: Path, kept: Sequence[Stage] = (), first: int = 0
    ) -> tuple[Path, list[Stage], Tensor]:
        """Sample from node `first` on; kept[r] is the stage at node r < first. -> path, k stages, error (b,)."""
        ...

    def merge(
        self, better: Tensor, new: tuple[Path, list[Stage]], old: tuple[Path, list[Stage]]
    ) -> tuple[Path, list[Stage]]:
        """Path and stages, the new ones where better (b,) says so; at least one of b is."""
        ...


class SolverStudent:
    """A student whose steps are a solver's. Its stages are the observed states."""

    def __init__(self, problem: Problem, start: StartKind, objective: Objective):
        self.problem, self.objective = problem, objective
        self.start: StartKind = start
        self.highest = problem.solver.order if isinstance(problem.solver, LinearMultistep) else 0

    def run(
        self, path: SolverPath, kept: Sequence[State] = (), first: int = 0
    ) -> tuple[SolverPath, list[State], Tensor]:
        problem, count = self.problem, len(self.problem.noise)
        states = list(kept[:first])
        for r in range(first, len(path.nodes)):
            if r == 0:
                state = start_states(problem, path.nodes[:1], self.start)
            else:
                t_next = problem.grid[path.nodes[r]].expand(count)
                state = problem.solver.advance(
                    problem.velocity, states[-1], t_next, path.orders[r - 1].expand(count)
                )
            states.append(problem.solver.observe(problem.velocity, state))
        t_next = problem.grid[-1].expand(count)
        final = problem.solver.advance(
            problem.velocity, states[-1], t_next, path.orders[-1].expand(count)
        )
        end = torch.tensor([problem.num_nodes], device=problem.noise.device)
        return path, states, self.objective(problem.cost(final.x, end), problem.collective)

    def merge(
        self,
        better: Tensor,
        new: tuple[SolverPath, list[State]],
        old: tuple[SolverPath, list[State]],
    ) -> tuple[SolverPath, list[State]]:
        def choose(n: Tensor, o: Tensor) -> Tensor:
            return torch.where(better.reshape(-1, *[1] * (n.ndim - 1)), n, o)

        (path, states), (old_path, old_states) = new, old
        nodes = torch.where(better, path.nodes, old_path.nodes)
        orders = torch.where(better, path.orders, old_path.orders)
        merged = [
            state.map(choose, before) for state, before in zip(states, old_states, strict=True)
        ]
        return replace(old_path, nodes=nodes, orders=orders), merged


@torch.no_grad()
def refine(
    problem: Problem,
    path: SolverPath,
    start: StartKind,
    objective: Objective,
    required: Required | None = None,
) -> SolverPath:
    """A path with no larger final error under the objective; required nodes stay where they are.

    Costs stay those of the recursion's own path.
    """
    return _descend(SolverStudent(problem, start, objective), path, MOVES, required)


@torch.no_grad()
def refine_fitted(
    student: FittedStudent, path: FittedPath, required: Required | None = None
) -> FittedPath:
    """A path with no larger final error, its coefficients fitted anew for every try, by at most FIT_CALLS calls.

    Its largest move is a third of the nodes' mean distance, or 2: larger ones win at once and end in worse places.
    """
    apart = student.problem.num_nodes // (len(path.nodes) + 1)
    moves = [move for move in MOVES if move <= max(apart // 3, 2)]
    return _descend(student, path, moves, required, FIT_CALLS)


def _descend(
    student: Student[Path, Stage],
    path: Path,
    moves: Sequence[int],
    required: Required | None,
    most_calls: float = float("inf"),
) -> Path:
    """Change one node or order at a time for as long as it helps; the stages before a change are reused."""
    path, stages, best = student.run(path)
    tried_before = {_key(path)}  # such as the way back from a change that helped
    calls = 0
    for move in moves:
        for _ in range(MAX_SWEEPS):
            improved = False
            for r in range(len(path.nodes)):
                changes: list[tuple[int, int | None]] = []
                if r or student.start != "pinned":
                    changes += [(-move, None), (move, None)]
                if move == 1:
                    changes += [(0, order) for order in range(1, min(r + 1, student.highest) + 1)]
                for step, order in changes:
                    tried = (
                        _reordered(path, r, order)
                        if order
                        else _moved(path, r, step, student.problem, required)
                    )
                    if tried is None or _key(tried) in tried_before:
                        continue
                    tried_before.add(_key(tried))
                    first = r if order is None else r + 1  # node whose state changes
                    if calls > most_calls - (len(path.nodes) - first):
                        return path
                    calls += len(path.nodes) - first

                    tried, new_stages, error = student.run(tried, stages, first)
                    better = error < best
                    if bool(better.any()):
                        path, stages = student.merge(better, (tried, new_stages), (path, stages))
                        best, improved = torch.where(better, error, best), True
            if not improved:
                break
    return path


def _key(path: SolverPath | FittedPath) -> bytes:
    """What a path's error depends on, its nodes and orders."""
    orders = path.orders if isinstance(path, SolverPath) else path.nodes
    return torch.stack([path.nodes, orders.expand_as(path.nodes)]).cpu().numpy().tobytes()


def _moved(
    path: Path, r: int, step: int, problem: Problem, required: Required | None
) -> Path | None:
    """Node r this many nodes later, as far as its neighbours allow; None where it cannot move."""
    nodes = path.nodes.clone()
    low = nodes[r - 1] + 1 if r else torch.zeros_like(nodes[r])
    high = (
        nodes[r + 1] - 1 if r + 1 < len(nodes) else torch.full_like(nodes[r], problem.num_nodes - 1)
    )
    moved = torch.minimum(torch.maximum(nodes[r] + step, low), high)
    nodes[r] = moved if required is None else torch.where(required.fixed(nodes[r]), nodes[r], moved)
    return None if torch.equal(nodes, path.nodes) else replace(path, nodes=nodes)


def _reordered(path: Path, r: int, order: int) -> Path | None:
    """The step from node r taken at this order; None where it is already."""
    assert isinstance(path, SolverPath)
    orders = path.orders.clone()
    orders[r] = order
    return None if torch.equal(orders, path.orders) else replace(path, orders=orders)
