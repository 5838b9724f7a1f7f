"""The loop that runs a step schedule, which samples, evaluations and searches share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oss_exp.calibration import Calibration
from oss_exp.schedule import FittedSteps, StepSchedule, group_mean
from oss_exp.solvers.base import LinearMultistep, Solver, State, combine, named_solver
from oss_exp.solvers.euler import Euler
from oss_exp.tensors import rowwise
from oss_exp.velocity import BoundVelocity, VelocityFn

Watch = Callable[[int, Tensor], None]
"""watch(step, x0 (B, *E)): x0 = x - t v is what the step's first network call predicts."""


def walk(
    solver: Solver,
    f: VelocityFn,
    x: Tensor,
    times: Tensor,
    orders: Sequence[int | Tensor | None] | None = None,
    calibration: Calibration | None = None,
) -> Iterator[State]:
    """Yield the observed state at each time; the last one is not observed.

    Args:
        solver: takes the steps.
        f: the velocity.
        x: (M, *E) state at times[0].
        times: (K+1,) or (K+1, M) decreasing canonical times.
        orders: orders of the K steps, () or (M,) each; None means the solver's own.
        calibration: applied to the state before each step.
    """
    times = times.to(x.device)
    num_steps = len(times) - 1
    state = solver.init(x, times[0])

    for step, order in enumerate(solver.orders(num_steps) if orders is None else orders):
        if calibration is not None:
            is_last = step == num_steps - 1
            state = replace(state, x=calibration(state.x, state.t, is_last))
        state = solver.observe(f, state)
        yield state
        state = solver.advance(f, state, times[step + 1], order)
    yield state


@torch.no_grad()
def trajectory(solver: Solver, f: VelocityFn, x: Tensor, times: Tensor) -> Tensor:
    """Return the states (N+1, M, *E) at all times (N+1,), from x (M, *E) at times[0]."""
    return torch.stack([state.x for state in walk(solver, f, x, times)])


@torch.no_grad()
def sample(
    solver: Solver,
    f: VelocityFn,
    noise: Tensor,
    steps: StepSchedule,
    group: Tensor | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Run a step schedule and return the clean samples (B, *E).

    Each step has the order that the schedule stores, or else the solver's own. Fitted
    steps use only the calibration of the solver.

    Args:
        solver: takes the steps.
        f: the velocity.
        noise: (B, *E) initial noise at steps.start_time. A per-sample schedule needs one
            row for each noise, in the same order.
        steps: the schedule.
        group: (B,) condition of each sample, for the schedule's mean.
        watch: is called at each of the K steps with the predicted clean sample. It
            costs no network call.

    Raises:
        ValueError: the noise has another number of samples than a per-sample schedule,
            or the solver cannot take steps of the stored orders.
    """
    if steps.per_sample and len(steps.times) != len(noise):
        raise ValueError(
            f"the schedule has times for {len(steps.times)} samples, the noise has {len(noise)}"
        )

    # The solver that takes the steps.
    calibration = solver.amplitude_table
    solver, orders = stepper(solver, steps, noise, group)
    velocity = BoundVelocity.of(f)
    predictions: list[Tensor] = []
    if watch is not None:
        velocity = _with_predictions(velocity, predictions)

    times = steps.times.movedim(-1, 0)  # (K+1,) or (K+1, B)
    x = steps.initial_state(noise, group)
    for step, state in enumerate(walk(solver, velocity, x, times, orders, calibration)):
        x = state.x
        if watch is not None and step < steps.num_steps:
            # The newest prediction; those before it come from calls within the last step.
            watch(step, torch.cat(predictions)[-len(noise) :])
            predictions.clear()
    return x


def solver_of(steps: StepSchedule) -> Solver:
    """Return the solver that the schedule was searched with; Euler where it names none.

    Raises ValueError where the name is not a solver's of this package, or where the
    schedule names none and its steps have orders.
    """
    record = steps.about("solver")
    if not record and steps.orders is not None:
        raise ValueError(
            "the schedule has orders and names no solver; give the one they were searched with"
        )
    return named_solver(record)


def stepper(
    solver: Solver, steps: StepSchedule, noise: Tensor, group: Tensor | None
) -> tuple[Solver, list[Tensor] | None]:
    """Return the solver that takes a schedule's steps, and their K orders if it stores any.

    Args:
        solver: takes steps that are not fitted.
        steps: the schedule.
        noise: (B, *E), from which fitted steps start.
        group: (B,) condition of each sample.

    Raises:
        ValueError: the solver cannot take steps of the stored orders.
    """
    if isinstance(steps.steps, FittedSteps):
        constants = noise, group_mean(steps.steps.mean, noise, group)
        return FittedSolver(steps.steps.weights.to(noise.device), constants), None
    if steps.orders is None:
        return solver, None

    # Stored orders.
    highest = int(steps.orders.max())
    if not isinstance(solver, LinearMultistep):
        raise ValueError(
            f"the schedule has an order for each step, {solver} takes none; choose run_orders=fixed"
        )
    if highest > solver.order:
        raise ValueError(
            f"the schedule has steps of order {highest}, {solver} goes up to {solver.order}; "
            "choose the solver it was searched with, or run_orders=fixed"
        )
    return solver, list(steps.orders.movedim(-1, 0))


def _with_predictions(velocity: BoundVelocity, predictions: list[Tensor]) -> BoundVelocity:
    """Return the same velocity, whose calls (or micro-batches) append their x0 to the list."""

    def fn(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        raw = velocity.fn(x, t, condition)
        predictions.append(x - rowwise(t, x) * velocity.combine(velocity.apart(raw)))
        return raw

    return replace(velocity, fn=fn)


def nfe(solver: Solver, steps: StepSchedule, velocity: BoundVelocity | None = None) -> int:
    """Return how many network rows `sample` needs for one sample.

    Where samples have their own schedules, it is the largest number among them.

    Args:
        solver: takes the steps.
        steps: the schedule.
        velocity: says how many rows a call has at each time; None means one.
    """
    if isinstance(steps.steps, FittedSteps):
        solver = Euler()  # calls the network where fitted steps do
    return max(_rows(solver, times, velocity) for times in torch.atleast_2d(steps.times))


def _rows(solver: Solver, times: Tensor, velocity: BoundVelocity | None) -> int:
    """Count the network rows of one sample by stepping a zero through times (K+1,)."""
    call_times: list[Tensor] = []

    def f(x: Tensor, t: Tensor) -> Tensor:
        call_times.append(t)
        return torch.zeros_like(x)

    for _ in walk(solver, f, torch.zeros(1, 1), times):
        pass
    if velocity is None:
        return len(call_times)
    return int(velocity.rows_at(torch.cat(call_times)).sum())


@dataclass(frozen=True, eq=False)
class FittedSolver(Solver):
    """A solver with given coefficients: x_next = sum_p w_p u_p, u = (x, noise, mean, x0, ...).

    Its steps have no order. A guided network call has R outputs, and the prediction of x0
    from each of them has a weight of its own.

    Args:
        weights: (K, P) one row for each step, 0 for predictions that do not exist yet.
            The predictions of x0 are ordered newest first.
        constants: noise and mean, (B, *E) each.
    """

    weights: Tensor
    constants: tuple[Tensor, Tensor]

    def orders(self, num_steps: int) -> Sequence[int | None]:
        return [None] * num_steps

    def observe(self, f: VelocityFn, state: State) -> State:
        outputs = BoundVelocity.of(f).outputs(state.x, state.t)
        return remember_parts(state, outputs, self.weights.shape[1] - 3)

    def advance(
        self, f: VelocityFn, state: State, t_next: Tensor, order: int | Tensor | None = None
    ) -> State:
        vectors = (state.x, *self.constants, *state.outputs)
        x = combine(self.weights[state.step][: len(vectors)].unbind(), vectors)
        return replace(state, x=x, t=t_next.expand_as(state.t), step=state.step + 1)


def remember_parts(state: State, velocities: Sequence[Tensor], capacity: int) -> State:
    """Return the state that also remembers a network call's R predictions of x0.

    Args:
        state: the state at which the network was called.
        velocities: R outputs (M, *E) of the call; each is remembered as x0 = x - t v.
        capacity: the number of predictions to keep, newest first.
    """
    outputs = tuple(state.x - rowwise(state.t, state.x) * v for v in velocities)
    times = (*[state.t] * len(outputs), *state.times)[:capacity]
    return replace(state, outputs=(*outputs, *state.outputs)[:capacity], times=times)
