"""Polish: a schedule's weights and times improved together, by Gauss-Newton on the final error.

Coefficients that are fitted step by step bring each state close to the teacher's, but
only the last state counts. How it changes with every weight and time is measured: each
of them is changed a little, and the steps after it are run again. So a polish costs
network calls and no gradients, and works with networks that have none.

Legend: B samples, K steps, P basis vectors of a step, R outputs of a guided call, C
changes, *E event dims, F features, b samples of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.schedule import Analytic, FittedSteps, Pinned, StepSchedule, analytic_jump
from oss_exp.solvers.base import State
from oss_exp.solvers.sampling import FittedSolver
from oss_exp.stepsize.oss.edges import inner_products
from oss_exp.stepsize.oss.objectives import Mean, Shared, slope
from oss_exp.stepsize.problem import Problem
from oss_exp.stepsize.solver_weights import as_fitted
from oss_exp.stepsize.split import split_samples

# Levenberg's dampings; smaller ones allow weights that float32 states cannot carry.
DAMPINGS = tuple(10.0**power for power in range(1, -8, -1))
REUSES = 3  # steps with the same slopes and new residuals
WEIGHT_CHANGE = 1e-2  # large enough for a network of half precision to see
TIME_CHANGE = 1e-2  # relative to the distance to the nearer time


@torch.no_grad()
def polish(
    problem: Problem,
    steps: StepSchedule,
    iterations: int = 10,
    objective: Mean = "log_mean",
    fixed: Tensor | None = None,
    micro_batch: int = 16,
) -> StepSchedule:
    """Return the schedule with better weights and times, as fitted steps.

    A solver's steps become fitted ones first, exactly. Three of four search samples
    train (`split_samples`). The others choose the damping of each step, and end the
    polish where no damping makes them better: on them the result is never worse than
    `steps`.

    Args:
        problem: the search set and its teacher.
        steps: the schedule to improve.
        iterations: the most iterations; each measures the slopes once, for a few steps.
        objective: which mean of the samples' errors is lowered, as in `OSSShared`.
        fixed: times that stay.
        micro_batch: samples that are run at a time, each with all changes of a step.

    Raises:
        ValueError: the distance is not a square, the velocity cannot be cut to some
            samples, or there are fewer than four samples.
    """
    require_range(at_least=1, iterations=iterations, micro_batch=micro_batch)
    if problem.distance.norm != 2:
        raise ValueError("polish solves least squares; it needs a distance with norm=2")
    if not problem.velocity.divisible:
        raise ValueError(
            "polish trains on some of the samples, and a plain function knows all of them at once; "
            "use a BoundVelocity"
        )

    run = _Run(problem, as_fitted(problem, steps), objective, fixed, micro_batch)
    train, judge = split_samples(problem, 4)
    values = run.start
    error = run.error(values, judge)
    for _ in range(iterations):
        before = error
        slopes = run.slopes(values, train)
        for _ in range(REUSES):
            # One step for each damping; the best one is taken.
            gradient, curvature = run.normal_equations(values, slopes)
            moved = [run.moved(values, gradient, curvature, damping) for damping in DAMPINGS]
            errors = [run.error(candidate, judge) for candidate in moved]
            if min(errors) >= error:
                break
            error = min(errors)
            values = moved[errors.index(error)]
        if error == before:
            break
    return run.schedule(values)


def polish_calls(
    num_steps: int, iterations: int, history: int | None = None, parts: int = 1
) -> int:
    """Return the network calls per search sample of a polish.

    Args:
        num_steps: K.
        iterations: how many are made.
        history: calls whose predictions a step may use; None means all so far.
        parts: R.
    """
    if iterations == 0:
        return 0

    # Changes, each with the calls that follow it.
    changes = sum(range(1, num_steps + 1))  # of the times
    for step in range(num_steps):
        vectors = 2 + parts * min(step + 1, history or num_steps)
        changes += vectors * (num_steps - 1 - step)

    # Three quarters of the samples train, one quarter checks.
    trained = 3 * (changes + (1 + REUSES) * num_steps)
    checked = REUSES * len(DAMPINGS) * num_steps
    return (num_steps + iterations * (trained + checked)) // 4


@dataclass(frozen=True, eq=False)
class _Values:
    """The values that are polished: times (K+1,) and weights (K, P)."""

    times: Tensor
    weights: Tensor


class _Slopes(NamedTuple):
    """The derivatives of some samples' last features by every value.

    Attributes:
        problem: these b samples.
        mean: (b, *E) mean clean sample of their conditions.
        changes: C derivatives (b, F).
        gram: (b, C, C) inner products of the derivatives.
    """

    problem: Problem
    mean: Tensor
    changes: list[Tensor]
    gram: Tensor


class _Run:
    """A student of fitted steps on a search problem, at any values of its times and weights.

    Attributes:
        start: the values of the given schedule.
        times: steps whose time may move.
        columns: for each step, the basis vectors whose weights may change.
    """

    def __init__(
        self,
        problem: Problem,
        steps: StepSchedule,
        objective: Mean,
        fixed: Tensor | None,
        micro_batch: int,
    ):
        assert isinstance(steps.steps, FittedSteps)
        device = problem.noise.device
        self.problem = problem
        self.steps = steps
        self.fitted = steps.steps
        self.objective = Shared(objective)
        self.micro_batch = micro_batch
        self.start = _Values(steps.times.to(device), self.fitted.weights.to(device))
        self.end = torch.tensor([problem.num_nodes], device=device)
        self.mean = problem.teacher.sample_mean

        # Times that may move.
        stays = torch.isin(self.start.times, self.start.times[:0] if fixed is None else fixed)
        stays[0] |= isinstance(steps.start, Pinned)
        self.times = [step for step in range(steps.num_steps) if not stays[step]]

        # Weights of all vectors that a step has; that of x only where the others do not span it.
        parts = len(problem.velocity.mix)
        capacity = self.start.weights.shape[1] - 3
        self.columns: list[list[int]] = []
        for step in range(steps.num_steps):
            predictions = (step + 1) * parts
            columns = [1, 2, *range(3, 3 + min(predictions, capacity))]
            if predictions > capacity:
                columns.insert(0, 0)
            self.columns.append(columns)

    def schedule(self, values: _Values) -> StepSchedule:
        """Return the schedule with these values."""
        fitted = replace(self.fitted, weights=values.weights.cpu())
        return replace(self.steps, times=values.times.cpu(), steps=fitted)

    def error(self, values: _Values, rows: Tensor) -> float:
        """Return the objective over some samples, rows (B,) bool, of all ranks.

        It is infinite where the times are not those of a schedule.
        """
        total = self.problem.collective.sum(rows.sum())
        if total == 0:
            raise ValueError(
                "polish checks itself on every fourth search sample: it needs four or more"
            )
        limit = values.times.new_tensor([self.steps.start_time])
        if bool((values.times.diff() >= 0).any()) or bool(values.times[:1] > limit):
            return math.inf
        costs = [self.problem.grid.new_zeros(0)]
        for part, mean in self._parts(rows):
            states, _ = self._run(part, mean, values)
            costs.append(part.cost(states[-1].x, self.end))
        error = float(self.objective(torch.cat(costs), self.problem.collective)) / float(total)
        return error if math.isfinite(error) else math.inf

    def slopes(self, values: _Values, rows: Tensor) -> list[_Slopes]:
        """Measure the slopes of some samples of this rank, rows (B,) bool."""
        slopes = []
        for part, mean in self._parts(rows):
            states, observed = self._run(part, mean, values)
            features = self._features(part, states[-1].x)
            changes = []
            for size, end in self._changed(part, mean, values, states, observed):
                changes.append((self._features(part, end) - features) / size)
            slopes.append(_Slopes(part, mean, changes, inner_products(changes, changes)))
        return slopes

    def normal_equations(self, values: _Values, slopes: Sequence[_Slopes]) -> tuple[Tensor, Tensor]:
        """Return half the gradient (C,) and half the Gauss-Newton matrix (C, C) over all ranks.

        Args:
            values: where the residuals are measured.
            slopes: measured there or nearby.
        """
        count = len(self.times) + sum(map(len, self.columns))
        gradient = self.problem.grid.new_zeros(count)
        curvature = self.problem.grid.new_zeros(count, count)
        for part, mean, changes, gram in slopes:
            states, _ = self._run(part, mean, values)
            target = part.teacher.targets[-1].flatten(1)
            residual = self._features(part, states[-1].x) - target
            products = inner_products(changes, [residual])[..., 0]

            square = residual.double().square().sum(1)
            emphasis = slope(square, self.objective.objective)
            gradient += emphasis @ products
            curvature += torch.einsum("b,bpq->pq", emphasis, gram)
        collective = self.problem.collective
        return collective.sum(gradient), collective.sum(curvature)

    def moved(
        self, values: _Values, gradient: Tensor, curvature: Tensor, damping: float
    ) -> _Values:
        """Return the values after a step of Levenberg and Marquardt."""
        # A zero on the diagonal, as of a mean of 0: that weight stays.
        diagonal = curvature.diagonal()
        pull = torch.where(diagonal > 0, damping * diagonal, 1.0)
        change = -torch.linalg.solve(curvature + torch.diag(pull), gradient)

        # The changes of the times come first, then those of the weights, step by step.
        times = values.times.clone()
        weights = values.weights.clone()
        times[self.times] += change[: len(self.times)]
        position = len(self.times)
        for step, columns in enumerate(self.columns):
            weights[step, columns] += change[position : position + len(columns)]
            position += len(columns)
        return _Values(times, weights)

    def _parts(self, rows: Tensor) -> Iterator[tuple[Problem, Tensor]]:
        """Yield the problem of a few of the samples at a time, and their mean (b, *E)."""
        positions = rows.nonzero()[:, 0]
        if len(positions) == 0:  # a rank may hold none
            return
        for part in positions.split(self.micro_batch):
            yield self.problem.subset(part), self.mean[part]

    def _features(self, part: Problem, x0: Tensor) -> Tensor:
        """Return the features (b, F) of last states (b, *E)."""
        return part.distance.features(x0, part.grid[-1:].expand(len(x0)), part.velocity).flatten(1)

    def _run(self, part: Problem, mean: Tensor, values: _Values) -> tuple[list[State], list[State]]:
        """Return the states before all network calls and at the end, K+1, and those after, K."""
        solver = FittedSolver(values.weights, (part.noise, mean))
        first = values.times[0]
        states = [solver.init(self._first(part, mean, first), first)]
        observed = []
        for t in values.times[1:]:
            observed.append(solver.observe(part.velocity, states[-1]))
            states.append(solver.advance(part.velocity, observed[-1], t))
        return states, observed

    def _first(self, part: Problem, mean: Tensor, t: Tensor) -> Tensor:
        """Return the first state (b, *E), at time t."""
        if isinstance(self.steps.start, Analytic):
            return analytic_jump(part.noise, mean, self.steps.start_time, t)
        return part.noise

    def _changed(
        self,
        part: Problem,
        mean: Tensor,
        values: _Values,
        states: list[State],
        observed: list[State],
    ) -> Iterator[tuple[float, Tensor]]:
        """Yield the size of every change and the last state (b, *E) that it leads to.

        They come in the order of the values in `normal_equations`.
        """
        # Times.
        before = torch.cat([values.times.new_tensor([self.steps.start_time]), values.times])
        for step in self.times:
            earlier, t, later = before[step : step + 3]
            gap = t - later if earlier == t else torch.minimum(earlier - t, t - later)
            size = TIME_CHANGE * gap
            x = self._first(part, mean, t - size) if step == 0 else states[step].x
            changed = replace(states[step], x=x, t=states[step].t - size)
            yield -float(size), self._finish(part, mean, values, changed)

        # Weights, all those of a step in one batch.
        for step, columns in enumerate(self.columns):
            count = len(columns)
            vectors = [observed[step].x, part.noise, mean, *observed[step].outputs]
            changes = WEIGHT_CHANGE * torch.cat([vectors[p] for p in columns])
            copies = states[step + 1].map(partial(_repeated, count=count))
            changed = replace(copies, x=copies.x + changes)
            for end in self._finish(part, mean, values, changed).chunk(count):
                yield WEIGHT_CHANGE, end

    def _finish(self, part: Problem, mean: Tensor, values: _Values, state: State) -> Tensor:
        """Return the last states (M, *E) of states (M, *E) before their network call.

        M is a multiple of b.
        """
        copies = len(state.x) // len(mean)
        constants = _repeated(part.noise, copies), _repeated(mean, copies)
        solver = FittedSolver(values.weights, constants)
        for t in values.times[state.step + 1 :]:
            state = solver.advance(part.velocity, solver.observe(part.velocity, state), t)
        return state.x


def _repeated(tensor: Tensor, count: int) -> Tensor:
    """Return a tensor (M, ...) with its rows so many times, (count * M, ...)."""
    return tensor.repeat(count, *[1] * (tensor.ndim - 1))
