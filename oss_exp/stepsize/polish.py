"""Polish: a schedule's weights and times improved together, by Gauss-Newton over the final error.

Coefficients that are fitted step by step make each state close to the teacher's. What counts is the last one, and how
it changes with every weight and time is measured: each is changed a little, and the steps after it are run again. So
a polish costs network calls and no gradients, and serves networks that have none.

Legend: B samples, K steps, P basis vectors of a step, R outputs of a guided call, C changes, *E event dims.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.schedule import Analytic, FittedSteps, Pinned, StepSchedule, analytic_jump
from oss_exp.solvers.base import State
from oss_exp.solvers.sampling import FittedSolver
from oss_exp.stepsize.oss.edges import inner_products
from oss_exp.stepsize.oss.objectives import COST_FLOOR, Mean, Shared
from oss_exp.stepsize.problem import Problem
from oss_exp.stepsize.solver_weights import as_fitted

DAMPINGS = tuple(
    10.0**power for power in range(1, -8, -1)
)  # less allows weights that float32 states cannot carry
REUSES = 3  # steps with the same slopes, whose residuals are new
WEIGHT_CHANGE = 1e-2  # large enough for a network of half precision to see
TIME_CHANGE = 1e-2  # of the distance to the nearer time


@torch.no_grad()
def polish(
    problem: Problem,
    steps: StepSchedule,
    iterations: int = 10,
    objective: Mean = "log_mean",
    fixed: Tensor | None = None,
    micro_batch: int = 16,
) -> StepSchedule:
    """Return the schedule with better weights and times, as fitted steps; a solver's steps become such first, exactly.

    Three of four search samples (by their global number, so that the ranks' shares do not matter) are trained on. The
    others choose each step's damping (Levenberg's, relative to the diagonal), and end the polish where none makes them
    better: on them the result is never worse than `steps`. An iteration measures the slopes, for a few steps. Times
    among `fixed` stay.
    `micro_batch` samples are looked at at a time, each with all changes of a step.
    Raises ValueError where the distance has no squares, or where there are fewer than four samples.
    """
    require_range(at_least=1, iterations=iterations, micro_batch=micro_batch)
    if problem.distance.norm != 2:
        raise ValueError("polish solves least squares; it needs a distance with norm=2")
    if not problem.velocity.divisible:
        raise ValueError(
            "polish trains on some of the samples, and a plain function knows all; use a BoundVelocity"
        )

    run = _Run(problem, as_fitted(problem, steps), objective, fixed, micro_batch)
    train = problem.samples % 4 != 3
    values = run.start
    error = run.error(values, ~train)
    for _ in range(iterations):
        slopes, before = run.slopes(values, train), error
        for _ in range(REUSES):
            gradient, curvature = run.normal_equations(values, slopes)
            tried = [run.moved(values, gradient, curvature, damping) for damping in DAMPINGS]
            errors = [run.error(each, ~train) for each in tried]
            if min(errors) >= error:
                break
            error = min(errors)
            values = tried[errors.index(error)]
        if error == before:
            break
    return run.schedule(values)


def polish_calls(
    num_steps: int, iterations: int, history: int | None = None, parts: int = 1
) -> int:
    """Network calls per search sample of so many iterations."""
    if iterations == 0:
        return 0
    vectors = [2 + parts * min(step + 1, history or num_steps) for step in range(num_steps)]
    changes = sum(columns * (num_steps - 1 - step) for step, columns in enumerate(vectors))
    changes += sum(range(1, num_steps + 1))  # of the times
    trained, checked = 3 * (changes + (1 + REUSES) * num_steps), REUSES * len(DAMPINGS) * num_steps
    return (num_steps + iterations * (trained + checked)) // 4


@dataclass(frozen=True, eq=False)
class _Values:
    """What is polished: the times (K+1,) and the weights (K, P)."""

    times: Tensor
    weights: Tensor


class _Slopes(NamedTuple):
    """Of some samples, with their mean (b, *E): how the features of the last state change with everything.

    changes: C x (b, F). gram: (b, C, C) their inner products.
    """

    problem: Problem
    mean: Tensor
    changes: list[Tensor]
    gram: Tensor


class _Run:
    """A student of fitted steps on a search problem, at any values of its times and weights."""

    def __init__(
        self,
        problem: Problem,
        steps: StepSchedule,
        objective: Mean,
        fixed: Tensor | None,
        micro_batch: int,
    ):
        assert isinstance(steps.steps, FittedSteps)
        self.problem, self.steps, self.fitted = problem, steps, steps.steps
        self.objective, self.micro_batch = Shared(objective), micro_batch
        device = problem.noise.device
        self.start = _Values(steps.times.to(device), self.fitted.weights.to(device))
        self.end = torch.tensor([problem.num_nodes], device=device)
        self.mean = problem.teacher.sample_mean

        # What changes, step by step: its time where it may move, and the weights of all vectors that there are then;
        # that of x only where the others do not span it.
        parts, capacity = len(problem.velocity.mix), self.start.weights.shape[1] - 3
        stays = torch.isin(self.start.times, self.start.times[:0] if fixed is None else fixed)
        stays[0] |= isinstance(steps.start, Pinned)
        self.times = [step for step in range(steps.num_steps) if not stays[step]]
        self.columns = []
        for step in range(steps.num_steps):
            known = (step + 1) * parts
            x = [0] if known > capacity else []
            self.columns.append([*x, 1, 2, *range(3, 3 + min(known, capacity))])

    def schedule(self, values: _Values) -> StepSchedule:
        fitted = replace(self.fitted, weights=values.weights.cpu())
        return replace(self.steps, times=values.times.cpu(), steps=fitted)

    def error(self, values: _Values, chosen: Tensor) -> float:
        """The objective over the chosen samples of all ranks; infinite where the times are no schedule's."""
        total = self.problem.collective.sum(chosen.sum())
        if total == 0:
            raise ValueError(
                "polish checks itself on every fourth search sample: it needs four or more"
            )
        limit = values.times.new_tensor([self.steps.start_time])
        if bool((values.times.diff() >= 0).any()) or bool(values.times[:1] > limit):
            return math.inf
        costs = [self.problem.grid.new_zeros(0)]
        for part, mean in self._parts(chosen):
            costs.append(part.cost(self._run(part, mean, values)[0][-1].x, self.end))
        error = float(self.objective(torch.cat(costs), self.problem.collective)) / float(total)
        return error if math.isfinite(error) else math.inf

    def slopes(self, values: _Values, chosen: Tensor) -> list[_Slopes]:
        """How the last states of the chosen samples of this rank change."""
        found = []
        for part, mean in self._parts(chosen):
            states, observed = self._run(part, mean, values)
            features = self._features(part, states[-1].x)
            changes = self._changed(part, mean, values, states, observed)
            slopes = [(self._features(part, end) - features) / size for size, end in changes]
            found.append(_Slopes(part, mean, slopes, inner_products(slopes, slopes)))
        return found

    def normal_equations(self, values: _Values, slopes: Sequence[_Slopes]) -> tuple[Tensor, Tensor]:
        """Half the gradient (C,) and half the Gauss-Newton matrix (C, C) over all ranks, of slopes measured nearby."""
        count = len(self.times) + sum(map(len, self.columns))
        gradient, curvature = (
            self.problem.grid.new_zeros(count),
            self.problem.grid.new_zeros(count, count),
        )
        for part, mean, changes, gram in slopes:
            last = self._run(part, mean, values)[0][-1]
            residual = self._features(part, last.x) - part.teacher.targets[-1].flatten(1)
            right = inner_products(changes, [residual])[..., 0]
            emphasis = torch.ones_like(right[:, 0])
            if self.objective.objective == "log_mean":
                emphasis = 1 / residual.double().square().sum(1).clamp(min=COST_FLOOR)
            gradient += emphasis @ right
            curvature += torch.einsum("b,bpq->pq", emphasis, gram)
        return self.problem.collective.sum(gradient), self.problem.collective.sum(curvature)

    def moved(
        self, values: _Values, gradient: Tensor, curvature: Tensor, damping: float
    ) -> _Values:
        """The values after a step of Levenberg and Marquardt."""
        diagonal = curvature.diagonal()
        pull = torch.where(
            diagonal > 0, damping * diagonal, 1.0
        )  # 0, as of a mean of 0: that weight stays
        change = -torch.linalg.solve(curvature + torch.diag(pull), gradient)
        times, weights = values.times.clone(), values.weights.clone()
        times[self.times] += change[: len(self.times)]
        place = len(self.times)
        for step, columns in enumerate(self.columns):
            weights[step, columns] += change[place : place + len(columns)]
            place += len(columns)
        return _Values(times, weights)

    def _parts(self, chosen: Tensor) -> Iterator[tuple[Problem, Tensor]]:
        """The problem for a few of the chosen samples at a time, and their mean (b, *E)."""
        rows = chosen.nonzero()[:, 0]
        for part in rows.split(self.micro_batch) if len(rows) else ():  # a rank may hold none
            yield self.problem.subset(part), self.mean[part]

    def _features(self, part: Problem, x0: Tensor) -> Tensor:
        """(b, *E) -> (b, F)"""
        return part.distance.features(x0, part.grid[-1:].expand(len(x0)), part.velocity).flatten(1)

    def _run(self, part: Problem, mean: Tensor, values: _Values) -> tuple[list[State], list[State]]:
        """The states before each of the network calls and at the end (K+1), and those after the calls (K)."""
        solver = FittedSolver(values.weights, (part.noise, mean))
        states, observed = (
            [solver.init(self._first(part, mean, values.times[0]), values.times[0])],
            [],
        )
        for t in values.times[1:]:
            observed.append(solver.observe(part.velocity, states[-1]))
            states.append(solver.advance(part.velocity, observed[-1], t))
        return states, observed

    def _first(self, part: Problem, mean: Tensor, t: Tensor) -> Tensor:
        analytic = isinstance(self.steps.start, Analytic)
        return analytic_jump(part.noise, mean, self.steps.start_time, t) if analytic else part.noise

    def _changed(
        self,
        part: Problem,
        mean: Tensor,
        values: _Values,
        states: list[State],
        observed: list[State],
    ) -> Iterator[tuple[float, Tensor]]:
        """The size of every change, in the order of the matrix, and the last state (b, *E) that it leads to."""
        before = torch.cat([values.times.new_tensor([self.steps.start_time]), values.times])
        for step in self.times:
            earlier, t, later = before[step : step + 3]
            size = TIME_CHANGE * (
                t - later if earlier == t else torch.minimum(earlier - t, t - later)
            )
            x = self._first(part, mean, t - size) if step == 0 else states[step].x
            changed = replace(states[step], x=x, t=states[step].t - size)
            yield -float(size), self._finish(part, mean, values, changed)
        for step, columns in enumerate(self.columns):
            vectors = [observed[step].x, part.noise, mean, *observed[step].outputs]
            after, count = states[step + 1], len(columns)
            changed = after.map(
                lambda each, count=count: each.repeat(count, *[1] * (each.ndim - 1))
            )
            changed = replace(
                changed, x=changed.x + WEIGHT_CHANGE * torch.cat([vectors[p] for p in columns])
            )
            for end in self._finish(part, mean, values, changed).chunk(count):
                yield WEIGHT_CHANGE, end

    def _finish(self, part: Problem, mean: Tensor, values: _Values, state: State) -> Tensor:
        """The last state (M, *E) of a state (M, *E) before its network call, M being a multiple of b."""
        copies = len(state.x) // len(mean)
        noise, mean = (each.repeat(copies, *[1] * (each.ndim - 1)) for each in (part.noise, mean))
        solver = FittedSolver(values.weights, (noise, mean))
        for t in values.times[state.step + 1 :]:
            state = solver.advance(part.velocity, solver.observe(part.velocity, state), t)
        return state.x
