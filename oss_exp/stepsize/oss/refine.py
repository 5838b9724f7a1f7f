"""Coordinate descent on a path's nodes and orders, which lowers the error at the end of the path.

The recursion is greedy: it keeps one state of the sampler for each node and stage. Here
one node or order is changed at a time, and everything after it is sampled again. That
finds what the recursion missed, most of all where a start is free.

Legend: B samples, k nodes, b = B, or 1 where all samples share a path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

MOVES = (8, 4, 2, 1)  # sizes of moves in nodes, coarse to fine
MAX_SWEEPS = 4  # passes over all nodes with moves of one size
FIT_CALLS = 1000  # most network calls a sample for the moves of a path with fitted steps

Path = TypeVar("Path", SolverPath, FittedPath)
Checkpoint = TypeVar("Checkpoint")


class Student(Protocol[Path, Checkpoint]):
    """A sampler that runs a path.

    Attributes:
        highest: the highest order of a step; 0 where its steps have none.
    """

    problem: Problem
    start: StartKind
    highest: int

    def run(
        self, path: Path, checkpoints: Sequence[Checkpoint] = (), first: int = 0
    ) -> tuple[Path, list[Checkpoint], Tensor]:
        """Sample along a path from its node `first` on.

        Args:
            path: the nodes to call the network at.
            checkpoints: those of an earlier run, of which the ones before position
                `first` are used.
            first: position on the path, 0 to k; k samples the last step only.

        Returns:
            The path, its k checkpoints, and its final error (b,) under the objective.
        """
        ...

    def merge(
        self,
        better: Tensor,
        new: tuple[Path, list[Checkpoint]],
        old: tuple[Path, list[Checkpoint]],
    ) -> tuple[Path, list[Checkpoint]]:
        """Return path and checkpoints: the new ones where `better` (b,) is true, else the old.

        `better` is true somewhere.
        """
        ...


class SolverStudent:
    """A student whose steps are a solver's; its checkpoints are the observed states."""

    def __init__(self, problem: Problem, start: StartKind, objective: Objective):
        self.problem = problem
        self.objective = objective
        self.start: StartKind = start
        self.highest = problem.solver.order if isinstance(problem.solver, LinearMultistep) else 0

    def run(
        self, path: SolverPath, checkpoints: Sequence[State] = (), first: int = 0
    ) -> tuple[SolverPath, list[State], Tensor]:
        """Sample along a path from its node `first` on, see `Student.run`."""
        problem = self.problem
        states = list(checkpoints[:first])
        for r in range(first, len(path.nodes)):
            if r == 0:
                state = start_states(problem, path.nodes[:1], self.start)
            else:
                state = self._step(states[-1], problem.grid[path.nodes[r]], path.orders[r - 1])
            states.append(problem.solver.observe(problem.velocity, state))
        final = self._step(states[-1], problem.grid[-1:], path.orders[-1])

        end = torch.tensor([problem.num_nodes], device=problem.noise.device)
        return path, states, self.objective(problem.cost(final.x, end), problem.collective)

    def _step(self, state: State, t_next: Tensor, order: Tensor) -> State:
        """Return the end of a step to t_next (b,) of order (b,)."""
        problem, count = self.problem, len(self.problem.noise)
        t_next = t_next.expand(count)
        return problem.solver.advance(problem.velocity, state, t_next, order.expand(count))

    def merge(
        self,
        better: Tensor,
        new: tuple[SolverPath, list[State]],
        old: tuple[SolverPath, list[State]],
    ) -> tuple[SolverPath, list[State]]:
        """Return path and states, the new ones for the samples that are better."""

        def choose(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        (path, states), (old_path, old_states) = new, old
        nodes = torch.where(better, path.nodes, old_path.nodes)
        orders = torch.where(better, path.orders, old_path.orders)
        merged = []
        for state, old_state in zip(states, old_states, strict=True):
            merged.append(state.map(choose, old_state))
        return replace(old_path, nodes=nodes, orders=orders), merged


@torch.no_grad()
def refine(
    problem: Problem,
    path: SolverPath,
    start: StartKind,
    objective: Objective,
    required: Required | None = None,
) -> SolverPath:
    """Return a path with no larger final error under the objective.

    Its costs stay those of the recursion.

    Args:
        problem: the problem that the path solves.
        path: where the descent begins.
        start: where the student begins.
        objective: what is lowered.
        required: nodes that stay where they are.
    """
    return _descend(SolverStudent(problem, start, objective), path, MOVES, required)


@torch.no_grad()
def refine_fitted(
    student: FittedStudent, path: FittedPath, required: Required | None = None
) -> FittedPath:
    """Return a path with no larger final error, with coefficients fitted again for every try.

    The moves make at most FIT_CALLS network calls a sample. They are no larger than a
    third of the mean distance of two nodes, or than 2 where that is less. Larger ones
    lower the error at once and end in worse places.

    Args:
        student: runs the paths.
        path: where the descent begins.
        required: nodes that stay where they are.
    """
    distance = student.problem.num_nodes // (len(path.nodes) + 1)
    moves = [move for move in MOVES if move <= max(distance // 3, 2)]
    return _descend(student, path, moves, required, FIT_CALLS)


def _descend(
    student: Student[Path, Checkpoint],
    path: Path,
    moves: Sequence[int],
    required: Required | None,
    max_calls: float = float("inf"),
) -> Path:
    """Change one node or order at a time, and keep each change where it lowers the error.

    Moves of one size are tried until none helps, or MAX_SWEEPS times. The checkpoints
    before a change are used again.
    """
    path, checkpoints, error = student.run(path)
    tried = {_key(path)}  # a descent does not go back to where it was
    calls = 0
    for move in moves:
        for _ in range(MAX_SWEEPS):
            improved = False
            for r in range(len(path.nodes)):
                for step, order in _changes(r, move, student):
                    # The changed path, unless it is known.
                    if order is None:
                        changed = _moved(path, r, step, student.problem, required)
                    else:
                        changed = _reordered(path, r, order)
                    if changed is None or _key(changed) in tried:
                        continue
                    tried.add(_key(changed))

                    # Run it from the first node whose state changes.
                    first = r if order is None else r + 1
                    if calls > max_calls - (len(path.nodes) - first):
                        return path
                    calls += len(path.nodes) - first
                    changed, new_checkpoints, new_error = student.run(changed, checkpoints, first)

                    # Keep it where it is better.
                    better = new_error < error
                    if bool(better.any()):
                        new = (changed, new_checkpoints)
                        path, checkpoints = student.merge(better, new, (path, checkpoints))
                        error = torch.where(better, new_error, error)
                        improved = True
            if not improved:
                break
    return path


def _changes(
    r: int, move: int, student: Student[Path, Checkpoint]
) -> Iterator[tuple[int, int | None]]:
    """Yield the changes to try at node r: (nodes to move by, None), or (0, order of its step)."""
    if r or student.start != "pinned":
        yield -move, None
        yield move, None
    if move == 1:
        for order in range(1, min(r + 1, student.highest) + 1):
            yield 0, order


def _key(path: SolverPath | FittedPath) -> bytes:
    """Return as bytes what a path's error depends on: its nodes, and a solver's orders."""
    orders = path.orders if isinstance(path, SolverPath) else path.nodes
    return torch.stack([path.nodes, orders.expand_as(path.nodes)]).cpu().numpy().tobytes()


def _moved(
    path: Path, r: int, step: int, problem: Problem, required: Required | None
) -> Path | None:
    """Return the path with node r moved by `step` nodes, as far as its neighbours allow.

    None means that it cannot move.
    """
    nodes = path.nodes.clone()
    low = nodes[r - 1] + 1 if r else torch.zeros_like(nodes[r])
    high = torch.full_like(nodes[r], problem.num_nodes - 1)
    if r + 1 < len(nodes):
        high = nodes[r + 1] - 1
    moved = torch.minimum(torch.maximum(nodes[r] + step, low), high)
    if required is not None:
        moved = torch.where(required.fixed(nodes[r]), nodes[r], moved)
    nodes[r] = moved
    return None if torch.equal(nodes, path.nodes) else replace(path, nodes=nodes)


def _reordered(path: Path, r: int, order: int) -> Path | None:
    """Return the path whose step from node r has this order; None if it has it already."""
    assert isinstance(path, SolverPath)
    orders = path.orders.clone()
    orders[r] = order
    return None if torch.equal(orders, path.orders) else replace(path, orders=orders)
