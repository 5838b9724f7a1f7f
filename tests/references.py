"""References for the solvers: the numbers of released code, and the schedulers of diffusers."""

from pathlib import Path
from unittest import mock
from warnings import catch_warnings, simplefilter

import torch
from safetensors.torch import load_file
from torch import Tensor

from oss_exp.solvers import trajectory

RELEASED = load_file(Path(__file__).parent / "oracles" / "solvers.safetensors")


def float64(*values) -> Tensor:
    """Return the values as a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


PINNED = float64(1, 0.85, 0.6, 0.35, 0.2, 0.08, 0)
LATER = float64(0.98, 0.85, 0.6, 0.35, 0.2, 0.08, 0)


def difference(result: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    return float((result - expected).abs().max() / expected.abs().max())


def run(solver, velocity, x: Tensor, times: Tensor) -> Tensor:
    """Return the last state of a solver's run from x at times[0]."""
    return trajectory(solver, velocity, x, times)[-1]


def difference_to_released(solver, name: str, velocity, z: Tensor) -> float:
    """Return the largest difference to the released runs of this name.

    The runs are in sigma = t / (1 - t), on x / (1 - t).
    """
    differences = []
    keys = [key for key in RELEASED if f".{key}".endswith(f".{name}.final")]
    for key in keys:
        sigmas = RELEASED[f"{key.split('.')[0]}.sigmas"]
        times = sigmas / (1 + sigmas)
        final = run(solver, velocity, z[:6] * times[0], times) * (1 + sigmas[-1])
        differences.append(difference(final, RELEASED[key]))
    return max(differences)


def run_diffusers(
    scheduler, velocity, x: Tensor, times: Tensor, coordinates: str = "flow"
) -> Tensor:
    """Return x at times[-1] from x (M, *E) at times[0], by a scheduler that steps at these times.

    Args:
        coordinates: The scheduler's states and network output: `flow` (x and v), `sigma`
            (x / (1 - t) and eps), `variance` (x over the norm of alpha and sigma, and eps), or
            `variance_v` (the same states, and alpha eps - sigma x0).
    """
    root = torch.hypot(times, 1 - times)
    norm = {"flow": torch.ones_like(times), "sigma": 1 - times}.get(coordinates, root)
    x = x / norm[0]
    with catch_warnings():
        simplefilter("ignore")  # numpy's warnings about the library's calls
        _set_times(scheduler, times, coordinates)
        for t, factor, timestep in zip(times[:-1], norm[:-1], scheduler.timesteps, strict=True):
            flow = factor * x
            v = velocity(flow, t.expand(len(x)))
            x0 = flow - t * v
            eps = flow + (1 - t) * v
            outputs = {"flow": v, "variance_v": ((1 - t) * eps - t * x0) / factor}

            # Several schedulers round to float32 inside.
            with mock.patch.object(torch, "float32", torch.float64):
                x = scheduler.step(outputs.get(coordinates, eps), timestep, x).prev_sample
    return x * norm[-1]


def _set_times(scheduler, times: Tensor, coordinates: str) -> None:
    """Replace a scheduler's own times by these."""
    scheduler.set_timesteps(len(times) - 1)
    scheduler.set_begin_index(0)
    scheduler.sigmas = times if coordinates == "flow" else times / (1 - times)

    # Alpha and sigma of IPNDMScheduler.
    root = torch.hypot(times, 1 - times)
    scheduler.alphas = (1 - times) / root
    scheduler.betas = times / root
    scheduler.timesteps = 1000 * times[:-1]
