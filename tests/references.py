"""What the solvers are compared with: the numbers of released code, and the schedulers of diffusers."""

from pathlib import Path
from unittest import mock
from warnings import catch_warnings, simplefilter

import torch
from safetensors.torch import load_file
from torch import Tensor

from oss_exp.solvers import trajectory

RELEASED = load_file(Path(__file__).parent / "oracles" / "solvers.safetensors")


def float64(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


PINNED = float64(1, 0.85, 0.6, 0.35, 0.2, 0.08, 0)
LATER = float64(0.98, 0.85, 0.6, 0.35, 0.2, 0.08, 0)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())


def run(solver, velocity, x: Tensor, times: Tensor) -> Tensor:
    return trajectory(solver, velocity, x, times)[-1]


def difference_to_released(solver, name: str, velocity, z: Tensor) -> float:
    """The largest over the schedules of this run. It is in sigma = t / (1 - t), on x / (1 - t)."""
    found = []
    for key in (key for key in RELEASED if f".{key}".endswith(f".{name}.final")):
        sigmas = RELEASED[f"{key.split('.')[0]}.sigmas"]
        times = sigmas / (1 + sigmas)
        final = run(solver, velocity, z[:6] * times[0], times) * (1 + sigmas[-1])
        found.append(difference(final, RELEASED[key]))
    return max(found)


def run_diffusers(
    scheduler, velocity, x: Tensor, times: Tensor, coordinates: str = "flow"
) -> Tensor:
    """x (M, *E) at times[0] -> at times[-1], by the steps of a scheduler that is given these times for its own.

    coordinates, what it works on: `flow` (x, told v), `sigma` (x / (1 - t), told eps), `variance` (x over its norm,
    told eps) and `variance_v` (the same, told alpha eps - sigma x0).
    """
    root = torch.hypot(times, 1 - times)
    norm = {"flow": torch.ones_like(times), "sigma": 1 - times}.get(coordinates, root)
    x = x / norm[0]
    with catch_warnings():
        simplefilter("ignore")  # what numpy says of the library's calls
        scheduler.set_timesteps(len(times) - 1)
        scheduler.set_begin_index(0)
        scheduler.sigmas = times if coordinates == "flow" else times / (1 - times)
        scheduler.alphas = (1 - times) / root
        scheduler.betas = times / root  # alpha and sigma in IPNDMScheduler
        scheduler.timesteps = 1000 * times[:-1]
        for t, factor, timestep in zip(times[:-1], norm[:-1], scheduler.timesteps, strict=True):
            flow = factor * x
            v = velocity(flow, t.expand(len(x)))
            x0 = flow - t * v
            eps = flow + (1 - t) * v
            output = {"flow": v, "variance_v": ((1 - t) * eps - t * x0) / factor}.get(
                coordinates, eps
            )
            with mock.patch.object(
                torch, "float32", torch.float64
            ):  # several round to float32 inside
                x = scheduler.step(output, timestep, x).prev_sample
    return x * norm[-1]
