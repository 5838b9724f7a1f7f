"""Steps over the initial noise and the network's velocities so far, written as fitted steps.

Some methods state their coefficients for velocities. A velocity is (x - x0) / t, and
the student's own x is linear in the noise and in the predictions of x0 before it. So
every such step also has coefficients for predictions of x0, without any loss.

Legend: K steps, step k goes from times[k] to times[k+1], R outputs of a guided call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oss_exp.schedule import FittedSteps, StepSchedule
from oss_exp.stepsize.problem import Problem


def linear_steps(
    problem: Problem, times: Tensor, over_noise: Tensor, over_velocities: Tensor
) -> StepSchedule:
    """Return the schedule of steps that are sums over the noise and the velocities so far.

    Step k ends at over_noise[k] noise + sum over j <= k of over_velocities[k, j] v_j,
    where v_j is the network's velocity at the student's state at times[j].

    Args:
        problem: the search set.
        times: (K+1,) from the problem's first time to 0.
        over_noise: (K,) float64.
        over_velocities: (K, K) float64, lower triangular.
    """
    noise, data = over_predictions(times, over_noise, over_velocities)
    mix = torch.tensor(problem.velocity.mix, dtype=torch.float64)
    num_steps = len(noise)
    parts = len(mix)

    # Over x, noise, mean and the predictions of x0, newest first.
    weights = torch.zeros(num_steps, 3 + num_steps * parts, dtype=torch.float64)
    weights[:, 1] = noise
    for k in range(num_steps):
        newest_first = data[k, : k + 1].flip(0)
        weights[k, 3 : 3 + (k + 1) * parts] = (newest_first[:, None] * mix).flatten()
    return StepSchedule(times, steps=FittedSteps(weights, torch.zeros(problem.num_groups)))


def over_predictions(
    times: Tensor, over_noise: Tensor, over_velocities: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the coefficients (K,) over the noise and (K, K) over the predictions of x0.

    The arguments are those of `linear_steps`.
    """
    # Unit vectors for the noise, x0 of call 0, x0 of call 1, ...
    num_steps = len(over_noise)
    unit = torch.eye(1 + num_steps, dtype=torch.float64)
    state = unit[0]
    velocities: list[Tensor] = []
    states = []
    for k, t in enumerate(times[:-1].tolist()):
        velocities.append((state - unit[1 + k]) / t)
        state = over_noise[k] * unit[0] + over_velocities[k, : k + 1] @ torch.stack(velocities)
        states.append(state)
    rows = torch.stack(states)
    return rows[:, 0], rows[:, 1:]
