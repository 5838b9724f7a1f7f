"""Heuristic schedules equal those of diffusers, meet where they must, and obey their theorems."""

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy import stats

from oss_exp.cli import CONF
from oss_exp.distances import XtMSE
from oss_exp.noise import (
    DDPMPath,
    EDMPath,
    EDMSchedule,
    FlowSchedule,
    LogSNRSchedule,
    scaled_linear_betas,
)
from oss_exp.noise.heuristics import (
    BetaSchedule,
    CosineSchedule,
    KLOptimalSchedule,
    LinearQuadraticSchedule,
)
from oss_exp.solvers import Euler
from oss_exp.stepsize import Problem

SD_RANGE = (0.0292, 14.6146)  # sigma at the first and the last index of Stable Diffusion's chain
SCHEDULES = {
    "kl_optimal": KLOptimalSchedule(*SD_RANGE),
    "kl_optimal_edm_range": KLOptimalSchedule(0.002, 80.0),
    "beta": BetaSchedule(*SD_RANGE, 0.6, 0.6),
    "beta_lopsided": BetaSchedule(*SD_RANGE, 0.3, 1.5),
    "linear_quadratic": LinearQuadraticSchedule(0.025, None),
    "cosine": CosineSchedule(),
}
YAMLS = ["beta", "cosine", "exponential", "karras", "kl_optimal", "linear_quadratic"]


def sigmas(schedule, num_steps: int) -> torch.Tensor:
    return EDMPath().native(schedule.nodes(num_steps))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 20, 200])
@pytest.mark.parametrize("name", SCHEDULES)
def test_nodes_strictly_decrease_from_at_most_1_to_0(name, num_steps):
    nodes = SCHEDULES[name].nodes(num_steps)
    assert nodes.dtype == torch.float64
    assert len(nodes) == num_steps + 1
    assert 0 < nodes[0] <= 1
    assert nodes[-1] == 0
    assert bool((nodes.diff() < 0).all())


# --------------------------------------------------------------------------------------------------
# Against diffusers
# --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
@pytest.mark.parametrize("rule", ["karras", "exponential", "beta"])
@pytest.mark.parametrize(
    ("scheduler", "num_steps"),
    [
        *(("DPMSolverMultistepScheduler", k) for k in (1, 2, 3, 10, 25, 60)),
        # Not one step, which would start at sigma_min.
        *(("EulerDiscreteScheduler", k) for k in (2, 3, 10, 25, 60)),
    ],
)
def test_sigmas_equal_diffusers(scheduler, num_steps, rule):
    import diffusers

    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    reference = getattr(diffusers, scheduler)(**options, **{f"use_{rule}_sigmas": True})
    reference.set_timesteps(num_steps)

    abar = reference.alphas_cumprod.double()
    ends = [float(((1 - a) / a).sqrt()) for a in (abar[0], abar[-1])]
    schedules = {
        "karras": EDMSchedule(*ends, 7.0),
        "exponential": LogSNRSchedule(*ends),
        "beta": BetaSchedule(*ends, 0.6, 0.6),
    }

    torch.testing.assert_close(
        sigmas(schedules[rule], num_steps), reference.sigmas.double(), rtol=1e-5, atol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_steps", "threshold", "linear_steps"),
    [
        (2, 0.025, None),
        (3, 0.025, None),
        (10, 0.025, None),
        (50, 0.025, None),
        (64, 0.1, None),
        (20, 0.05, 4),
    ],
)
def test_linear_quadratic_equals_diffusers(num_steps, threshold, linear_steps):
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

    sigmas = linear_quadratic_schedule(num_steps, threshold, linear_steps)
    expected = torch.tensor(sigmas, dtype=torch.float64)
    nodes = LinearQuadraticSchedule(threshold, linear_steps).nodes(num_steps)
    torch.testing.assert_close(nodes[:-1], expected, rtol=0, atol=1e-13)


def test_linear_quadratic_of_one_step_equals_diffusers():
    from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule

    nodes = LinearQuadraticSchedule(0.025, None).nodes(1)
    assert nodes.tolist() == [*linear_quadratic_schedule(1).tolist(), 0.0]


# --------------------------------------------------------------------------------------------------
# Against each other and their theorems
# --------------------------------------------------------------------------------------------------


def test_beta_of_ones_is_uniform_in_sigma():
    rho_1 = EDMSchedule(*SD_RANGE, 1.0)
    torch.testing.assert_close(
        BetaSchedule(*SD_RANGE, 1.0, 1.0).nodes(12), rho_1.nodes(12), rtol=1e-10, atol=0
    )


def test_beta_has_alpha_at_the_low_end():
    share = (sigmas(SCHEDULES["beta_lopsided"], 9)[:-1] - SD_RANGE[0]) / (SD_RANGE[1] - SD_RANGE[0])
    np.testing.assert_allclose(
        share, stats.beta.ppf(np.linspace(1, 0, 9), 0.3, 1.5), rtol=1e-9, atol=1e-13
    )


def test_beta_is_symmetric_about_the_middle_and_denser_at_the_ends():
    levels = sigmas(BetaSchedule(*SD_RANGE, 0.6, 0.6), 15)[:-1]
    torch.testing.assert_close(
        levels + levels.flip(0), torch.full_like(levels, sum(SD_RANGE)), rtol=1e-10, atol=0
    )

    gaps = -levels.diff()[:7]  # from the noise to the middle
    assert bool((gaps.diff() > 0).all())


def test_linear_quadratic_with_the_even_share_is_uniform():
    uniform = FlowSchedule(1.0).nodes(10)
    torch.testing.assert_close(
        LinearQuadraticSchedule(0.3, 3).nodes(10), uniform, rtol=0, atol=1e-14
    )


def test_linear_quadratic_begins_as_a_teacher_of_1000_steps_and_grows_from_there():
    nodes = LinearQuadraticSchedule(0.025, None).nodes(50)
    torch.testing.assert_close(nodes[:26], FlowSchedule(1.0).nodes(1000)[:26], rtol=0, atol=1e-14)
    second = nodes.diff().diff()
    assert float(second[:24].abs().max()) < 1e-15
    torch.testing.assert_close(second[25:], second[25].expand(24), rtol=1e-9, atol=0)


def test_kl_optimal_over_all_sigmas_is_the_cosine_schedule():
    everything = KLOptimalSchedule(1e-12, 1e12).nodes(9)[:-1]
    torch.testing.assert_close(everything, CosineSchedule().nodes(8), rtol=0, atol=1e-11)


def test_kl_optimal_loses_least_of_a_normal_law():
    """Euler steps on N(0, 1) data shrink the state too much (arXiv 2404.14507, theorem 3.1)."""

    def remaining_scale(sigma: torch.Tensor) -> torch.Tensor:
        """Return the scale after Euler steps on dx/dsigma = x sigma / (1 + sigma^2), (..., n)."""
        now = sigma[..., :-1]
        after = sigma[..., 1:]
        return ((1 + now * after) / (1 + now**2)).prod(-1)

    best = sigmas(KLOptimalSchedule(*SD_RANGE), 8)[:-1]
    exact = ((1 + best[-1] ** 2) / (1 + best[0] ** 2)).sqrt()

    # The same schedule with its inner levels moved at random.
    generator = torch.Generator().manual_seed(0)
    moves = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    moves *= torch.logspace(-4, -1, 500)[:, None]
    others = best.repeat(500, 1)
    others[:, 1:-1] *= moves.exp()

    assert bool((remaining_scale(others) < remaining_scale(best)).all())
    assert 0.8 * exact < remaining_scale(best) < exact


def test_cosine_is_uniform_in_the_angle():
    angle = torch.atan(sigmas(CosineSchedule(), 10)[1:]).numpy()
    np.testing.assert_allclose(angle, np.pi / 2 * np.linspace(0.9, 0, 10), rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# Yamls and refusals
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pinned", "analytic"])
@pytest.mark.parametrize("name", YAMLS)
def test_yaml_plans_every_budget(name, start):
    strategy = instantiate(OmegaConf.load(CONF / "stepsize" / f"{name}.yaml"), start=start)
    problem = Problem(
        lambda x, t: x, torch.ones(2, 3), FlowSchedule(1.0).nodes(20), Euler(), XtMSE()
    )

    plans = strategy.plan(problem, range(1, 21))

    for k, steps in plans.items():
        assert steps.num_steps == k
        nodes = strategy.schedule.nodes(k + (start == "analytic"))[1:]
        assert torch.equal(steps.times[-len(nodes) :], nodes)


@pytest.mark.parametrize("name", ["beta", "exponential", "karras", "kl_optimal"])
def test_yaml_has_the_range_of_stable_diffusion(name):
    schedule = instantiate(OmegaConf.load(CONF / "stepsize" / f"{name}.yaml")).schedule
    path = DDPMPath(scaled_linear_betas(1000, 0.00085, 0.012))
    t = path.canonical(torch.tensor([0.0, 999.0]).double())
    result = [schedule.sigma_min, schedule.sigma_max]
    np.testing.assert_allclose(result, t / (1 - t), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KLOptimalSchedule(2.0, 1.0), "sigma_min must be below sigma_max, got 2"),
        (lambda: KLOptimalSchedule(0.0, 1.0), "sigma_min must be above 0 and .*, got 0"),
        (lambda: BetaSchedule(1.0, 1.0, 0.6, 0.6), "sigma_min must be below sigma_max"),
        (lambda: BetaSchedule(*SD_RANGE, 0.0, 0.6), "alpha must be from 0.01 to 100, got 0"),
        (lambda: BetaSchedule(*SD_RANGE, 0.6, -1), "beta must be .* got -1"),
        (lambda: BetaSchedule(*SD_RANGE, 1e-2, 1e-2).nodes(30), "30 distinct times"),
        (lambda: LinearQuadraticSchedule(0.0, None), "threshold must be .* got 0"),
        (
            lambda: LinearQuadraticSchedule(1, None),
            "threshold must be at least 1e-06 and below 1, got 1",
        ),
        (lambda: LinearQuadraticSchedule(float("nan"), None), "threshold.*got nan"),
        (lambda: LinearQuadraticSchedule(0.025, 0), "linear_steps must be at least 1, got 0"),
        (
            lambda: LinearQuadraticSchedule(0.025, 4).nodes(4),
            "linear_steps=4 leaves none of 4 steps",
        ),
        (lambda: LinearQuadraticSchedule(0.9, 1).nodes(10), "10 distinct times"),
    ],
)
def test_impossible_arguments_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", SCHEDULES)
def test_fewer_than_one_step_is_refused(name):
    with pytest.raises(ValueError, match=r"num_steps must be from 1 to .*, got 0"):
        SCHEDULES[name].nodes(0)
