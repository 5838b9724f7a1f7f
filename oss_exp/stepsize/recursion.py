"""The dynamic program of OSS (arXiv 2503.21774, Alg. 1) on a layered graph of teacher nodes.

Layer r holds the nodes that a student may stand on after r jumps; an edge is one jump of the solver. Round r fills a
fresh table from round r-1, so a path of k rounds has exactly k jumps and its cost is the one that sampling it gives.
A full search, a coarse pilot and a narrow band differ only in their layers; a search for one schedule per sample and
one for a schedule that all samples share differ only in the `Objective`.

Legend: B samples, W nodes of a layer (S as sources, J as targets), P basis vectors a step, F features, *E event dims.
Node arrays are (W, B), or (W, 1) where all samples have the same; nodes ascend (noise to data) along W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from oss_exp.solvers import LinearMultistep, State
from oss_exp.steps import Start, analytic_jump
from oss_exp.stepsize.base import Collective, Problem

COST_FLOOR = 1e-15  # below the rounding of the inner products: -inf must not decide a mean of logarithms
SCORE_GROUP = 16  # samples whose inner products are taken at a time; bounds the float64 copies
BLOCK = 20  # nodes whose inner products are taken at a time; those with earlier nodes are skipped


class Objective(Protocol):
    """What the samples' costs (..., B) become before the minimum is taken: (..., B), or (..., 1) over all ranks."""

    def __call__(self, cost: Tensor, collective: Collective) -> Tensor: ...


class PerSample:
    """Every sample for itself."""

    def __call__(self, cost: Tensor, collective: Collective) -> Tensor:
        return cost


@dataclass(frozen=True)
class Shared:
    """All samples of all ranks together: the mean cost, or the mean log cost, which is PSNR.

    Returned as sums: they are least where the means are, and need no count from the other ranks.
    """

    objective: Literal["mean", "log_mean"]

    def __post_init__(self) -> None:
        if self.objective not in ("mean", "log_mean"):
            raise ValueError(f"objective must be mean or log_mean, got {self.objective!r}")

    def __call__(self, cost: Tensor, collective: Collective) -> Tensor:
        if self.objective == "log_mean":
            cost = cost.clamp(min=COST_FLOOR).log()
        return collective.sum(cost.sum(-1, keepdim=True))


@dataclass(frozen=True, eq=False)
class Round:
    """sources (S, b) -> targets (J, b): parent (J, b) position among the sources, cost (J, B) of the best path."""

    sources: Tensor
    targets: Tensor
    parent: Tensor
    cost: Tensor


@dataclass(frozen=True, eq=False)
class Solution:
    """Node paths (k, b) for every budget k, their cost (B,) under the distance, and all rounds."""

    paths: dict[int, Tensor]
    costs: dict[int, Tensor]
    rounds: list[Round]


@torch.no_grad()
def recurse(
    problem: Problem, layers: Sequence[Tensor], budgets: Sequence[int], start: Start, objective: Objective
) -> Solution:
    """Solve for every k in budgets (max = len(layers)): layers[r] (W, b) are the legal nodes after r calls.

    Node N, the data, closes the path in round k of each budget and stands in no layer.
    """
    end = problem.num_nodes
    linear = isinstance(problem.solver, LinearMultistep)
    rounds: list[Round] = []
    paths, costs = {}, {}
    sources = layers[0]
    state = start_states(problem, sources, start)
    shadow = replace(state, x=_products(problem, sources, state.x)) if linear else None
    alive = torch.ones_like(sources, dtype=torch.bool)
    for r in range(1, len(layers) + 1):
        state = _observe(problem, sources, state, reuse_first=r == 1)

        # Targets.
        closing = r in budgets
        inner = layers[r] if r < len(layers) else sources[:0]
        width = max(inner.shape[1], sources.shape[1])
        targets = torch.cat([inner.expand(-1, width), inner.new_full((int(closing), width), end)])
        legal = (sources[:, None] < targets[None]) & alive[:, None]  # (S, J, b)

        # Edges.
        if linear:
            shadow = problem.solver.observe(lambda *_: _products(problem, sources, state.outputs[0]), shadow)
            parent, cost = _by_inner_products(problem, state, shadow, targets, legal, objective)
            rows = (parent * len(problem.noise) + torch.arange(len(problem.noise), device=parent.device)).flatten()
            t_next = problem.grid[targets].expand(-1, len(problem.noise)).flatten()
            state = problem.solver.advance(problem.velocity, state.map(lambda old: old[rows]), t_next)
            shadow = problem.solver.advance(problem.velocity, shadow.map(lambda old: old[rows]), t_next)
        else:
            parent, state, cost = _by_advancing(problem, state, targets, legal, objective)
        alive = legal.any(0)
        rounds.append(Round(sources, targets, parent, cost.masked_fill(~alive, torch.inf)))
        if closing:
            paths[r] = _trace(rounds)
            costs[r] = problem.distance(state.x[-len(problem.noise) :], problem.teacher.states[-1])

        # Node N stays behind.
        sources, alive, kept = inner, alive[: len(inner)], len(inner) * len(problem.noise)
        state = state.map(lambda rows: rows[:kept])
        shadow = shadow.map(lambda rows: rows[:kept]) if linear else None
    return Solution(paths, costs, rounds)


def start_states(problem: Problem, nodes: Tensor, start: Start) -> State:
    """nodes (W, b) -> unobserved states (W*B,) of a student that begins there."""
    count = len(problem.noise)
    t = problem.grid[nodes].expand(-1, count)
    x = problem.noise.expand(len(nodes), *problem.noise.shape).flatten(0, 1)
    if start == "analytic":
        mean = problem.mean.to(x)[problem.group].repeat(len(nodes), *[1] * (x.ndim - 1))
        x = analytic_jump(x, mean, float(problem.grid[0]), t.flatten())
    return problem.solver.init(x, t.flatten())


def unflatten(state: State, num_nodes: int) -> State:
    """Rows (W*B,) -> (W, B)."""
    return state.map(lambda rows: rows.unflatten(0, (num_nodes, -1)))


def _observe(problem: Problem, sources: Tensor, state: State, reuse_first: bool) -> State:
    """One batched network call for all sources; the teacher's own first call serves node 0."""
    if not (reuse_first and bool((sources[0] == 0).all())):
        return problem.solver.observe(problem.velocity, state)
    first = problem.teacher.first
    if len(sources) == 1:
        return first
    rest = state.map(lambda rows: rows[len(problem.noise) :])
    return first.map(lambda a, b: torch.cat([a, b]), problem.solver.observe(problem.velocity, rest))


def _products(problem: Problem, nodes: Tensor, vectors: Tensor) -> Tensor:
    """vectors (W*B, *E) at nodes (W, b) -> (W*B, N+1) float64: <u, T_j> under the distance's features.

    Teacher states that a node, or all nodes of its block, cannot jump to are left out (0).
    """
    count, teacher = len(problem.noise), problem.teacher.states
    vectors = vectors.unflatten(0, (-1, count))
    result = torch.zeros(*vectors.shape[:2], len(teacher), dtype=torch.float64, device=vectors.device)
    blocks = [range(len(nodes))[first : first + BLOCK] for first in range(0, len(nodes), BLOCK)]
    for first in range(0, count, SCORE_GROUP):
        part = slice(first, first + SCORE_GROUP)
        u, goal = _features(problem, vectors[:, part]), _features(problem, teacher[:, part])  # (g, W, F), (g, N+1, F)
        for block in blocks:
            rows, low = slice(block.start, block.stop), int(nodes[block.start].min()) + 1
            result[rows, part, low:] = torch.bmm(u[:, rows], goal[:, low:].mT).transpose(0, 1)
    return result.flatten(0, 1)


def _by_inner_products(
    problem: Problem, state: State, shadow: State, targets: Tensor, legal: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Score every edge without making it: |sum_p c_p u_p - T_j|^2 needs only <u_p, u_q>, <u_p, T_j> and |T_j|^2.

    The basis u is the state and the remembered outputs. `shadow` holds <u_p, T_j>: a linear solver moves these numbers
    as it moves the states. Float64 throughout, for the terms nearly cancel. -> parent (J, b), the winners' cost (J, B).
    """
    count, num_sources = len(problem.noise), len(legal)
    cost = torch.empty(num_sources, count, len(targets), dtype=torch.float64, device=targets.device)
    state, shadow = unflatten(state, num_sources), unflatten(shadow, num_sources)
    nodes = targets.T.expand(count, -1)  # (B, J)
    for first in range(0, count, SCORE_GROUP):
        part = slice(first, first + SCORE_GROUP)
        t_next, columns = problem.grid[nodes[part]][None], nodes[part][None].expand(num_sources, -1, -1)
        a, b = problem.solver.coefficients([time[:, part, None] for time in state.times], t_next)
        weights = [a, *b]  # P times (S, g, J)
        basis = [_features(problem, vectors[:, part]) for vectors in (state.x, *state.outputs)]  # P times (g, S, F)
        total = problem.teacher_norms.T[part].gather(1, nodes[part])[None].repeat(num_sources, 1, 1)
        for p, products in enumerate((shadow.x, *shadow.outputs)):
            slope = products[:, part].gather(2, columns).mul_(-2)
            for q in range(p + 1):
                inner = torch.linalg.vecdot(basis[p], basis[q]).T[..., None]
                slope.addcmul_(weights[q], inner, value=1 if p == q else 2)
            total.addcmul_(weights[p], slope)
        cost[:, part] = total.clamp_(min=0) / basis[0].shape[-1]
    cost = cost.transpose(1, 2)  # (S, J, B)
    parent = objective(cost, problem.collective).masked_fill(~legal, torch.inf).argmin(0)
    # argmin takes the first of equals: the noisier parent, as the released code does.
    return parent, cost.gather(0, parent.expand(-1, count)[None])[0]


def _by_advancing(problem: Problem, state: State, targets: Tensor, legal: Tensor, objective: Objective):
    """Score edges by taking them, one target at a time: for solvers whose step calls the network again."""
    count, num_sources = len(problem.noise), len(legal)
    grid = unflatten(state, num_sources)
    column = torch.arange(count, device=targets.device)
    parents, states, costs = [], [], []
    for j in range(len(targets)):
        reach = max(int(legal[:, j].any(1).sum()), 1)  # sources ascend, so the legal ones come first
        near = grid.map(lambda nodes: nodes[:reach].flatten(0, 1))
        t_next = problem.grid[targets[j]].expand(count)
        tried = problem.solver.advance(problem.velocity, near, t_next.repeat(reach))
        goal = problem.teacher.states[targets[j].expand(count), column]
        cost = problem.distance(tried.x, goal.repeat(reach, *[1] * (goal.ndim - 1))).unflatten(0, (reach, count))
        parent = objective(cost, problem.collective).masked_fill(~legal[:reach, j], torch.inf).argmin(0)
        rows = parent.expand(count) * count + column
        parents.append(parent)
        states.append(tried.map(lambda all_rows: all_rows[rows]))
        costs.append(cost.flatten()[rows])
    joined = states[0].map(lambda *rows: torch.cat(rows), *states[1:])
    return torch.stack(parents), joined, torch.stack(costs)


def _features(problem: Problem, states: Tensor) -> Tensor:
    """(W, g, *E) -> (g, W, F) float64."""
    return problem.distance.features(states.flatten(0, 1)).unflatten(0, states.shape[:2]).transpose(0, 1).double()


def _trace(rounds: Sequence[Round]) -> Tensor:
    """Follow the parents from node N, the last target of the last round -> nodes (k, b)."""
    last = rounds[-1]
    position = torch.full_like(last.targets[-1], len(last.targets) - 1)
    path = []
    for step in reversed(rounds):
        width = max(step.parent.shape[1], len(position))
        position = step.parent.expand(-1, width).gather(0, position.expand(width)[None])[0]
        path.append(step.sources.expand(-1, width).gather(0, position[None])[0])
    return torch.stack(path[::-1])
