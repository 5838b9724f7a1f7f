"""Euler is DDIM and Euler in sigma, and the teacher of the released search."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from references import (
    LATER,
    PINNED,
    difference,
    difference_to_released,
    float64,
    run,
    run_diffusers,
)

from oss_exp.noise import CosinePath, DDPMPath, EDMPath, linear_betas
from oss_exp.solvers import Euler, trajectory


@pytest.mark.parametrize("name", ["euler", "dpmpp1_x0_lof1_nothresh"])
def test_equals_released_code(name, velocity, gmm):
    assert difference_to_released(Euler(), name, velocity, gmm["z"]) < 1e-10


@pytest.mark.parametrize("grid", ["uniform", "edm", "ddpm"])
def test_equals_the_teacher_of_the_released_search(grid, gmm, velocity, oss_arrays):
    ascending = oss_arrays[f"{grid}_N20.fm_steps"]
    states = trajectory(Euler(), velocity, gmm["z"], ascending.flip(0))
    assert difference(states.flip(0), oss_arrays[f"{grid}_N20.teacher_traj"]) < 1e-10


def test_equals_flow_euler_of_diffusers(velocity, gmm):
    flow = run_diffusers(FlowMatchEulerDiscreteScheduler(), velocity, gmm["z"], PINNED)
    assert difference(run(Euler(), velocity, gmm["z"], PINNED), flow) < 1e-10


def test_equals_euler_in_sigma_of_diffusers(velocity, gmm):
    scheduler = EulerDiscreteScheduler()
    scheduler.is_scale_input_called = True  # the velocity takes flow states, which need no scale
    sigma = run_diffusers(scheduler, velocity, gmm["z"], LATER, "sigma")

    assert difference(run(Euler(), velocity, gmm["z"], LATER), sigma) < 1e-10


def test_equals_ddim_of_diffusers(velocity, gmm):
    betas = linear_betas(1000, 1e-4, 0.02)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)  # the library's are float32
    scheduler.set_timesteps(5)

    path = DDPMPath(betas)
    tau = torch.cat([scheduler.timesteps, torch.tensor([-1])]).double()
    times = path.canonical(tau)
    x = path.scale(times[0]) * gmm["z"]
    for t, timestep in zip(times[:-1], scheduler.timesteps, strict=True):
        flow = x / path.scale(t)
        x = scheduler.step(flow + (1 - t) * velocity(flow, t.expand(16)), timestep, x).prev_sample

    assert difference(run(Euler(), velocity, gmm["z"], times), x) < 1e-10


def native_ddim(mixture, path, x, t, alpha, sigma):
    """Return the native states at all t, from x at t[0] and alpha and sigma at every t."""
    states = [path.scale(t[0]) * x]
    for i in range(len(t) - 1):
        x0 = mixture.denoise(states[-1] / path.scale(t[i]), t[i].expand(len(x)))
        states.append(alpha[i + 1] * x0 + sigma[i + 1] * (states[-1] - alpha[i] * x0) / sigma[i])
    return torch.stack(states)


@pytest.mark.parametrize("kind", ["cosine", "edm"])
def test_is_ddim_in_native_coordinates(kind, mixture, velocity, gmm):
    if kind == "cosine":
        path = CosinePath()
        tau = float64(0.99, 0.8, 0.5, 0.3, 0.1, 0)
        alpha = torch.cos(torch.pi / 2 * tau)
        sigma = torch.sin(torch.pi / 2 * tau)
    else:
        path = EDMPath()
        sigma = float64(80, 20, 5, 1, 0.2, 0.01, 0)
        tau = sigma
        alpha = torch.ones_like(sigma)
    t = path.canonical(tau)
    native = native_ddim(mixture, path, gmm["z"], t, alpha, sigma)
    result = path.scale(t)[:, None, None] * trajectory(Euler(), velocity, gmm["z"], t)

    torch.testing.assert_close(result, native, rtol=1e-10, atol=1e-10)
