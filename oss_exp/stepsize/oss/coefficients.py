"""Coefficients along a path: every step gets its own, fitted in closed form.

A step from node i to node j is x_j = sum_p w_p u_p, over its basis u = (x_i, noise,
mean, all predictions of x0 so far, newest first). The weights w are ridge least squares
over all samples against the teacher's state at j: a P x P solve from inner products,
without a network call.

Legend: B samples, k nodes, P basis vectors of a step, R outputs of a guided call, *E
event dims, F features.
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

REWEIGHTINGS = 4  # least squares solved for a mean of roots or logarithms


@dataclass(frozen=True)
class Fit:
    """Settings of the fit.

    Args:
        history: calls whose predictions a step may use; None means all so far.
        ridge: pull of w towards the ordinary step, relative to each vector's mean
            square.
    """

    history: int | None = None
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        if self.history is not None:
            require_range(at_least=1, history=self.history)
        require_range(above=0, ridge=self.ridge)


@dataclass(frozen=True, eq=False)
class FittedPath:
    """The path of a student whose steps have fitted coefficients.

    Attributes:
        nodes: (k, 1) nodes of its network calls.
        weights: (k, P) weights of its steps.
        costs: (k, B) distance of each sample to the teacher after every step.
    """

    nodes: Tensor
    weights: Tensor
    costs: Tensor


class Step(NamedTuple):
    """A step of a student.

    Attributes:
        state: its end, before the network call there.
        weights: (P,) its weights.
        cost: (B,) distance of each sample to the teacher at its end.
    """

    state: State
    weights: Tensor
    cost: Tensor


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A student after its network call at a node, from which its run can go on.

    Attributes:
        step: the step that led here.
        state: with the predictions of x0 so far, newest first.
        gram: (B, P, P) float64 inner products of the basis of the next step.
    """

    step: Step
    state: State
    gram: Tensor


class FittedStudent:
    """A student of fitted steps along any path of nodes.

    Attributes:
        highest: the highest order of a step; 0, because fitted steps have no order.
    """

    highest = 0

    def __init__(self, problem: Problem, start: StartKind, objective: Shared, fit: Fit):
        self.problem = problem
        self.objective = objective
        self.fit = fit
        self.start: StartKind = start
        self.reweightings = 1 if objective.objective == "mean" else REWEIGHTINGS
        self.constants = (problem.noise, problem.teacher.sample_mean)
        self.parts = len(problem.teacher.first_outputs)

    def run(
        self,
        path: FittedPath | SolverPath,
        checkpoints: Sequence[Checkpoint] = (),
        first: int = 0,
    ) -> tuple[FittedPath, list[Checkpoint], Tensor]:
        """Fit and sample along a path, from its node `first` on.

        Args:
            path: the nodes to call the network at.
            checkpoints: those of an earlier run, of which the ones before position
                `first` are used.
            first: position on the path, 0 to k; k samples the last step only.

        Returns:
            The path with its coefficients, its k checkpoints, and its final error (1,)
            under the objective.
        """
        problem = self.problem
        nodes = path.nodes[:, 0].tolist()

        # Steps and network calls.
        reached = list(checkpoints[:first])
        for r in range(first, len(nodes)):
            if r == 0:
                step = self._start(path.nodes[:1])
                reached.append(self._called(step, nodes[r], None))
            else:
                step = self._step(reached[-1], nodes[r])
                reached.append(self._called(step, nodes[r], reached[-1]))
        last = self._step(reached[-1], problem.num_nodes)
        steps = [checkpoint.step for checkpoint in reached[1:]]
        steps.append(last)

        # Weights as rows of one length.
        capacity = 3 + self.parts * (self.fit.history or len(nodes))
        weights = last.weights.new_zeros(len(steps), capacity)
        for row, step in zip(weights, steps, strict=True):
            row[: len(step.weights)] = step.weights
        costs = torch.stack([step.cost for step in steps])

        end = torch.tensor([problem.num_nodes], device=problem.noise.device)
        error = self.objective(problem.cost(last.state.x, end), problem.collective)
        return FittedPath(path.nodes, weights, costs), reached, error

    def merge(
        self,
        better: Tensor,
        new: tuple[FittedPath, list[Checkpoint]],
        old: tuple[FittedPath, list[Checkpoint]],
    ) -> tuple[FittedPath, list[Checkpoint]]:
        """Return the new path and checkpoints: one path serves all samples, and it is better."""
        return new

    def _start(self, nodes: Tensor) -> Step:
        """Return the step of no weights that leads to the first node, nodes (1, 1)."""
        state = start_states(self.problem, nodes, self.start)
        no_weights = self.problem.grid.new_zeros(0)
        return Step(state, no_weights, self.problem.grid.new_zeros(len(state.x)))

    def _called(self, step: Step, node: int, before: Checkpoint | None) -> Checkpoint:
        """Call the network at the end of a step, and add its predictions to the basis.

        Args:
            step: leads to the node.
            node: where the network is called; at node 0 the teacher's first call
                serves.
            before: the checkpoint at the step's other end.
        """
        problem, state = self.problem, step.state
        if node == 0:
            outputs = problem.teacher.first_outputs
        else:
            outputs = problem.velocity.outputs(state.x, state.t)
        capacity = self.parts * self.fit.history if self.fit.history else sys.maxsize
        state = remember_parts(state, outputs, capacity)

        # Inner products of the new vectors, the state and its R predictions, with all.
        parts = self.parts
        new = [state.x, *state.outputs[:parts]]
        old = [*self.constants, *state.outputs[parts:]]
        inner = self._products(new, new)
        crossed = self._products(new, old)
        if before is None:
            earlier = self._products(old, old)
        else:
            columns = slice(1, 1 + len(old))
            earlier = before.gram[:, columns, columns]
        top = torch.cat([inner, crossed], dim=2)
        bottom = torch.cat([crossed.mT, earlier], dim=2)
        gram = torch.cat([top, bottom], dim=1)

        # From (x, R predictions, noise, mean, ...) to the order of the basis.
        order = [0, parts + 1, parts + 2, *range(1, parts + 1)]
        order += range(parts + 3, len(new) + len(old))
        return Checkpoint(step, state, gram[:, order][:, :, order])

    def _step(self, checkpoint: Checkpoint, node: int) -> Step:
        """Return the fitted step from a checkpoint to a later node."""
        problem, state, gram = self.problem, checkpoint.state, checkpoint.gram
        basis = [state.x, *self.constants, *state.outputs]
        target = problem.teacher.targets[node].flatten(1)
        features = [self._features(u) for u in basis]
        products = inner_products(features, [target])[..., 0]  # (B, P)
        norm = problem.teacher.target_norms[node]
        ordinary = self._ordinary(state, node, len(basis))

        # Ridge least squares, with weights on the samples from the last fit.
        weights = ordinary
        cost = norm
        emphasis = self.objective.emphasis(torch.ones_like(norm))
        for _ in range(self.reweightings):
            matrix = problem.collective.sum(torch.einsum("b,bpq->pq", emphasis, gram))
            right = problem.collective.sum(torch.einsum("b,bp->p", emphasis, products))
            norms = matrix.diagonal()  # where 0, as of a mean of 0, w is the ordinary one
            pull = self.fit.ridge * torch.where(norms > 0, norms, 1.0)
            weights = torch.linalg.solve(matrix + torch.diag(pull), right + pull * ordinary)
            square = torch.einsum("p,bpq,q->b", weights, gram, weights)
            cost = norm - 2 * products @ weights + square
            cost = cost.clamp(min=0) / target.shape[1]
            emphasis = self.objective.emphasis(cost)

        x = combine(list(weights), basis)
        t = problem.grid[node].expand_as(state.t)
        return Step(replace(state, x=x, t=t), weights, cost)

    def _ordinary(self, state: State, node: int, size: int) -> Tensor:
        """Return the weights (P,) of an ordinary step, towards which the ridge pulls.

        It is the solver's step of its highest order, or Euler's where it does not
        predict x0.
        """
        problem, solver = self.problem, self.problem.solver
        if not (isinstance(solver, LinearMultistep) and solver.prediction == "x0"):
            solver = DPMSolverPP(1, lower_order_final=True)
        times = [time[:1] for time in state.times[:: self.parts]]
        a, b = solver.coefficients(times[: solver.order], problem.grid[node])

        weights = problem.grid.new_zeros(size)
        weights[0] = a.squeeze()
        for h, weight in enumerate(b):
            for r, share in enumerate(problem.velocity.mix):
                weights[3 + h * self.parts + r] = weight.squeeze() * share
        return weights

    def _products(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        """Return the inner products (B, P, Q) of the features of P and Q vectors (B, *E)."""
        left = [self._features(u) for u in first]
        if second is first:
            return inner_products(left, left)
        return inner_products(left, [self._features(u) for u in second])

    def _features(self, vectors: Tensor) -> Tensor:
        """Return the features (B, F) of vectors (B, *E); a quadratic distance's are linear."""
        problem = self.problem
        return problem.distance.features(vectors, problem.grid, problem.velocity).flatten(1)
