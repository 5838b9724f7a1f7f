"""A solver's steps as fitted ones: the weights over the noise, the mean and all predictions of x0 that do the same.

Legend: K steps, R outputs of a guided call, P = 3 + R K vectors: x, noise, mean, predictions of x0, newest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from oss_exp.schedule import Analytic, FittedSteps, SolverSteps, StepSchedule
from oss_exp.solvers.base import LinearMultistep, Solver
from oss_exp.solvers.sampling import walk
from oss_exp.stepsize.problem import Problem
from oss_exp.tensors import rowwise


def as_fitted(problem: Problem, steps: StepSchedule) -> StepSchedule:
    """Return the schedule with fitted steps that do what the problem's solver does; fitted ones stay as they are.

    ValueError where the solver calls the network again within a step, or where every sample has times of its own.
    """
    if isinstance(steps.steps, FittedSteps):
        return steps
    if steps.per_sample:
        raise ValueError(
            "fitted steps are the same for all samples, and the schedule has times for each"
        )
    orders = None if steps.orders is None else list(steps.orders)
    sums = solver_sums(problem.solver, steps.times, orders)
    weights = over_basis(sums, problem.velocity.mix, first_parts(steps, steps.times[0]))
    return replace(steps, steps=FittedSteps(weights, problem.teacher.mean.cpu()))


def solver_sums(solver: Solver, times: Tensor, orders: Sequence[Tensor] | None = None) -> Tensor:
    """times (K+1,) -> (K, 1 + K) the states after the steps, as sums over the first state and each call's x0.

    The calls are in order. The solver runs on the vectors that stand for these, so gradients reach the times.
    """
    count = len(times) - 1
    if solver.evals_per_step > 1 and count > 1:
        raise ValueError(
            f"{solver} calls the network again within a step; fitted steps take a multistep solver's"
        )
    basis, seen = torch.eye(count + 1, dtype=torch.float64, device=times.device), []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x[0])
        return (x - basis[len(seen)]) / rowwise(t, x)

    *_, last = walk(solver, velocity, basis[:1], times, orders)
    return torch.stack([*seen[1:], last.x[0]])


def first_parts(steps: StepSchedule, first: Tensor) -> tuple[Tensor, Tensor]:
    """Return the parts of the noise and of the mean in the first state, at time `first` (), of a schedule's start."""
    ratio = (
        first / steps.start_time if isinstance(steps.start, Analytic) else torch.ones_like(first)
    )
    return ratio, 1 - ratio


def over_basis(sums: Tensor, mix: Sequence[float], first: tuple[Tensor, Tensor]) -> Tensor:
    """sums (K, 1 + K) over the first state and each call's x0 -> (K, P) weights of fitted steps, that of x being 0.

    mix: the shares (R,) of the call's outputs in its x0. first: the parts of noise and mean in the first state.
    """
    noise, mean = first
    rows = []
    for step, row in enumerate(sums):
        newest_first = row[1 : 2 + step].flip(0)
        parts = (newest_first[:, None] * row.new_tensor(mix)).flatten()
        later = row.new_zeros(len(mix) * (len(sums) - 1 - step))
        rows.append(
            torch.cat([torch.stack([row[0] * 0, row[0] * noise, row[0] * mean]), parts, later])
        )
    return torch.stack(rows)


def step_weights(solver: LinearMultistep, times: Tensor, mix: Sequence[float]) -> Tensor:
    """times (K+1,) -> (K, P) weights of the solver's steps, over the state and its last predictions of x0.

    The solver must predict x0. Gradients reach the times.
    """
    count = len(times) - 1
    rows = []
    for step, order in enumerate(solver.orders(count)):
        known = [times[step - h] for h in range(order)]
        state, predictions = solver.coefficients(known, times[step + 1])
        parts = (torch.stack(predictions)[:, None] * times.new_tensor(mix)).flatten()
        none = times.new_zeros(len(mix) * count - len(parts))
        rows.append(torch.cat([state[None], times.new_zeros(2), parts, none]))
    return torch.stack(rows)


def difference(problem: Problem, steps: StepSchedule, base: Tensor) -> Tensor:
    """(K, P) what the weights of a schedule's steps have more than `base` (K, P).

    Nothing where the steps are those of a solver that calls the network again within them.
    """
    if isinstance(steps.steps, SolverSteps) and problem.solver.evals_per_step > 1:
        return torch.zeros_like(base)
    fitted = as_fitted(problem, steps).steps
    assert isinstance(fitted, FittedSteps)
    weights = fitted.weights.to(base)
    return torch.nn.functional.pad(weights, (0, base.shape[1] - weights.shape[1])) - base
