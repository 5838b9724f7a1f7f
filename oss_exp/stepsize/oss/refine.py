"""Coordinate descent on a schedule's nodes and orders, over the search batch's true final error.

The recursion is greedy: it keeps one state per node. Changing one step at a time, with everything after it sampled
anew, repairs what that missed, most of all a free start node. Legend: B samples, k nodes, b = B or 1 (shared).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from oss_exp.schedule import StartKind
from oss_exp.solvers.base import LinearMultistep, State
from oss_exp.stepsize.oss.edges import Fit
from oss_exp.stepsize.oss.objectives import Objective
from oss_exp.stepsize.oss.recursion import FittedPath, Path, SolverPath, recurse, start_states
from oss_exp.stepsize.oss.required import Required
from oss_exp.stepsize.problem import Problem

MOVES = (8, 4, 2, 1)  # nodes, coarse to fine
MAX_SWEEPS = 4  # passes over all nodes at one move size


@torch.no_grad()
def refine(
    problem: Problem,
    path: Path,
    start: StartKind,
    objective: Objective,
    fit: Fit | None = None,
    required: Required | None = None,
) -> Path:
    """A path with no larger final error under the objective; the states before a change are reused.

    Required nodes stay where they are. Fitted steps are fitted anew for every try, from the first step on. Costs stay
    those of the recursion's own path.
    """
    end = torch.tensor([problem.num_nodes], device=problem.noise.device)
    count = len(problem.noise)
    highest = problem.solver.order if isinstance(problem.solver, LinearMultistep) and fit is None else 0

    def run(path: Path, kept: list[State], first: int) -> tuple[Path, list[State], Tensor]:
        """Sample from node `first` on; kept[r] is the observed state at node r < first. -> all k states, error (b,)."""
        if fit is not None:
            solution = recurse(problem, list(path.nodes[:, None]), [len(path.nodes)], start, objective, fit)
            ((fitted,), (cost,)) = solution.paths.values(), solution.costs.values()
            return replace(fitted, costs=path.costs), kept, objective(cost, problem.collective)
        assert isinstance(path, SolverPath)
        states = kept[:first]
        for r in range(first, len(path.nodes)):
            if r == 0:
                state = start_states(problem, path.nodes[:1], start)
            else:
                t_next = problem.grid[path.nodes[r]].expand(count)
                state = problem.solver.advance(problem.velocity, states[-1], t_next, path.orders[r - 1].expand(count))
            states.append(problem.solver.observe(problem.velocity, state))
        t_next = problem.grid[-1].expand(count)
        final = problem.solver.advance(problem.velocity, states[-1], t_next, path.orders[-1].expand(count))
        return path, states, objective(problem.cost(final.x, end), problem.collective)

    path, states, best = run(path, [], 0)
    for move in MOVES:
        for _ in range(MAX_SWEEPS):
            improved = False
            for r in range(len(path.nodes)):
                changes = [(-move, None), (move, None)] if r or start != "pinned" else []
                if move == 1:
                    changes += [(0, order) for order in range(1, min(r + 1, highest) + 1)]
                for step, order in changes:
                    tried = _moved(problem, path, r, step, required) if order is None else _reordered(path, r, order)
                    if tried is None:
                        continue
                    first = r if order is None else r + 1  # node whose state changes
                    tried, new_states, error = run(tried, states, first)
                    better = error < best
                    if not bool(better.any()):
                        continue
                    improved = True
                    best = torch.where(better, error, best)
                    path = _where(better, tried, path)
                    states = states[:first] + [
                        new.map(lambda n, o: torch.where(_rows(better, n), n, o), old)
                        for new, old in zip(new_states[first:], states[first:], strict=True)
                    ]
            if not improved:
                break
    return path


def _moved(problem: Problem, path: Path, r: int, step: int, required: Required | None) -> Path | None:
    """Node r this many nodes later, as far as its neighbours allow; None where it cannot move."""
    nodes = path.nodes.clone()
    low = nodes[r - 1] + 1 if r else torch.zeros_like(nodes[r])
    high = nodes[r + 1] - 1 if r + 1 < len(nodes) else torch.full_like(nodes[r], problem.num_nodes - 1)
    moved = torch.minimum(torch.maximum(nodes[r] + step, low), high)
    nodes[r] = moved if required is None else torch.where(required.fixed(nodes[r]), nodes[r], moved)
    return None if torch.equal(nodes, path.nodes) else replace(path, nodes=nodes)


def _reordered(path: Path, r: int, order: int) -> Path | None:
    """The step from node r taken at this order; None where it is already."""
    assert isinstance(path, SolverPath)
    orders = path.orders.clone()
    orders[r] = order
    return None if torch.equal(orders, path.orders) else replace(path, orders=orders)


def _where(better: Tensor, new: Path, old: Path) -> Path:
    if isinstance(new, FittedPath) or isinstance(old, FittedPath):
        return new
    nodes, orders = torch.where(better, new.nodes, old.nodes), torch.where(better, new.orders, old.orders)
    return replace(old, nodes=nodes, orders=orders)


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (like.ndim - 1))
