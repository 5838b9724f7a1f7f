"""Coordinate descent on a schedule's nodes, over the search batch's true final error.

The recursion is greedy: it keeps one state per node. Moving one node at a time, with everything after it sampled anew,
repairs what that missed, most of all a free start node. Legend: B samples, k nodes, b = B or 1 (shared by all samples).
"""

from __future__ import annotations

import torch
from torch import Tensor

from oss_exp.solvers import State
from oss_exp.steps import Start
from oss_exp.stepsize.base import Problem
from oss_exp.stepsize.recursion import Objective, start_states

MOVES = (8, 4, 2, 1)  # nodes, coarse to fine
MAX_SWEEPS = 4  # passes over all nodes at one move size


@torch.no_grad()
def refine(problem: Problem, path: Tensor, start: Start, objective: Objective) -> Tensor:
    """path (k, b) -> path (k, b) with no larger final error under the objective; states before a move are reused."""
    goal = problem.teacher.states[-1]

    def run(path: Tensor, kept: list[State], first: int) -> tuple[list[State], Tensor]:
        """Sample from node `first` on; kept[r] is the observed state at node r < first. -> all k states, error (b,)."""
        states = kept[:first]
        for r in range(first, len(path)):
            if r == 0:
                state = start_states(problem, path[:1], start)
            else:
                state = problem.solver.advance(problem.velocity, states[-1], problem.grid[path[r]].expand(len(goal)))
            states.append(problem.solver.observe(problem.velocity, state))
        final = problem.solver.advance(problem.velocity, states[-1], problem.grid[-1].expand(len(goal)))
        return states, objective(problem.distance(final.x, goal), problem.collective)

    states, best = run(path, [], 0)
    for move in MOVES:
        for _ in range(MAX_SWEEPS):
            improved = False
            for r in range(1 if start == "pinned" else 0, len(path)):
                for step in (-move, move):
                    low = path[r - 1] + 1 if r else torch.zeros_like(path[r])
                    high = path[r + 1] - 1 if r + 1 < len(path) else torch.full_like(path[r], problem.num_nodes - 1)
                    tried = path.clone()
                    tried[r] = torch.minimum(torch.maximum(path[r] + step, low), high)
                    if bool((tried == path).all()):
                        continue
                    new_states, error = run(tried, states, r)
                    better = error < best
                    path = torch.where(better, tried, path)
                    best = torch.where(better, error, best)
                    states = states[:r] + [
                        new.map(lambda n, o: torch.where(_rows(better, n), n, o), old)
                        for new, old in zip(new_states[r:], states[r:], strict=True)
                    ]
                    improved |= bool(better.any())
            if not improved:
                break
    return path


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (like.ndim - 1))
