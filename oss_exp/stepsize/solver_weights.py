"""A solver's steps written as fitted steps.

They have weights over the noise, the mean and all predictions of x0, and do exactly the
same.

Legend: K steps, R outputs of a guided call, P = 3 + R K basis vectors: x, noise, mean,
and the predictions of x0, newest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from oss_exp.schedule import Analytic, FittedSteps, SolverSteps, StepSchedule
from oss_exp.solvers.base import LinearMultistep
from oss_exp.solvers.sums import solver_sums
from oss_exp.stepsize.problem import Problem


def as_fitted(problem: Problem, steps: StepSchedule) -> StepSchedule:
    """Return the schedule with fitted steps that do what the problem's solver does.

    Fitted steps stay as they are.

    Raises:
        ValueError: the solver calls the network again within a step, or every sample
            has times of its own.
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


def first_parts(steps: StepSchedule, first: Tensor) -> tuple[Tensor, Tensor]:
    """Return the parts of noise and mean in a schedule's first state, at time `first`."""
    if isinstance(steps.start, Analytic):
        ratio = first / steps.start_time
    else:
        ratio = torch.ones_like(first)
    return ratio, 1 - ratio


def over_basis(sums: Tensor, mix: Sequence[float], first: tuple[Tensor, Tensor]) -> Tensor:
    """Return the weights (K, P) of fitted steps, in which that of x is 0.

    Args:
        sums: (K, 1 + K) coefficients over the first state and each call's x0.
        mix: the shares (R,) of a call's outputs in its x0.
        first: the parts of the noise and of the mean in the first state.
    """
    noise, mean = first
    rows = []
    for step, row in enumerate(sums):
        constants = torch.stack([row[0] * 0, row[0] * noise, row[0] * mean])
        newest_first = row[1 : 2 + step].flip(0)
        predictions = (newest_first[:, None] * row.new_tensor(mix)).flatten()
        later = row.new_zeros(len(mix) * (len(sums) - 1 - step))
        rows.append(torch.cat([constants, predictions, later]))
    return torch.stack(rows)


def step_weights(solver: LinearMultistep, times: Tensor, mix: Sequence[float]) -> Tensor:
    """Return the weights (K, P) of a solver's steps, over the state and its last predictions.

    The solver must predict x0. Gradients reach the times.

    Args:
        solver: takes the steps.
        times: (K+1,).
        mix: the shares (R,) of a call's outputs in its x0.
    """
    count = len(times) - 1
    rows = []
    for step, order in enumerate(solver.orders(count)):
        output_times = [times[step - h] for h in range(order)]
        state, predictions = solver.coefficients(output_times, times[step + 1])
        parts = (torch.stack(predictions)[:, None] * times.new_tensor(mix)).flatten()
        padding = times.new_zeros(len(mix) * count - len(parts))
        rows.append(torch.cat([state[None], times.new_zeros(2), parts, padding]))
    return torch.stack(rows)


def difference(problem: Problem, steps: StepSchedule, base: Tensor) -> Tensor:
    """Return what must be added to weights (K, P) to get those of a schedule's steps.

    It is zero where the steps are those of a solver that calls the network again within
    them.

    Args:
        problem: its solver takes the schedule's steps.
        steps: the schedule.
        base: (K, P) weights.
    """
    if isinstance(steps.steps, SolverSteps) and problem.solver.evals_per_step > 1:
        return torch.zeros_like(base)
    fitted = as_fitted(problem, steps).steps
    assert isinstance(fitted, FittedSteps)
    weights = fitted.weights.to(base)
    return torch.nn.functional.pad(weights, (0, base.shape[1] - weights.shape[1])) - base
