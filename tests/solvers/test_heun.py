"""Heun in flow time and in sigma equals the trapezoid, released samplers and diffusers."""

from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler
from references import (
    LATER,
    PINNED,
    difference,
    difference_to_released,
    float64,
    run,
    run_diffusers,
)

from oss_exp.solvers import Euler, trajectory
from oss_exp.solvers.heun import Heun


@pytest.mark.parametrize("name", ["heun", "edm_heun_n6", "edm_heun_n18", "edm_heun_n40"])
def test_in_sigma_equals_released_code(name, velocity, gmm):
    assert difference_to_released(Heun(clock="sigma"), name, velocity, gmm["z"]) < 1e-10


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("clock", "scheduler", "times", "coordinates"),
    [
        ("t", FlowMatchHeunDiscreteScheduler, PINNED, "flow"),
        ("sigma", HeunDiscreteScheduler, LATER, "sigma"),
    ],
)
def test_equals_diffusers(clock, scheduler, times, coordinates, velocity, gmm):
    inner = times[1:-1].repeat_interleave(2)  # the schedulers list the time of every call
    calls = torch.cat([times[:1], inner, times[-1:]])
    expected = run_diffusers(scheduler(), velocity, gmm["z"], calls, coordinates)
    assert difference(run(Heun(clock), velocity, gmm["z"], times), expected) < 1e-10


def test_is_the_trapezoid_in_flow_time_and_euler_into_0():
    def f(x, t):
        return 3 * x - 2 * t[:, None] + 1

    x = 0.7
    times = [1.0, 0.6, 0.25, 0.01, 0.0]
    expected = [x]
    for t, s in pairwise(times):
        slope = 3 * x - 2 * t + 1
        if s > 0:
            slope = (slope + 3 * (x + (s - t) * slope) - 2 * s + 1) / 2
        x = x + (s - t) * slope
        expected.append(x)
    states = trajectory(Heun("t"), f, float64([0.7]), float64(*times))

    assert states.flatten().tolist() == pytest.approx(expected, rel=1e-14)


def test_in_sigma_a_step_from_1_is_eulers(velocity, gmm):
    for times in (float64(1, 0.6), float64(1, 0.6, 0)):
        heun = trajectory(Heun("sigma"), velocity, gmm["z"], times)
        euler = trajectory(Euler(), velocity, gmm["z"], times)
        assert torch.equal(heun[1], euler[1])
