"""The dynamic program of OSS (arXiv 2503.21774, Alg. 1 and 2) on a layered graph of teacher nodes.

Layer r holds the nodes that a student may stand on after r jumps; an edge is one jump (`edges.py`). Round r fills a
fresh table from round r-1, so a path of k rounds has exactly k jumps and its cost is the one that sampling it gives.
A full search, a coarse pilot and a narrow band differ only in their layers; a search for one schedule per sample and
one for a schedule that all samples share only in the `Objective`.

Legend: B samples, W nodes of a layer (S as sources, J as targets), P basis vectors a step.
Node arrays are (W, B), or (W, 1) where all samples have the same (b is B or 1); nodes ascend (noise to data) along W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_exp.schedule import StartKind, analytic_jump
from oss_exp.solvers.base import LinearMultistep, State
from oss_exp.stepsize.oss.edges import Edges, LinearEdges, TriedEdges
from oss_exp.stepsize.oss.objectives import Objective
from oss_exp.stepsize.oss.required import Required
from oss_exp.stepsize.problem import Problem


@dataclass(frozen=True, eq=False)
class SolverPath:
    """The nodes (k, b) of a student's calls, and the orders (k, b) of the solver's steps.

    costs (k, B): the recursion's entries along it, each sample's distance to the teacher after every step.
    """

    nodes: Tensor
    orders: Tensor
    costs: Tensor


@dataclass(frozen=True, eq=False)
class Round:
    """sources (S, b) -> targets (J, b), by steps of these orders (J, b).

    parent (J, b): position among the sources. cost (J, B): of the best path.
    """

    sources: Tensor
    targets: Tensor
    parent: Tensor
    orders: Tensor
    cost: Tensor


@dataclass(frozen=True, eq=False)
class Solution:
    """A path for every budget k, its cost (B,) under the distance, and all rounds."""

    paths: dict[int, SolverPath]
    costs: dict[int, Tensor]
    rounds: list[Round]


@torch.no_grad()
def recurse(
    problem: Problem,
    layers: Sequence[Tensor],
    budgets: Sequence[int],
    start: StartKind,
    objective: Objective,
    required: Required | None = None,
) -> Solution:
    """Solve for every k in budgets (max = len(layers)): layers[r] (W, b) are the legal nodes after r calls.

    Node N, the data, closes the path in round k of each budget and stands in no layer. required: no edge jumps over
    these nodes.
    """
    end, count = problem.num_nodes, len(problem.noise)
    if not (isinstance(problem.solver, LinearMultistep) and problem.distance.quadratic):
        edges: Edges = TriedEdges(problem, objective)
    else:
        aims = torch.cat(
            [*(layer.flatten() for layer in layers[1:]), layers[0].new_tensor([end])]
        ).unique()
        edges = LinearEdges(problem, objective, aims)
    rounds: list[Round] = []
    paths, costs = {}, {}
    sources = layers[0]
    alive = (
        torch.ones_like(sources, dtype=torch.bool) if required is None else required.starts(sources)
    )
    edges.begin(sources, start_states(problem, sources, start))
    for r in range(1, len(layers) + 1):
        edges.observe(sources, reuse_first=r == 1)
        closing = r in budgets
        inner = layers[r] if r < len(layers) else sources[:0]
        width = max(inner.shape[1], sources.shape[1])
        targets = torch.cat([inner.expand(-1, width), inner.new_full((int(closing), width), end)])
        legal = (sources[:, None] < targets[None]) & alive[:, None]  # (S, J, b)
        if required is not None:
            legal &= required.allowed(sources, targets)
        parent, orders, cost = edges.choose(targets, legal)
        alive = legal.any(0)
        rounds.append(Round(sources, targets, parent, orders, cost.masked_fill(~alive, torch.inf)))
        if closing:
            paths[r] = _trace(rounds)
            costs[r] = problem.cost(
                edges.state.x[-count:], torch.tensor([end], device=targets.device)
            )
        sources, alive = inner, alive[: len(inner)]
        edges.keep(len(inner) * count)  # node N stays behind
    return Solution(paths, costs, rounds)


def start_states(problem: Problem, nodes: Tensor, start: StartKind) -> State:
    """nodes (W, b) -> unobserved states (W*B,) of a student that begins there."""
    count = len(problem.noise)
    t = problem.grid[nodes].expand(-1, count)
    x = problem.noise.expand(len(nodes), *problem.noise.shape).flatten(0, 1)
    if start == "analytic":
        mean = problem.teacher.sample_mean.repeat(len(nodes), *[1] * (x.ndim - 1))
        x = analytic_jump(x, mean, float(problem.grid[0]), t.flatten())
    return problem.solver.init(x, t.flatten())


def _trace(rounds: Sequence[Round]) -> SolverPath:
    """Follow the parents from node N, the last target of the last round."""
    last = rounds[-1]
    position = torch.full_like(last.targets[-1], len(last.targets) - 1)
    nodes, orders, costs = [], [], []
    for step in reversed(rounds):
        costs.append(step.cost.gather(0, position.expand(step.cost.shape[1])[None])[0])
        width = max(step.orders.shape[1], step.parent.shape[1], len(position))
        position = position.expand(width)
        orders.append(step.orders.expand(-1, width).gather(0, position[None])[0])
        position = step.parent.expand(-1, width).gather(0, position[None])[0]
        nodes.append(step.sources.expand(-1, width).gather(0, position[None])[0])
    samples = len(nodes[-1])
    return SolverPath(
        torch.stack([each.expand(samples) for each in nodes[::-1]]),
        torch.stack([each.expand(samples) for each in orders[::-1]]),
        torch.stack(costs[::-1]),
    )
