"""Edges of the search: the states at the sources of a round, and the best way from them to its targets.

An edge is one step of the solver between two nodes. Every edge is tried at every order that the history of its source
allows; what the samples' costs become before the minimum is the `Objective`'s choice.

Legend: B samples, S sources, J targets (nodes (S, b), (J, b): b is B, or 1 where all samples have the same),
P basis vectors a step, O orders, A aims: the nodes that some step may end at, *E event dims, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from oss_exp.solvers.base import LinearMultistep, State
from oss_exp.stepsize.oss.objectives import Objective, PerSample
from oss_exp.stepsize.problem import Problem

SCORE_GROUP = 16  # samples, and

SCORE_FEATURES = (
    1 << 16
)  # features, whose inner products are taken at a time; they bound the float64 copies

BLOCK = 20  # nodes whose inner products are taken at a time; those with earlier nodes are skipped


class Edges:
    """state: rows (W*B,) at the nodes of a layer."""

    state: State

    def __init__(self, problem: Problem, objective: Objective):
        self.problem, self.objective = problem, objective

    def begin(self, sources: Tensor, state: State) -> None:
        self.state = state

    def observe(self, sources: Tensor, reuse_first: bool) -> None:
        """One batched network call for all sources."""
        v = self.problem.velocity.combine(self._outputs(sources, reuse_first))
        self.state = self.problem.solver.observe(lambda *_: v, self.state)

    def choose(self, targets: Tensor, legal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Move to the targets (J, b) from the best sources; legal (S, J, b). -> parent (J, b), how, cost (J, B)."""
        raise NotImplementedError

    def keep(self, rows: int) -> None:
        self.state = self.state.map(lambda old: old[:rows])

    def _outputs(self, sources: Tensor, reuse_first: bool) -> tuple[Tensor, ...]:
        """The network at all sources; the teacher's own first call serves node 0."""
        problem, x, t = self.problem, self.state.x, self.state.t
        if not (reuse_first and bool((sources[0] == 0).all())):
            return problem.velocity.outputs(x, t)
        if len(sources) == 1:
            return problem.teacher.first_outputs
        rest = problem.velocity.outputs(x[len(problem.noise) :], t[len(problem.noise) :])
        return tuple(
            torch.cat(pair) for pair in zip(problem.teacher.first_outputs, rest, strict=True)
        )

    def _best(self, cost: Tensor, legal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """cost (O, S, J, B) -> parent (J, b), order (J, b) from 1, cost (J, B)."""
        total = self.objective(cost, self.problem.collective).masked_fill(~legal, torch.inf)
        # argmin takes the first of equals: the lowest order, then the noisiest parent, as the released code does.
        best = total.flatten(0, 1).argmin(0)
        chosen = cost.flatten(0, 1).gather(0, best.expand(-1, cost.shape[-1])[None])[0]
        return best % cost.shape[1], best // cost.shape[1] + 1, chosen

    def _rows(self, parent: Tensor) -> Tensor:
        """parent (J, b) -> the rows (J*B,) of the parents' states."""
        count = len(self.problem.noise)
        return (parent * count + torch.arange(count, device=parent.device)).flatten()


class TriedEdges(Edges):
    """Score edges by taking them, one target at a time: for singlestep solvers and distances that are not quadratic."""

    def choose(self, targets: Tensor, legal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        problem, count = self.problem, len(self.problem.noise)
        grid = unflatten(self.state, len(legal))
        orders = [problem.solver.order]
        if isinstance(problem.solver, LinearMultistep):
            orders = range(1, len(self.state.outputs) + 1)
        found = []
        for j, target in enumerate(targets):
            reach = int(legal[:, j].any(1).nonzero().amax() if bool(legal[:, j].any()) else 0) + 1
            near = grid.map(lambda nodes: nodes[:reach].flatten(0, 1))
            t_next = problem.grid[target].expand(count).repeat(reach)
            tried = [
                problem.solver.advance(problem.velocity, near, t_next, order) for order in orders
            ]
            cost = torch.stack([problem.cost(state.x, target) for state in tried]).unflatten(
                1, (reach, count)
            )
            parent, order, cost = self._best(cost[:, :, None], legal[:reach, j : j + 1])
            joined = tried[0].map(
                lambda *rows: torch.stack(rows).unflatten(1, (reach, count)), *tried[1:]
            )
            column = torch.arange(count, device=target.device)
            state = joined.map(
                lambda all_rows: all_rows[
                    order.expand(1, count) - 1, parent.expand(1, count), column
                ][0]
            )
            found.append((parent, order if len(orders) > 1 else order * 0 + orders[0], cost, state))
        parents, hows, costs, states = zip(*found, strict=True)
        self.state = states[0].map(lambda *rows: torch.cat(rows), *states[1:])
        return torch.cat(parents), torch.cat(hows), torch.cat(costs)


class LinearEdges(Edges):
    """Score every edge without making it: |sum_p c_p u_p - T_j|^2 needs only <u_p, u_q>, <u_p, T_j> and |T_j|^2.

    The basis u is the state and the remembered outputs. `shadow` holds <u_p, T_j> for all nodes j that a student may
    jump to (aims (A,), ascending) in their place: a linear solver moves these numbers as it moves the states. Float64
    throughout, for the terms nearly cancel.
    """

    shadow: State

    def __init__(self, problem: Problem, objective: Objective, aims: Tensor):
        super().__init__(problem, objective)
        self.aims = aims

    def begin(self, sources: Tensor, state: State) -> None:
        self.state = state
        self.shadow = replace(state, x=self._products(sources, state.x))

    def observe(self, sources: Tensor, reuse_first: bool) -> None:
        v = self.problem.velocity.combine(self._outputs(sources, reuse_first))
        products = self._products(sources, v)
        self.state = self.problem.solver.observe(lambda *_: v, self.state)
        self.shadow = self.problem.solver.observe(lambda *_: products, self.shadow)

    def choose(self, targets: Tensor, legal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        problem, num_sources, count = self.problem, len(legal), len(self.problem.noise)
        solver = problem.solver
        assert isinstance(solver, LinearMultistep)
        histories = (
            count if isinstance(self.objective, PerSample) else 1
        )  # else all samples have the same past
        times = [
            time.unflatten(0, (num_sources, count))[:, :histories, None]
            for time in self.state.times
        ]
        t_next = problem.grid[targets].T[None]  # (1, b, J)
        weights = []
        for order in range(1, len(times) + 1):
            a, b = solver.coefficients(times[:order], t_next)
            weights.append(
                torch.stack(torch.broadcast_tensors(a, *b), dim=-1)
            )  # (S, b, J, order + 1)
        state, shadow = unflatten(self.state, num_sources), unflatten(self.shadow, num_sources)
        inner = _gram(problem, [state.x, *state.outputs])
        cost = self._costs(inner, [shadow.x, *shadow.outputs], targets, weights)
        parent, order, cost = self._best(cost, legal)
        rows, t_next = self._rows(parent), problem.grid[targets].expand(-1, count).flatten()
        steps = t_next, order.expand(-1, count).flatten()
        self.state = problem.solver.advance(
            problem.velocity, self.state.map(lambda old: old[rows]), *steps
        )
        self.shadow = problem.solver.advance(
            problem.velocity, self.shadow.map(lambda old: old[rows]), *steps
        )
        return parent, order, cost

    def keep(self, rows: int) -> None:
        super().keep(rows)
        self.shadow = self.shadow.map(lambda old: old[:rows])

    def _products(self, nodes: Tensor, vectors: Tensor) -> Tensor:
        """vectors (W*B, *E) at nodes (W, b) -> (W*B, A) float64: <u, T_j> under the distance's features.

        Aims that a node, or all nodes of its block, cannot jump to are left out (0).
        """
        problem, count = self.problem, len(self.problem.noise)
        vectors = vectors.unflatten(0, (-1, count))
        result = torch.zeros(
            *vectors.shape[:2], len(self.aims), dtype=torch.float64, device=vectors.device
        )
        blocks = [range(len(nodes))[first : first + BLOCK] for first in range(0, len(nodes), BLOCK)]
        for first in range(0, count, SCORE_GROUP):
            part = slice(first, first + SCORE_GROUP)
            u = _features(problem, vectors[:, part])  # (g, W, F)
            goals = [
                problem.teacher.targets[aim][part].flatten(1) for aim in self.aims
            ]  # A times (g, F)
            for some in _slices(u.shape[2]):
                own, goal = (
                    u[..., some].double(),
                    torch.stack([each[:, some] for each in goals], dim=1).double(),
                )
                for block in blocks:
                    rows = slice(block.start, block.stop)
                    low = int(torch.searchsorted(self.aims, nodes[block.start].min(), right=True))
                    result[rows, part, low:] += torch.bmm(own[:, rows], goal[:, low:].mT).transpose(
                        0, 1
                    )
        return result.flatten(0, 1)

    def _costs(
        self, inner: Tensor, products: Sequence[Tensor], targets: Tensor, weights: Sequence[Tensor]
    ) -> Tensor:
        """inner (S, B, P, P), products P x (S, B, A), each of O weights (S, b, J, p <= P) -> costs (O, S, J, B)."""
        problem, (num_sources, count) = self.problem, inner.shape[:2]
        size = problem.teacher.targets[0][0].numel()
        cost = torch.empty(
            len(weights),
            num_sources,
            count,
            len(targets),
            dtype=torch.float64,
            device=targets.device,
        )
        nodes = targets.T.expand(count, -1).contiguous()  # (B, J)
        for first in range(0, count, SCORE_GROUP):
            part = slice(first, first + SCORE_GROUP)
            columns = torch.searchsorted(self.aims, nodes[part])[None].expand(num_sources, -1, -1)
            crossed = [
                u[:, part].gather(2, columns).mul_(-2) for u in products
            ]  # P times (S, g, J)
            length = problem.teacher.target_norms.T[part].gather(1, nodes[part])[None]
            for o, table in enumerate(weights):
                total = length.repeat(num_sources, 1, 1)
                w = [
                    column[:, part] if column.shape[1] > 1 else column
                    for column in table.unbind(-1)
                ]
                for p in range(len(w)):
                    slope = crossed[p].clone()
                    for q in range(p + 1):
                        slope.addcmul_(w[q], inner[:, part, p, q, None], value=1 if p == q else 2)
                    total.addcmul_(w[p], slope)
                cost[o, :, part] = total.clamp_(min=0) / size
        return cost.transpose(2, 3)


def unflatten(state: State, num_nodes: int) -> State:
    """Rows (W*B,) -> (W, B)."""
    return state.map(lambda rows: rows.unflatten(0, (num_nodes, -1)))


def _gram(problem: Problem, basis: Sequence[Tensor]) -> Tensor:
    """basis P x (S, B, *E) -> (S, B, P, P) float64: <u_p, u_q> under the distance's features."""
    parts = []
    for first in range(0, len(problem.noise), SCORE_GROUP):
        part = slice(first, first + SCORE_GROUP)
        vectors = [_features(problem, u[:, part]) for u in basis]  # P times (g, S, F)
        parts.append(inner_products(vectors, vectors))  # (g, S, P, P)
    return torch.cat(parts).transpose(0, 1)


def inner_products(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """first P x (..., F), second Q x (..., F) -> (..., P, Q) float64."""
    total = 0
    for some in _slices(first[0].shape[-1]):
        left = torch.stack([u[..., some].double() for u in first], dim=-2)
        right = (
            left
            if second is first
            else torch.stack([u[..., some].double() for u in second], dim=-2)
        )
        total = total + left @ right.mT
    assert isinstance(total, Tensor)
    return total


def _features(problem: Problem, states: Tensor) -> Tensor:
    """(W, g, *E) -> (g, W, F), under a linear distance."""
    features = problem.distance.features(states.flatten(0, 1), problem.grid, problem.velocity)
    return features.flatten(1).unflatten(0, states.shape[:2]).transpose(0, 1)


def _slices(features: int) -> list[slice]:
    return [slice(first, first + SCORE_FEATURES) for first in range(0, features, SCORE_FEATURES)]
