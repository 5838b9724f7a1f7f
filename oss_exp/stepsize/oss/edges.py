"""The actions of the search: scoring every step from the sources of a stage to its targets.

An edge is one step between two nodes, and an action is an edge with the order of its
step. `TriedEdges` takes every step and measures where it ends. `LinearEdges` serves a
linear multistep solver under a quadratic distance, where inner products are enough to
score a step, and takes only the best ones.

Legend: B samples, S sources, J targets (nodes (S, b) and (J, b): b is B, or 1 where all
samples have the same nodes), P basis vectors of a step, O orders, A target nodes of all
stages, *E event dims, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from oss_exp.solvers.base import LinearMultistep, State
from oss_exp.stepsize.oss.objectives import Objective, PerSample
from oss_exp.stepsize.problem import Problem

# Inner products are computed in float64, on parts of this size, which bounds the copies.
SCORE_GROUP = 16  # samples
SCORE_FEATURES = 1 << 16  # features
BLOCK = 20  # nodes


class Edges:
    """The states at the sources of a stage, and the choice of the best action into each target.

    It changes as the search goes on: `choose` replaces the states at the sources by those
    at the targets, which are the sources of the next stage.

    Attributes:
        state: the samplers' states, rows (S*B,), one block of B rows for each source.
    """

    state: State

    def __init__(self, problem: Problem, objective: Objective):
        self.problem = problem
        self.objective = objective

    def begin(self, sources: Tensor, state: State) -> None:
        """Stand at the first sources (S, b), in these states."""
        self.state = state

    def observe(self, sources: Tensor, reuse_first: bool) -> None:
        """Call the network at all sources, in one batch, and remember its outputs.

        Args:
            sources: (S, b) nodes of the states.
            reuse_first: use the teacher's own first call at node 0.
        """
        v = self.problem.velocity.combine(self._outputs(sources, reuse_first))
        self.state = self.problem.solver.observe(lambda *_: v, self.state)

    def choose(self, targets: Tensor, legal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take the best action into every target, so that the states are those at the targets.

        Args:
            targets: (J, b) nodes.
            legal: (S, J, b) edges that may be taken.

        Returns:
            Parent (J, b) as a position among the sources, order (J, b) and cost (J, B).
        """
        raise NotImplementedError

    def keep_first(self, rows: int) -> None:
        """Drop all states after so many rows."""
        self.state = self.state.map(lambda tensor: tensor[:rows])

    def _outputs(self, sources: Tensor, reuse_first: bool) -> tuple[Tensor, ...]:
        """Return the network's outputs at all sources."""
        problem, x, t = self.problem, self.state.x, self.state.t
        if not (reuse_first and bool((sources[0] == 0).all())):
            return problem.velocity.outputs(x, t)
        first = problem.teacher.first_outputs
        if len(sources) == 1:
            return first
        count = len(problem.noise)
        others = problem.velocity.outputs(x[count:], t[count:])
        return tuple(torch.cat(pair) for pair in zip(first, others, strict=True))

    def _best(self, cost: Tensor, legal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parent (J, b), order (J, b) and cost (J, B) of the cheapest legal action.

        Args:
            cost: (O, S, J, B) of all actions, orders ascending from 1.
            legal: (S, J, b) edges that may be taken.
        """
        total = self.objective(cost, self.problem.collective).masked_fill(~legal, torch.inf)
        # argmin takes the first of equals: the lowest order, then the noisiest parent, as the
        # released code does.
        best = total.flatten(0, 1).argmin(0)
        index = best.expand(-1, cost.shape[-1])[None]
        best_cost = cost.flatten(0, 1).gather(0, index)[0]
        num_sources = cost.shape[1]
        return best % num_sources, best // num_sources + 1, best_cost

    def _rows(self, parent: Tensor) -> Tensor:
        """Return the rows (J*B,) of the states of the parents (J, b)."""
        count = len(self.problem.noise)
        return (parent * count + torch.arange(count, device=parent.device)).flatten()


class TriedEdges(Edges):
    """Edges that are scored by taking every step, one target at a time.

    Solvers that are not linear multistep need this, and distances that are not quadratic.
    """

    def choose(self, targets: Tensor, legal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        problem = self.problem
        orders: Sequence[int] = [problem.solver.order]
        if isinstance(problem.solver, LinearMultistep):
            orders = range(1, len(self.state.outputs) + 1)

        parents, best_orders, costs, states = [], [], [], []
        for j, target in enumerate(targets):
            parent, position, cost, state = self._into(target, legal[:, j : j + 1], orders)
            parents.append(parent)
            # Several orders are 1, 2, ..., so the position is the order.
            best_orders.append(position if len(orders) > 1 else position * 0 + orders[0])
            costs.append(cost)
            states.append(state)

        self.state = states[0].map(lambda *rows: torch.cat(rows), *states[1:])
        return torch.cat(parents), torch.cat(best_orders), torch.cat(costs)

    def _into(
        self, target: Tensor, legal: Tensor, orders: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        """Take all steps into one target (b,) over legal edges (S, 1, b).

        Returns the parent (1, b), the position of the order in `orders` (1, b), counted
        from 1, the cost (1, B) and the state, B rows, of the best one.
        """
        problem, count = self.problem, len(self.problem.noise)

        # Sources after the last legal one are not tried.
        sources = legal[:, 0].any(1).nonzero()
        reach = int(sources.amax()) + 1 if len(sources) else 1
        near = self.state.map(lambda rows: rows[: reach * count])
        t_next = problem.grid[target].expand(count).repeat(reach)

        # All steps, and their costs (O, S, 1, B).
        ends, costs = [], []
        for order in orders:
            end = problem.solver.advance(problem.velocity, near, t_next, order)
            ends.append(end)
            costs.append(problem.cost(end.x, target))
        cost = torch.stack(costs).unflatten(1, (reach, count))[:, :, None]
        parent, position, cost = self._best(cost, legal[:reach])

        # The state of the best step of each sample.
        def stack(*rows: Tensor) -> Tensor:
            return torch.stack(rows).unflatten(1, (reach, count))

        def pick(rows: Tensor) -> Tensor:
            sample = torch.arange(count, device=target.device)
            return rows[position.expand(1, count) - 1, parent.expand(1, count), sample][0]

        state = ends[0].map(stack, *ends[1:]).map(pick)
        return parent, position, cost, state


class LinearEdges(Edges):
    """Edges that are scored from inner products, without taking a single step.

    A step ends at x = sum_p w_p u_p, where the basis u is the state and the remembered
    outputs. Its squared distance to a target, |x - T_j|^2, needs only the products
    <u_p, u_q>, <u_p, T_j> and |T_j|^2. Those with all later target nodes are kept as a
    solver's state of their own, because a linear solver moves these numbers exactly as
    it moves the states. The terms nearly cancel, so everything is float64.

    Attributes:
        target_nodes: (A,) ascending, all nodes that some step may lead to.
        target_products: `state` with inner products (S*B, A) in place of x and of each
            output: those of that tensor with the teacher at all target nodes.
    """

    target_products: State

    def __init__(self, problem: Problem, objective: Objective, target_nodes: Tensor):
        super().__init__(problem, objective)
        self.target_nodes = target_nodes

    def begin(self, sources: Tensor, state: State) -> None:
        super().begin(sources, state)
        self.target_products = replace(state, x=self._products(sources, state.x))

    def observe(self, sources: Tensor, reuse_first: bool) -> None:
        v = self.problem.velocity.combine(self._outputs(sources, reuse_first))
        products = self._products(sources, v)
        solver = self.problem.solver
        self.state = solver.observe(lambda *_: v, self.state)
        self.target_products = solver.observe(lambda *_: products, self.target_products)

    def choose(self, targets: Tensor, legal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Score all actions.
        num_sources = len(legal)
        state = unflatten(self.state, num_sources)
        products = unflatten(self.target_products, num_sources)
        inner = _gram(self.problem, [state.x, *state.outputs])
        weights = self._weights(targets, num_sources)
        cost = self._costs(inner, [products.x, *products.outputs], targets, weights)
        parent, order, cost = self._best(cost, legal)

        # Take the best ones.
        count = len(self.problem.noise)
        rows = self._rows(parent)
        t_next = self.problem.grid[targets].expand(-1, count).flatten()
        orders = order.expand(-1, count).flatten()

        def advance(state: State) -> State:
            parents = state.map(lambda tensor: tensor[rows])
            return self.problem.solver.advance(self.problem.velocity, parents, t_next, orders)

        self.state = advance(self.state)
        self.target_products = advance(self.target_products)
        return parent, order, cost

    def keep_first(self, rows: int) -> None:
        super().keep_first(rows)
        self.target_products = self.target_products.map(lambda tensor: tensor[:rows])

    def _weights(self, targets: Tensor, num_sources: int) -> list[Tensor]:
        """Return for each order the weights (S, b, J, order + 1) of the steps to targets (J, b)."""
        solver, count = self.problem.solver, len(self.problem.noise)
        assert isinstance(solver, LinearMultistep)

        # Times (S, b, 1) of the outputs; samples that share a path share its times.
        num_paths = count if isinstance(self.objective, PerSample) else 1
        times = []
        for time in self.state.times:
            times.append(time.unflatten(0, (num_sources, count))[:, :num_paths, None])
        t_next = self.problem.grid[targets].T[None]  # (1, b, J)

        weights = []
        for order in range(1, len(times) + 1):
            a, b = solver.coefficients(times[:order], t_next)
            weights.append(torch.stack(torch.broadcast_tensors(a, *b), dim=-1))
        return weights

    def _products(self, nodes: Tensor, vectors: Tensor) -> Tensor:
        """Return <u, T_j> for vectors u and all target nodes j, both as the distance's features.

        Nodes are taken in blocks. Targets that no node of a block can step to are left
        out for all of the block.

        Args:
            nodes: (W, b) ascending.
            vectors: (W*B, *E) at these nodes.

        Returns:
            (W*B, A) float64, 0 for targets that are left out.
        """
        problem, count = self.problem, len(self.problem.noise)
        vectors = vectors.unflatten(0, (-1, count))
        shape = (*vectors.shape[:2], len(self.target_nodes))
        result = torch.zeros(shape, dtype=torch.float64, device=vectors.device)
        for first in range(0, count, SCORE_GROUP):
            # Features of some samples: vectors (g, W, F), and A targets (g, F).
            part = slice(first, first + SCORE_GROUP)
            u = _features(problem, vectors[:, part])
            targets = []
            for node in self.target_nodes:
                targets.append(problem.teacher.targets[node][part].flatten(1))

            for columns in _slices(u.shape[2]):
                left = u[..., columns].double()
                right = torch.stack([target[:, columns] for target in targets], dim=1).double()
                for start in range(0, len(nodes), BLOCK):
                    rows = slice(start, start + BLOCK)
                    lowest = nodes[start].min()
                    low = int(torch.searchsorted(self.target_nodes, lowest, right=True))
                    block = torch.bmm(left[:, rows], right[:, low:].mT)
                    result[rows, part, low:] += block.transpose(0, 1)
        return result.flatten(0, 1)

    def _costs(
        self, inner: Tensor, products: Sequence[Tensor], targets: Tensor, weights: Sequence[Tensor]
    ) -> Tensor:
        """Return the mean squared distance of every step to the teacher.

        Args:
            inner: (S, B, P, P) inner products of the basis.
            products: P times (S, B, A), those of the basis with the targets.
            targets: (J, b) nodes.
            weights: (S, b, J, p) for each order, p <= P.

        Returns:
            (O, S, J, B) float64.
        """
        problem = self.problem
        num_sources, count = inner.shape[:2]
        size = problem.teacher.targets[0][0].numel()
        shape = (len(weights), num_sources, count, len(targets))
        cost = torch.empty(shape, dtype=torch.float64, device=targets.device)
        nodes = targets.T.expand(count, -1).contiguous()  # (B, J)
        for first in range(0, count, SCORE_GROUP):
            # Products with the targets of this stage, P times (S, g, J), and |T_j|^2.
            part = slice(first, first + SCORE_GROUP)
            columns = torch.searchsorted(self.target_nodes, nodes[part])
            columns = columns[None].expand(num_sources, -1, -1)
            crossed = [u[:, part].gather(2, columns).mul_(-2) for u in products]
            norm = problem.teacher.target_norms.T[part].gather(1, nodes[part])[None]

            # |sum_p w_p u_p - T_j|^2, one p after the other.
            for o, table in enumerate(weights):
                shared = table.shape[1] == 1
                w = (table if shared else table[:, part]).unbind(-1)
                total = norm.repeat(num_sources, 1, 1)
                for p in range(len(w)):
                    slope = crossed[p].clone()
                    for q in range(p + 1):
                        factor = 1 if p == q else 2
                        slope.addcmul_(w[q], inner[:, part, p, q, None], value=factor)
                    total.addcmul_(w[p], slope)
                cost[o, :, part] = total.clamp_(min=0) / size
        return cost.transpose(2, 3)


def unflatten(state: State, num_nodes: int) -> State:
    """Return a state of rows (W*B,) as one of (W, B)."""
    return state.map(lambda rows: rows.unflatten(0, (num_nodes, -1)))


def _gram(problem: Problem, basis: Sequence[Tensor]) -> Tensor:
    """Return the inner products (S, B, P, P) of the features of P vectors (S, B, *E)."""
    parts = []
    for first in range(0, len(problem.noise), SCORE_GROUP):
        part = slice(first, first + SCORE_GROUP)
        vectors = [_features(problem, u[:, part]) for u in basis]  # P times (g, S, F)
        parts.append(inner_products(vectors, vectors))
    return torch.cat(parts).transpose(0, 1)


def inner_products(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return all inner products of two lists of vectors, (..., P, Q) float64.

    Args:
        first: P vectors (..., F).
        second: Q vectors (..., F); the same list as `first` saves a copy.
    """
    parts = []
    for columns in _slices(first[0].shape[-1]):
        left = torch.stack([u[..., columns].double() for u in first], dim=-2)
        right = left
        if second is not first:
            right = torch.stack([u[..., columns].double() for u in second], dim=-2)
        parts.append(left @ right.mT)
    return sum(parts[1:], parts[0])


def _features(problem: Problem, states: Tensor) -> Tensor:
    """Return the features (g, W, F) of states (W, g, *E), under a linear distance."""
    # A linear distance ignores the times and the network.
    features = problem.distance.features(states.flatten(0, 1), problem.grid, problem.velocity)
    return features.flatten(1).unflatten(0, states.shape[:2]).transpose(0, 1)


def _slices(features: int) -> list[slice]:
    """Return slices of all features, SCORE_FEATURES each."""
    return [slice(first, first + SCORE_FEATURES) for first in range(0, features, SCORE_FEATURES)]
