"""DPM2 equals the released sampler and, at the midpoint, diffusers' KDPM2."""

import pytest
import torch
from diffusers import KDPM2DiscreteScheduler
from references import LATER, difference, difference_to_released, float64, run

from oss_exp.solvers import Euler, trajectory
from oss_exp.solvers.dpm2 import DPM2


@pytest.mark.parametrize("r", [0.5, 0.7])
def test_equals_released_code(r, velocity, gmm):
    assert difference_to_released(DPM2(r), f"dpm2_r{r}", velocity, gmm["z"]) < 1e-10


def _set_sigmas(scheduler, sigmas, middles, calls) -> None:
    """Give KDPM2 its sigmas, midpoints and the time of every network call."""
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.set_begin_index(0)
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)])
    interpolated = torch.stack([middles, sigmas[1:-1]], 1).flatten()
    scheduler.sigmas_interpol = torch.cat([sigmas[:1], interpolated, sigmas[-1:]])
    scheduler.timesteps = 1000 * calls / (1 + calls)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_equals_diffusers(velocity, gmm):
    """KDPM2 lists each sigma and the midpoint after it; its float32 tables bound the agreement."""
    scheduler = KDPM2DiscreteScheduler()
    sigmas = LATER / (1 - LATER)
    middles = (sigmas[:-2] * sigmas[1:-1]).sqrt()
    calls = torch.cat([torch.stack([sigmas[:-2], middles], 1).flatten(), sigmas[-2:-1]])
    _set_sigmas(scheduler, sigmas, middles, calls)

    x = gmm["z"] / (1 - LATER[0])
    for sigma, timestep in zip(calls, scheduler.timesteps, strict=True):
        t = sigma / (1 + sigma)
        canonical = x * (1 - t)
        eps = canonical + (1 - t) * velocity(canonical, t.expand(len(x)))
        x = scheduler.step(eps, timestep, x).prev_sample

    assert difference(run(DPM2(0.5), velocity, gmm["z"], LATER), x) < 1e-6


def test_a_step_from_1_is_eulers(velocity, gmm):
    times = float64(1, 0.6, 0)
    dpm2 = trajectory(DPM2(0.5), velocity, gmm["z"], times)
    euler = trajectory(Euler(), velocity, gmm["z"], times)
    assert torch.equal(dpm2[1], euler[1])


@pytest.mark.parametrize("r", [0, 1.5, 1e30, 1e-30, float("nan")])
def test_a_wrong_r_is_refused(r):
    with pytest.raises(ValueError, match=r"r must be from 0\.01 to 1, got"):
        DPM2(r)
