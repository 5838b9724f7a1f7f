"""Coefficients along a path: every step of given nodes gets coefficients of its own, in closed form.

A step from node i to node j is x_j = sum_p w_p u_p over its basis u = (x_i, noise, mean, all predictions of x0 so far,
newest first). The weights w are ridge least squares over all samples against the teacher's state at j: a P x P solve
from inner products, which costs no network call.

Legend: B samples, k nodes, P basis vectors of a step, R outputs of a guided call, *E event dims.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.schedule import StartKind
from oss_exp.solvers.base import LinearMultistep, State, combine
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.solvers.sampling import remember_parts
from oss_exp.stepsize.oss.edges import inner_products
from oss_exp.stepsize.oss.objectives import Shared
from oss_exp.stepsize.oss.recursion import SolverPath, start_states
from oss_exp.stepsize.problem import Problem

REWEIGHTINGS = 4  # least squares solved for a mean of logarithms


@dataclass(frozen=True)
class Fit:
    """How coefficients are fitted.

    history: calls whose predictions a step may use; None: all so far.
    ridge:   relative to each vector's mean square, pulls w towards the ordinary step.
    """

    history: int | None = None
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        if self.history is not None:
            require_range(at_least=1, history=self.history)
        require_range(above=0, ridge=self.ridge)


@dataclass(frozen=True, eq=False)
class FittedPath:
    """The nodes (k, 1) of a student's calls, and the weights (k, P) of its fitted steps.

    costs (k, B): each sample's distance to the teacher after every step.
    """

    nodes: Tensor
    weights: Tensor
    costs: Tensor


class Step(NamedTuple):
    """A step's end, not yet observed, its weights (P,), and each sample's distance (B,) to the teacher there."""

    state: State
    weights: Tensor
    cost: Tensor


@dataclass(frozen=True, eq=False)
class Stage:
    """A student after its network call at a node.

    step:  the step that led here.
    state: with the predictions of x0 so far, newest first.
    gram:  (B, P, P) float64 inner products of the basis of the next step.
    """

    step: Step
    state: State
    gram: Tensor


class FittedStudent:
    """A student of fitted steps along any path of nodes; what comes before a change of the path is kept."""

    highest = 0  # its steps have no order

    def __init__(self, problem: Problem, start: StartKind, objective: Shared, fit: Fit):
        self.problem, self.objective, self.fit = problem, objective, fit
        self.start: StartKind = start
        self.rounds = REWEIGHTINGS if objective.objective == "log_mean" else 1
        self.constants = problem.noise, problem.teacher.sample_mean
        self.parts = len(problem.teacher.first_outputs)

    def run(
        self, path: FittedPath | SolverPath, kept: Sequence[Stage] = (), first: int = 0
    ) -> tuple[FittedPath, list[Stage], Tensor]:
        """Sample from node `first` of a path on; kept[r] is the stage at node r < first.

        Returns the path with its coefficients, its k stages, and its final error under the objective, (1,).
        """
        problem, nodes = self.problem, path.nodes
        stages = list(kept[:first])
        for r in range(first, len(nodes)):
            step = self._start(nodes[:1]) if r == 0 else self._step(stages[-1], int(nodes[r]))
            stages.append(self._called(step, int(nodes[r]), stages[-1] if stages else None))
        last = self._step(stages[-1], problem.num_nodes)

        steps = [*(stage.step for stage in stages[1:]), last]
        capacity = 3 + self.parts * (self.fit.history or len(nodes))
        weights = torch.stack(
            [torch.nn.functional.pad(w, (0, capacity - len(w))) for _, w, _ in steps]
        )
        costs = torch.stack([cost for *_, cost in steps])
        end = torch.tensor([problem.num_nodes], device=problem.noise.device)
        error = self.objective(problem.cost(last.state.x, end), problem.collective)
        return FittedPath(nodes, weights, costs), stages, error

    def merge(
        self,
        better: Tensor,
        new: tuple[FittedPath, list[Stage]],
        old: tuple[FittedPath, list[Stage]],
    ) -> tuple[FittedPath, list[Stage]]:
        """The new path and stages: there is one path for all samples, and it is better."""
        return new

    def _start(self, nodes: Tensor) -> Step:
        state = start_states(self.problem, nodes, self.start)
        return Step(
            state, self.problem.grid.new_zeros(0), self.problem.grid.new_zeros(len(state.x))
        )

    def _called(self, step: Step, node: int, before: Stage | None) -> Stage:
        """The network's answer at a node joins the basis; the teacher's own first call serves node 0."""
        problem, state = self.problem, step.state
        outputs = (
            problem.teacher.first_outputs
            if node == 0
            else problem.velocity.outputs(state.x, state.t)
        )
        capacity = self.parts * self.fit.history if self.fit.history else sys.maxsize
        state = remember_parts(state, outputs, capacity)

        # Inner products of what is new, the state and its R predictions, with all; the others are known.
        fresh = [state.x, *state.outputs[: self.parts]]
        same = [*self.constants, *state.outputs[self.parts :]]
        old = slice(1, 1 + len(same))
        known = self._products(same, same) if before is None else before.gram[:, old, old]
        new, crossed = self._products(fresh, fresh), self._products(fresh, same)
        gram = torch.cat(
            [torch.cat([new, crossed], dim=2), torch.cat([crossed.mT, known], dim=2)], dim=1
        )
        parts = self.parts  # from (x, R predictions, noise, mean, ...) to the order of the basis
        order = [
            0,
            parts + 1,
            parts + 2,
            *range(1, parts + 1),
            *range(parts + 3, len(fresh) + len(same)),
        ]
        return Stage(step, state, gram[:, order][:, :, order])

    def _step(self, stage: Stage, node: int) -> Step:
        """The step to a later node."""
        problem, sum_over_ranks = self.problem, self.problem.collective.sum
        basis = [stage.state.x, *self.constants, *stage.state.outputs]
        target = problem.teacher.targets[node].flatten(1)
        aim = inner_products([self._features(u) for u in basis], [target])[..., 0]  # (B, P)
        length, size = problem.teacher.target_norms[node], target.shape[1]
        ordinary = self._ordinary(stage.state, node, len(basis))

        weights, cost = ordinary, length
        emphasis = self.objective.emphasis(torch.ones_like(length))
        for _ in range(self.rounds):
            gram = sum_over_ranks(torch.einsum("b,bpq->pq", emphasis, stage.gram))
            right = sum_over_ranks(torch.einsum("b,bp->p", emphasis, aim))
            norms = gram.diagonal()  # where 0, as of a mean of 0, w is the ordinary one
            pull = self.fit.ridge * torch.where(norms > 0, norms, 1.0)
            weights = torch.linalg.solve(gram + torch.diag(pull), right + pull * ordinary)
            cost = (
                length
                - 2 * aim @ weights
                + torch.einsum("p,bpq,q->b", weights, stage.gram, weights)
            )
            cost = cost.clamp(min=0) / size
            emphasis = self.objective.emphasis(cost)

        x = combine(list(weights), basis)
        t = problem.grid[node].expand_as(stage.state.t)
        return Step(replace(stage.state, x=x, t=t), weights, cost)

    def _ordinary(self, state: State, node: int, size: int) -> Tensor:
        """(P,) coefficients of the solver's step of its highest order, or of Euler's where it does not predict x0."""
        problem, solver = self.problem, self.problem.solver
        if not (isinstance(solver, LinearMultistep) and solver.prediction == "x0"):
            solver = DPMSolverPP(1, lower_order_final=True)
        times = [time[:1] for time in state.times[:: self.parts]][: solver.order]
        a, b = solver.coefficients(times, problem.grid[node])
        weights = problem.grid.new_zeros(size)
        weights[0] = a.squeeze()
        for h, weight in enumerate(b):
            for r, share in enumerate(problem.velocity.mix):
                weights[3 + h * self.parts + r] = weight.squeeze() * share
        return weights

    def _products(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        """first P x (B, *E), second Q x (B, *E) -> (B, P, Q) float64, under the distance's features."""
        left = [self._features(u) for u in first]
        return inner_products(
            left, left if second is first else [self._features(u) for u in second]
        )

    def _features(self, vectors: Tensor) -> Tensor:
        """(B, *E) -> (B, F); a quadratic distance's features are linear."""
        return self.problem.distance.features(
            vectors, self.problem.grid, self.problem.velocity
        ).flatten(1)
