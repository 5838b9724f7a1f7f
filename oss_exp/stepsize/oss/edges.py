"""Edges of the search: the states at the sources of a round, and the best way from them to its targets.

An edge is one step of the solver between two nodes. Every edge is tried at every order that the history of its source
allows, or its coefficients are fitted; what the samples' costs become before the minimum is the `Objective`'s choice.

Legend: B samples, S sources, J targets (nodes (S, b), (J, b): b is B, or 1 where all samples have the same),
P basis vectors a step, O orders, A aims: the nodes that some step may end at, *E event dims, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.solvers.base import LinearMultistep, State, combine
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.solvers.sampling import remember_parts
from oss_exp.stepsize.oss.objectives import COST_FLOOR, Objective, PerSample
from oss_exp.stepsize.problem import Problem

SCORE_GROUP = 16  # samples, and

SCORE_FEATURES = 1 << 16  # features, whose inner products are taken at a time; they bound the float64 copies

REWEIGHTINGS = 4  # least squares solved for a mean of logarithms

BLOCK = 20  # nodes whose inner products are taken at a time; those with earlier nodes are skipped


@dataclass(frozen=True)
class Fit:
    """Every edge fits its own step: x_j = sum_p w_p u_p, u = (x_i, noise, mean, last `history` predictions of x0).

    w is ridge least squares over all samples against the teacher's state; for the mean log cost with the weight of
    every sample one over its cost, in a few rounds, which lower that mean (log c <= log c0 + c / c0 - 1). `ridge`,
    relative to each vector's mean square, pulls w towards the ordinary step. Under guidance the R answers of a call are
    predictions of their own.
    """

    history: int
    ridge: float

    def __post_init__(self) -> None:
        require_range(at_least=1, history=self.history)
        require_range(above=0, ridge=self.ridge)


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
        return tuple(torch.cat(pair) for pair in zip(problem.teacher.first_outputs, rest, strict=True))

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
            tried = [problem.solver.advance(problem.velocity, near, t_next, order) for order in orders]
            cost = torch.stack([problem.cost(state.x, target) for state in tried]).unflatten(1, (reach, count))
            parent, order, cost = self._best(cost[:, :, None], legal[:reach, j : j + 1])
            joined = tried[0].map(lambda *rows: torch.stack(rows).unflatten(1, (reach, count)), *tried[1:])
            column = torch.arange(count, device=target.device)
            state = joined.map(
                lambda all_rows: all_rows[order.expand(1, count) - 1, parent.expand(1, count), column][0]
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
        histories = count if isinstance(self.objective, PerSample) else 1  # else all samples have the same past
        times = [time.unflatten(0, (num_sources, count))[:, :histories, None] for time in self.state.times]
        t_next = problem.grid[targets].T[None]  # (1, b, J)
        weights = []
        for order in range(1, len(times) + 1):
            a, b = problem.solver.coefficients(times[:order], t_next)
            weights.append(torch.stack(torch.broadcast_tensors(a, *b), dim=-1))  # (S, b, J, order + 1)
        state, shadow = unflatten(self.state, num_sources), unflatten(self.shadow, num_sources)
        inner = _inner_products(problem, [state.x, *state.outputs])
        cost = self._costs(inner, [shadow.x, *shadow.outputs], targets, weights)
        parent, order, cost = self._best(cost, legal)
        rows, t_next = self._rows(parent), problem.grid[targets].expand(-1, count).flatten()
        steps = t_next, order.expand(-1, count).flatten()
        self.state = problem.solver.advance(problem.velocity, self.state.map(lambda old: old[rows]), *steps)
        self.shadow = problem.solver.advance(problem.velocity, self.shadow.map(lambda old: old[rows]), *steps)
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
        result = torch.zeros(*vectors.shape[:2], len(self.aims), dtype=torch.float64, device=vectors.device)
        blocks = [range(len(nodes))[first : first + BLOCK] for first in range(0, len(nodes), BLOCK)]
        for first in range(0, count, SCORE_GROUP):
            part = slice(first, first + SCORE_GROUP)
            u = _features(problem, vectors[:, part])  # (g, W, F)
            goals = [problem.teacher.targets[aim][part].flatten(1) for aim in self.aims]  # A times (g, F)
            for some in _slices(u.shape[2]):
                own, goal = u[..., some].double(), torch.stack([each[:, some] for each in goals], dim=1).double()
                for block in blocks:
                    rows = slice(block.start, block.stop)
                    low = int(torch.searchsorted(self.aims, nodes[block.start].min(), right=True))
                    result[rows, part, low:] += torch.bmm(own[:, rows], goal[:, low:].mT).transpose(0, 1)
        return result.flatten(0, 1)

    def _costs(self, inner: Tensor, products: Sequence[Tensor], targets: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """inner (S, B, P, P), products P x (S, B, A), each of O weights (S, b, J, p <= P) -> costs (O, S, J, B)."""
        problem, (num_sources, count) = self.problem, inner.shape[:2]
        size = problem.teacher.targets[0][0].numel()
        cost = torch.empty(len(weights), num_sources, count, len(targets), dtype=torch.float64, device=targets.device)
        nodes = targets.T.expand(count, -1).contiguous()  # (B, J)
        for first in range(0, count, SCORE_GROUP):
            part = slice(first, first + SCORE_GROUP)
            columns = torch.searchsorted(self.aims, nodes[part])[None].expand(num_sources, -1, -1)
            crossed = [u[:, part].gather(2, columns).mul_(-2) for u in products]  # P times (S, g, J)
            length = problem.teacher.target_norms.T[part].gather(1, nodes[part])[None]
            for o, table in enumerate(weights):
                total = length.repeat(num_sources, 1, 1)
                w = [column[:, part] if column.shape[1] > 1 else column for column in table.unbind(-1)]
                for p in range(len(w)):
                    slope = crossed[p].clone()
                    for q in range(p + 1):
                        slope.addcmul_(w[q], inner[:, part, p, q, None], value=1 if p == q else 2)
                    total.addcmul_(w[p], slope)
                cost[o, :, part] = total.clamp_(min=0) / size
        return cost.transpose(2, 3)


class FittedEdges(LinearEdges):
    """As above, with coefficients that are fitted to the edge; noise and mean join the basis."""

    def __init__(self, problem: Problem, objective: Objective, aims: Tensor, fit: Fit):
        super().__init__(problem, objective, aims)
        self.fit = fit
        self.capacity = fit.history * len(problem.teacher.first_outputs)
        self.constants = problem.noise, problem.teacher.sample_mean
        everywhere = torch.full((1, 1), -1, device=problem.noise.device)  # before the first node: all can be reached
        self.constant_products = tuple(self._products(everywhere, vector) for vector in self.constants)

    def observe(self, sources: Tensor, reuse_first: bool) -> None:
        velocities = self._outputs(sources, reuse_first)
        products = [self._products(sources, v) for v in velocities]
        self.state = remember_parts(self.state, velocities, self.capacity)
        self.shadow = remember_parts(self.shadow, products, self.capacity)

    def choose(self, targets: Tensor, legal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        problem, num_sources, count = self.problem, len(legal), len(self.problem.noise)
        state, shadow = unflatten(self.state, num_sources), unflatten(self.shadow, num_sources)
        basis, products = (  # P times (S, B, ...)
            [moving.x, *(vector.expand_as(moving.x) for vector in constants), *moving.outputs]
            for moving, constants in ((state, self.constants), (shadow, self.constant_products))
        )
        inner = _inner_products(problem, basis)  # (S, B, P, P)
        goals = torch.stack(
            [product[..., torch.searchsorted(self.aims, targets[:, 0])] for product in products], dim=-1
        )  # (S, B, J, P)
        ordinary = self._ordinary(num_sources, targets, len(basis))
        emphasis = torch.ones(num_sources, len(targets), count, dtype=torch.float64, device=targets.device)
        for _ in range(REWEIGHTINGS if self.objective.objective == "log_mean" else 1):
            gram = problem.collective.sum(torch.einsum("sjb,sbpq->sjpq", emphasis, inner))
            right = problem.collective.sum(torch.einsum("sjb,sbjp->sjp", emphasis, goals))
            length = gram.diagonal(
                dim1=2, dim2=3
            )  # (S, J, P); 0 for a mean of 0, whose weight is then the ordinary one
            pull = self.fit.ridge * torch.where(length > 0, length, 1.0)
            w = torch.linalg.solve(gram + torch.diag_embed(pull), right + pull * ordinary)
            cost = self._costs(inner, products, targets, [w[:, None]])
            emphasis = 1 / cost[0].clamp(min=COST_FLOOR)
        parent, _, cost = self._best(cost, legal)
        weights = w[parent[:, 0], torch.arange(len(targets), device=targets.device)]  # (J, P)
        each, rows = weights.repeat_interleave(count, 0).T, self._rows(parent)
        t_next = problem.grid[targets].expand(-1, count).flatten()
        x, x_shadow = (combine(list(each), [u[parent[:, 0]].flatten(0, 1) for u in us]) for us in (basis, products))
        self.state = replace(self.state.map(lambda old: old[rows]), x=x, t=t_next)
        self.shadow = replace(self.shadow.map(lambda old: old[rows]), x=x_shadow, t=t_next)
        return parent, torch.nn.functional.pad(weights, (0, self.capacity - len(state.outputs))), cost

    def _ordinary(self, num_sources: int, targets: Tensor, size: int) -> Tensor:
        """(S, J, P) coefficients of the solver's step, or of the Euler step where it does not predict x0."""
        problem, parts = self.problem, len(self.problem.teacher.first_outputs)
        solver = problem.solver
        if getattr(solver, "prediction", None) != "x0":
            solver = DPMSolverPP(1, lower_order_final=True)
        times = [time.unflatten(0, (num_sources, -1))[:, :1] for time in self.state.times[::parts]][: solver.order]
        a, b = solver.coefficients(times, problem.grid[targets].T)
        anchor = torch.zeros(num_sources, len(targets), size, dtype=torch.float64, device=targets.device)
        anchor[..., 0] = a
        for h, weight in enumerate(b):
            for r, share in enumerate(problem.velocity.mix):
                anchor[..., 3 + h * parts + r] = weight * share
        return anchor


def unflatten(state: State, num_nodes: int) -> State:
    """Rows (W*B,) -> (W, B)."""
    return state.map(lambda rows: rows.unflatten(0, (num_nodes, -1)))


def _inner_products(problem: Problem, basis: Sequence[Tensor]) -> Tensor:
    """basis P x (S, B, *E) -> (S, B, P, P) float64: <u_p, u_q> under the distance's features."""
    parts = []
    for first in range(0, len(problem.noise), SCORE_GROUP):
        part = slice(first, first + SCORE_GROUP)
        vectors = [_features(problem, u[:, part]) for u in basis]  # P times (g, S, F)
        slices = (torch.stack([u[..., some].double() for u in vectors], dim=2) for some in _slices(vectors[0].shape[2]))
        parts.append(sum(some @ some.mT for some in slices))  # (g, S, P, P)
    return torch.cat(parts).transpose(0, 1)


def _features(problem: Problem, states: Tensor) -> Tensor:
    """(W, g, *E) -> (g, W, F), under a linear distance."""
    features = problem.distance.features(states.flatten(0, 1), problem.grid, problem.velocity)
    return features.flatten(1).unflatten(0, states.shape[:2]).transpose(0, 1)


def _slices(features: int) -> list[slice]:
    return [slice(first, first + SCORE_FEATURES) for first in range(0, features, SCORE_FEATURES)]
