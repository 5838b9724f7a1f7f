"""Schedules from the ComfyUI community equal their definitions over a list of 1000 sigmas."""

import math

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from scipy import stats

from oss_exp.cli import CONF
from oss_exp.noise import DDIMSchedule, EDMPath, FlowSchedule, LogSNRSchedule, scaled_linear_betas
from oss_exp.noise.community import (
    BetaLevelsSchedule,
    BongTangentSchedule,
    SGMUniformSchedule,
    SimpleSchedule,
)
from oss_exp.stepsize import Problem

BUDGETS = [1, 2, 3, 5, 7, 10, 20, 30]
SHIFT = 3.0
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
# Sigmas from data to noise, in ComfyUI's order.
UNIFORM = np.arange(1, 1001) / 1000
FLOW = [*SHIFT * UNIFORM / (1 + (SHIFT - 1) * UNIFORM)]
CHAIN = [*((1 - ABAR) / ABAR) ** 0.5]
CLOCKS = {
    "flow": (FLOW, FlowSchedule(SHIFT)),
    "chain": (CHAIN, DDIMSchedule(scaled_linear_betas())),
}


def levels_of(clock: str, schedule, num_steps: int) -> np.ndarray:
    """Return the schedule's nodes in ComfyUI's units: flow time, or sigma."""
    nodes = schedule.nodes(num_steps)
    return (nodes if clock == "flow" else EDMPath().native(nodes)).numpy()


every_clock = pytest.mark.parametrize("clock", CLOCKS)
every_budget = pytest.mark.parametrize("k", BUDGETS)


@every_clock
@every_budget
def test_simple_takes_every_nth_sigma_from_the_noise(clock, k):
    sigmas, levels = CLOCKS[clock]
    expected = [sigmas[-(1 + int(i * (len(sigmas) / k)))] for i in range(k)]

    result = levels_of(clock, SimpleSchedule(levels), k)
    np.testing.assert_allclose(result, [*expected, 0], rtol=1e-9)


@every_clock
@every_budget
def test_sgm_uniform_is_even_in_the_index_of_the_sigmas(clock, k):
    sigmas, levels = CLOCKS[clock]
    places = np.linspace(999, 0, k + 1)[:-1]
    if clock == "chain":
        expected = np.exp(np.interp(places, np.arange(1000), np.log(sigmas)))
    else:
        expected = np.interp(places, np.arange(1000), sigmas)

    result = levels_of(clock, SGMUniformSchedule(levels), k)
    np.testing.assert_allclose(result, [*expected, 0], rtol=2e-4)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.7), (0.6, 0.6)])
@every_clock
@every_budget
def test_beta_levels_are_sigmas_at_the_quantiles_of_a_beta_law(clock, k, alpha, beta):
    sigmas, levels = CLOCKS[clock]
    quantiles = stats.beta.ppf(1 - np.linspace(0, 1, k, endpoint=False), alpha, beta)
    indices = np.rint(quantiles * 999).astype(int)
    expected = [*np.array(sigmas)[indices], 0]

    result = levels_of(clock, BetaLevelsSchedule(levels, 1000, alpha, beta), k)
    np.testing.assert_allclose(result, expected, rtol=1e-9)


def test_simple_with_a_divisor_of_the_levels_is_the_flow_schedule():
    torch.testing.assert_close(
        SimpleSchedule(FlowSchedule(2.0)).nodes(8), FlowSchedule(2.0).nodes(8), rtol=1e-12, atol=0
    )
    edm = SimpleSchedule(LogSNRSchedule(0.002, 120.0)).nodes(4)
    assert EDMPath().native(edm)[0] == pytest.approx(120)


@pytest.mark.parametrize("k", [2, 3, 5, 8, 10, 20, 33, 198, 998])
def test_bong_tangent_is_two_arctangents(k):
    points = k + 2
    upper = int(points * 0.6)
    slope = 0.2 / (points / 40)

    def piece(count, pivot, start, end):
        values = [(2 / math.pi * math.atan(-slope * (x - pivot)) + 1) / 2 for x in range(count)]
        return [(v - values[-1]) / (values[0] - values[-1]) * (start - end) + end for v in values]

    expected = piece(upper, upper, 1.0, 0.5)[:-1] + piece(points - upper, 0, 0.5, 0.0)

    np.testing.assert_allclose(BongTangentSchedule().nodes(k).numpy(), expected, rtol=0, atol=1e-12)
    assert BongTangentSchedule().nodes(1).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("start", ["pinned", "analytic"])
@pytest.mark.parametrize("name", ["simple", "sgm_uniform", "beta57", "bong_tangent"])
def test_yaml_plans_every_budget(name, start):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        strategy = instantiate(compose(overrides=[f"+stepsize={name}"]).stepsize[name], start=start)
    problem = Problem(lambda x, t: x, torch.ones(2, 3), FlowSchedule().nodes(20))

    plans = strategy.plan(problem, range(1, 21))
    for k, steps in plans.items():
        assert steps.num_steps == k
        nodes = strategy.schedule.nodes(k + (start == "analytic"))[1:]
        assert torch.equal(steps.times[-len(nodes) :], nodes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SimpleSchedule(num_levels=1), "num_levels must be from 2 to .*, got 1"),
        (lambda: SimpleSchedule(num_levels=10).nodes(11), "11 distinct times"),
        (lambda: BetaLevelsSchedule(alpha=0), "alpha must be from 0.01 to 100, got 0"),
        (lambda: BetaLevelsSchedule().nodes(200), "200 distinct times"),
        (lambda: BongTangentSchedule(0), "slope must be above 0 .* got 0"),
    ],
)
def test_impossible_arguments_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()
