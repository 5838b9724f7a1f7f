"""DM-NonUniform has the objective, starts and optima of the released code, and plans with them."""

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import mostly_slow

from oss_exp.distances import XtMSE
from oss_exp.noise import (
    CosinePath,
    DDPMPath,
    EDMPath,
    FlowPath,
    FlowSchedule,
    GaussianPath,
    linear_betas,
)
from oss_exp.solvers import Euler
from oss_exp.stepsize import Problem
from oss_exp.stepsize.baselines.dm import DM, linearise, objective, optimise, parts, spaced

VP = CosinePath()
FLOW = FlowPath(1.0, 1.0)
EDM = EDMPath()
PATHS = {"vp": VP, "flow": FLOW, "edm": EDM, "ddpm": DDPMPath(linear_betas(1000, 1e-4, 0.02))}
INITS = ("unif", "unif_t", "quad", "edm")
DEFAULT = DM(VP, 2, None, "unif", 0.0105, 152.0)
ENDS = -math.log(152.0), -math.log(0.0105)


@dataclass(frozen=True)
class LinearVP(GaussianPath):
    """The continuous chain of the oracle: d log alpha / dt = -(0.1 + 19.9 t) / 2 on [0, 1]."""

    def canonical(self, tau):
        ratio = torch.expm1(9.95 * tau**2 + 0.1 * tau).sqrt()
        return ratio / (1 + ratio)

    def native(self, t):
        return ((0.01 + 39.8 * torch.log1p((t / (1 - t)) ** 2)).sqrt() - 0.1) / 19.9


@pytest.fixture(scope="module")
def oracle(request) -> dict:
    return json.loads((request.config.rootpath / "tests/oracles/dm_nonuniform.json").read_text())


@pytest.fixture(scope="module")
def problem(gmm) -> Problem:
    def never(x, t):
        raise AssertionError("DM calls no network")

    return Problem(never, gmm["z"][:2], FlowSchedule(1.0).nodes(20), Euler(), XtMSE())


def doubles(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def start_of(case: dict) -> torch.Tensor:
    return doubles(case["lambda_T"], *case["init_lambdas_interior"], case["lambda_eps"])


def best_of(oracle: dict, case: dict) -> float:
    """Return the least objective of the released code over its starts."""
    settings = ("schedule", "truncNum", "p", "N")
    same = [c for c in oracle["cases"] if all(c[key] == case[key] for key in settings)]
    return min(c["objective_opt"] for c in same)


def cases(oracle: dict, separate_steps: int, size: int) -> list[dict]:
    """Return the released runs on the linear chain."""
    settings = ("linear", separate_steps, size)
    return [c for c in oracle["cases"] if (c["schedule"], c["truncNum"], c["N"]) == settings]


# --------------------------------------------------------------------------------------------------
# Against the released code
# --------------------------------------------------------------------------------------------------


def test_the_objective_at_random_nodes_equals_released_code(oracle):
    assert len(oracle["objective_random"]) == 108
    for case in oracle["objective_random"]:
        rows = [
            [case["lambda_T"], *inner, case["lambda_eps"]] for inner in case["lambdas_interior"]
        ]
        values = objective(doubles(*rows), VP, case["p"], case["truncNum"])
        torch.testing.assert_close(values, doubles(*case["objective"]), rtol=1e-12, atol=0)


def test_the_objective_at_starts_and_optima_equals_released_code(oracle):
    assert len(oracle["cases"]) == 108
    for case in oracle["cases"]:
        for nodes, key in (
            (start_of(case), "objective_init"),
            (doubles(*case["opt_lambdas"]), "objective_opt"),
        ):
            value = objective(nodes, VP, case["p"], case["truncNum"])
            assert float(value) == pytest.approx(case[key], rel=1e-12)


def test_starts_equal_released_code(oracle):
    """The released grids are float32."""
    for case in oracle["origin"]:
        expected = doubles(*case["lambdas"])
        result = spaced(
            case["init"], LinearVP(), float(expected[0]), float(expected[-1]), case["N"]
        )
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", mostly_slow([5, 6, 7, 8, 10, 12, 15], 5))
def test_optimum_with_three_separate_steps(oracle, size):
    """Every start leads to the same value, never above the best of the released code."""
    optimal_values = {}
    for case in cases(oracle, 3, size):
        nodes = optimise(start_of(case), VP, case["p"], 3)
        assert (nodes[0], nodes[-1]) == (case["lambda_T"], case["lambda_eps"])
        assert (nodes.diff() > 0).all()
        if size <= 6:  # beyond, the released runs end at different nodes
            torch.testing.assert_close(nodes, doubles(*case["opt_lambdas"]), rtol=0, atol=1e-3)
        value = float(objective(nodes, VP, case["p"], 3))

        assert value <= best_of(oracle, case) * (1 + 1e-9)
        assert value == pytest.approx(optimal_values.setdefault(case["p"], value), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [5, 10])
def test_optimum_where_all_terms_may_cancel(oracle, size):
    for case in cases(oracle, 0, size)[:2]:
        nodes = optimise(start_of(case), VP, case["p"], 0)
        assert (nodes.diff() > 0).all()
        assert float(objective(nodes, VP, case["p"], 0)) <= best_of(oracle, case)


@pytest.mark.slow
def test_with_one_separate_step_the_nodes_pile_up(oracle):
    """Of ten steps five or more are shorter than a tenth of the mean, as the class warns."""
    steps = {n: optimise(spaced("unif", VP, *ENDS, 10), VP, 2, n).diff() for n in (1, 2)}
    assert (steps[1] < 0.1 * steps[1].mean()).sum() >= 5
    assert (steps[2] > 0.1 * steps[2].mean()).all()


# --------------------------------------------------------------------------------------------------
# Derivatives, paths and starts
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separate_steps", [None, 3, 0])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_derivatives_are_central_differences(path, separate_steps):
    nodes = spaced("unif", path, *ENDS, 8) + torch.linspace(0, 1, 9, dtype=torch.float64).square()

    def both(x):
        smooth, totals = parts(x, path, 2, separate_steps)
        return torch.cat([smooth[None], totals])

    values, jacobian = linearise(nodes, path, 2, separate_steps)
    step = 1e-5 * torch.eye(9, dtype=torch.float64)
    differences = torch.stack([(both(nodes + d) - both(nodes - d)) / 2e-5 for d in step], dim=1)

    torch.testing.assert_close(values, both(nodes))
    torch.testing.assert_close(
        jacobian, differences, rtol=1e-6, atol=1e-7 * float(values.abs().max())
    )
    assert float(values[0] + values[1:].abs().sum()) == pytest.approx(
        float(objective(nodes, path, 2, separate_steps))
    )


@pytest.mark.slow
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_every_start_leads_to_the_same_schedule(path, p):
    for k, separate_steps in ((3, None), (10, None), (7, 3)):
        starts = [spaced(init, path, *ENDS, k) for init in INITS]
        optima = [optimise(start, path, p, separate_steps) for start in starts]
        for start, optimum in zip(starts, optima, strict=True):
            assert (start.diff() > 0).all()
            before, after = (objective(x, path, p, separate_steps) for x in (start, optimum))
            assert after < before
            torch.testing.assert_close(optimum, optima[0], rtol=0, atol=2e-3)


def test_one_step_has_nothing_to_choose():
    assert optimise(doubles(*ENDS), VP, 2, None).tolist() == list(ENDS)
    assert float(objective(doubles(*ENDS), VP, 1, None)) == pytest.approx(
        152 * (1 / 0.0105 - 1 / 152)
    )


@pytest.mark.parametrize("init", INITS)
def test_two_steps_by_hand(init):
    """For p = 1 the objective is e^h0 + e^h1 - 2, least in the middle."""
    optimum = optimise(spaced(init, VP, *ENDS, 2), VP, 1, None)
    assert float(optimum[1]) == pytest.approx(sum(ENDS) / 2, abs=1e-6)
    assert float(objective(optimum, VP, 1, None)) == pytest.approx(
        2 * math.exp((ENDS[1] - ENDS[0]) / 2) - 2
    )


def test_all_paths_agree_for_p_one():
    plans = [optimise(spaced("unif", path, *ENDS, 6), path, 1, None) for path in PATHS.values()]
    for plan in plans:
        torch.testing.assert_close(plan, plans[0], rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# As a strategy
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_plan_has_the_optimal_times_of_its_path(problem, path):
    plans = replace(DEFAULT, path=path).plan(problem, [10, 1, 2, 5])
    assert list(plans) == [1, 2, 5, 10]
    for k, plan in plans.items():  # strictly decreasing to 0, or StepSchedule would not have it
        assert (plan.num_steps, plan.start.kind, plan.times.dtype) == (k, "pinned", torch.float64)
        assert (plan.times[0], plan.times[-1]) == (1, 0)
    optimum = optimise(spaced("unif", path, *ENDS, 5), path, 2, None)

    assert plans[5].times[1:-1].tolist() == pytest.approx(
        torch.sigmoid(-optimum[1:-1]).tolist(), rel=1e-12
    )
    assert DEFAULT.network_calls(100, [5, 10]) == 0


def test_plans_where_gradients_are_off(problem):
    with torch.inference_mode():
        plan = DEFAULT.plan(problem, [5])[5]
    assert plan.times.equal(DEFAULT.plan(problem, [5])[5].times)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": -1}, "p must be above 0 and at most 100, got -1"),
        ({"p": 1e30}, r"p must be above 0 and at most 100, got 1e\+30"),
        ({"sigma_max": math.inf}, "sigma_max must be above 0 and .*, got inf"),
        ({"sigma_min": math.nan}, "sigma_min must be above 0 and .*, got nan"),
        ({"sigma_min": 0}, "sigma_min must be above 0 and .*, got 0"),
        ({"sigma_min": 200.0}, "sigma_min must be below sigma_max, got 200.0 and 152.0"),
        ({"separate_steps": -1}, "separate_steps must be at least 0, got -1"),
        ({"init": "best"}, "init must be one of unif, unif_t, quad, edm, got 'best'"),
        ({"init": None}, "init must be one of"),
    ],
)
def test_wrong_options(change, message):
    with pytest.raises(ValueError, match=message):
        replace(DEFAULT, **change)


def test_wrong_budgets(problem):
    for budgets in ([0], [], [21], [2.5]):
        with pytest.raises(ValueError, match="whole numbers from 1 to 20"):
            DEFAULT.plan(problem, budgets)


def test_a_second_time_above_the_teachers_first_is_refused(problem):
    late = replace(problem, grid=problem.grid / 2)
    assert DEFAULT.plan(late, [1])[1].times.tolist() == [0.5, 0]
    words = r"second time, 0\.9\d+, above the teacher's first, 0\.5000; choose a smaller"
    with pytest.raises(ValueError, match=words):
        DEFAULT.plan(late, [5])


def test_ends_beyond_the_chain_are_refused(problem):
    beyond = replace(DEFAULT, path=PATHS["ddpm"], init="unif_t", sigma_min=1e3, sigma_max=1e4)
    with pytest.raises(ValueError, match="needs 6 distinct log SNRs"):
        beyond.plan(problem, [5])


@pytest.mark.parametrize(
    "change",
    [
        {"path": EDM, "p": 100, "sigma_max": 1e12},
        {"p": 100, "sigma_min": 1e-12, "sigma_max": 1e-11},
    ],
)
def test_an_objective_beyond_float64_is_refused(problem, change):
    words = "choose a smaller p, a larger sigma_min or a smaller sigma_max"
    with pytest.raises(ValueError, match=words):
        replace(DEFAULT, **change).plan(problem, [5])
