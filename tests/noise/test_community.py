"""The schedules of ComfyUI's users against their definitions over a list of 1000 sigmas, written down once more."""

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
FLOW = [
    SHIFT * u / (1 + (SHIFT - 1) * u) for u in np.arange(1, 1001) / 1000
]  # sigmas from data to noise, as theirs
CHAIN = [*((1 - ABAR) / ABAR) ** 0.5]
CLOCKS = {
    "flow": (FLOW, FlowSchedule(SHIFT)),
    "chain": (CHAIN, DDIMSchedule(scaled_linear_betas())),
}


def found(clock: str, schedule, num_steps: int) -> np.ndarray:
    """In ComfyUI's units: flow time, or sigma."""
    nodes = schedule.nodes(num_steps)
    return (nodes if clock == "flow" else EDMPath().native(nodes)).numpy()


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("k", BUDGETS)
def test_levels_are_those_of_comfyui(clock, k):
    sigmas, levels = CLOCKS[clock]

    simple = [sigmas[-(1 + int(i * (len(sigmas) / k)))] for i in range(k)]
    np.testing.assert_allclose(found(clock, SimpleSchedule(levels), k), [*simple, 0], rtol=1e-9)

    places = np.linspace(999, 0, k + 1)[:-1]
    between = np.interp(places, np.arange(1000), np.log(sigmas) if clock == "chain" else sigmas)
    uniform = np.exp(between) if clock == "chain" else between
    np.testing.assert_allclose(
        found(clock, SGMUniformSchedule(levels), k), [*uniform, 0], rtol=2e-4
    )

    for alpha, beta in ((0.5, 0.7), (0.6, 0.6)):
        index = np.rint(
            stats.beta.ppf(1 - np.linspace(0, 1, k, endpoint=False), alpha, beta) * 999
        ).astype(int)
        expected = [*np.array(sigmas)[index], 0]
        np.testing.assert_allclose(
            found(clock, BetaLevelsSchedule(levels, 1000, alpha, beta), k), expected, rtol=1e-9
        )


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
        value = [(2 / math.pi * math.atan(-slope * (x - pivot)) + 1) / 2 for x in range(count)]
        return [(v - value[-1]) / (value[0] - value[-1]) * (start - end) + end for v in value]

    expected = piece(upper, upper, 1.0, 0.5)[:-1] + piece(points - upper, 0, 0.5, 0.0)

    np.testing.assert_allclose(BongTangentSchedule().nodes(k).numpy(), expected, rtol=0, atol=1e-12)
    assert BongTangentSchedule().nodes(1).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("start", ["pinned", "analytic"])
@pytest.mark.parametrize("name", ["simple", "sgm_uniform", "beta57", "bong_tangent"])
def test_yaml_plans_every_budget(name, start):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        strategy = instantiate(compose(overrides=[f"+stepsize={name}"]).stepsize[name], start=start)
    plans = strategy.plan(
        Problem(lambda x, t: x, torch.ones(2, 3), FlowSchedule().nodes(20)), range(1, 21)
    )
    for k, steps in plans.items():
        assert steps.num_steps == k
        kept = strategy.schedule.nodes(k + (start == "analytic"))[1:]
        assert torch.equal(steps.times[-len(kept) :], kept)


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
