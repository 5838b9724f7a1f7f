"""Running a step schedule: the one way from noise to data that samples, evaluations and searches share."""

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
"""watch(step, x0 (B, *E)): the clean sample that a step's first network call, at its own x and t, predicts: x - t v."""


def walk(
    solver: Solver,
    f: VelocityFn,
    x: Tensor,
    times: Tensor,
    orders: Sequence[int | Tensor | None] | None = None,
    calibration: Calibration | None = None,
) -> Iterator[State]:
    """x (M, *E) at times[0]; times (K+1,) or (K+1, M). Yields the observed state at each time, the last unobserved.

    orders: of the K steps, () or (M,) each; default: the solver's own. calibration: applied before each network call.
    """
    times = times.to(x.device)
    state = solver.init(x, times[0])
    num_steps = len(times) - 1
    for step, order in enumerate(solver.orders(num_steps) if orders is None else orders):
        if calibration is not None:
            state = replace(state, x=calibration(state.x, state.t, step == num_steps - 1))
        state = solver.observe(f, state)
        yield state
        state = solver.advance(f, state, times[step + 1], order)
    yield state


@torch.no_grad()
def trajectory(solver: Solver, f: VelocityFn, x: Tensor, times: Tensor) -> Tensor:
    """x (M, *E) at times[0], times (N+1,) -> the states at all of them, (N+1, M, *E)."""
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
    """Run a step schedule: noise (B, *E), group (B,) condition indices for its mean -> x0 (B, *E).

    Each step has the order that the schedule stores, else the solver's own; fitted steps need no solver but for its
    calibration. A per-sample schedule needs one row per noise, in the same order. `watch` is told of each of the K
    steps; it costs no network call.
    """
    if steps.per_sample and len(steps.times) != len(noise):
        raise ValueError(
            f"the schedule has times for {len(steps.times)} samples, the noise has {len(noise)}"
        )
    calibration = solver.amplitude_table
    solver, orders = stepper(solver, steps, noise, group)
    velocity = BoundVelocity.of(f)

    predictions: list[Tensor] = []
    if watch is not None:
        velocity = _with_predictions(velocity, predictions)
    times = steps.times.movedim(-1, 0)  # (K+1, B), or unchanged (K+1,)
    final = steps.initial_state(noise, group)
    for step, state in enumerate(walk(solver, velocity, final, times, orders, calibration)):
        final = state.x
        if watch is not None and step < steps.num_steps:
            watch(
                step, torch.cat(predictions)[-len(noise) :]
            )  # before them: calls within the step that led here
            predictions.clear()
    return final


def solver_of(steps: StepSchedule) -> Solver:
    """Return the solver that the schedule was searched with, Euler where its provenance names none.

    Raises ValueError where it names none of this package, or names none and its steps have orders.
    """
    if not steps.about("solver") and steps.orders is not None:
        raise ValueError(
            "the schedule has orders and names no solver; give the one they were searched with"
        )
    return named_solver(steps.about("solver"))


def stepper(
    solver: Solver, steps: StepSchedule, noise: Tensor, group: Tensor | None
) -> tuple[Solver, list[Tensor] | None]:
    """Return what takes the steps of a schedule from noise (B, *E), and their K orders where a search chose them.

    Raises ValueError where the solver cannot take steps of these orders.
    """
    if isinstance(steps.steps, FittedSteps):
        constants = noise, group_mean(steps.steps.mean, noise, group)
        return FittedSolver(steps.steps.weights.to(noise.device), constants), None
    if steps.orders is None:
        return solver, None
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
    """Return the same velocity; every (micro-batch of a) call appends its predictions of x0."""

    def fn(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        raw = velocity.fn(x, t, condition)
        predictions.append(x - rowwise(t, x) * velocity.combine(velocity.apart(raw)))
        return raw

    return replace(velocity, fn=fn)


def nfe(solver: Solver, steps: StepSchedule, velocity: BoundVelocity | None = None) -> int:
    """Network rows per sample of `sample` with this velocity (None: one a call); of per-sample schedules the most."""
    if isinstance(steps.steps, FittedSteps):
        solver = Euler()  # fitted steps call where Euler's do

    def rows(times: Tensor) -> int:
        """Found by stepping nothing through times (K+1,)."""
        asked = []

        def f(x: Tensor, t: Tensor) -> Tensor:
            asked.append(t)
            return torch.zeros_like(x)

        for _ in walk(solver, f, torch.zeros(1, 1), times):
            pass
        return len(asked) if velocity is None else int(velocity.rows_at(torch.cat(asked)).sum())

    return max(rows(times) for times in torch.atleast_2d(steps.times))


@dataclass(frozen=True, eq=False)
class FittedSolver(Solver):
    """A solver whose coefficients are given: x_next = sum_p w_p u_p over u = (x, noise, mean, x0, earlier x0 ...).

    weights (K, P): one row a step, 0 where there is no output yet. constants: noise and mean, (B, *E) each. Under
    guidance every network call remembers its R predictions of x0 apart. Its steps have no order.
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
    """Return the state with the predictions x0 = x - t v of these outputs before its older ones, `capacity` in all."""
    outputs = tuple(state.x - rowwise(state.t, state.x) * v for v in velocities)
    times = (*[state.t] * len(outputs), *state.times)[:capacity]
    return replace(state, outputs=(*outputs, *state.outputs)[:capacity], times=times)
