"""LD3 has the released parametrisation, and training lowers the error on other noises."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import ORACLES
from replay import SameSamplesTwice

from oss_exp.distances import XtMSE
from oss_exp.noise import EDMSchedule, FlowSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.stepsize import OSS, ClosedForm, Problem
from oss_exp.stepsize.baselines.ld3 import LD3, times_from

UNIFORM = ClosedForm(FlowSchedule(1.0), "pinned")


def ld3(init=UNIFORM, iterations=40, micro_batch=5) -> LD3:
    """Return LD3 with the settings of these tests."""
    return LD3(
        init,
        iterations=iterations,
        learning_rate=0.02,
        momentum=0.9,
        decay=0.8,
        patience=5,
        micro_batch=micro_batch,
    )


def problem(velocity, noise, solver) -> Problem:
    return Problem(velocity, noise, FlowSchedule(1.0).nodes(40), solver, XtMSE())


def error(problem: Problem, steps) -> float:
    """Return the mean squared error of the samples of these steps."""
    group = problem.group if steps.mean is not None else None
    x0 = sample(problem.solver, problem.velocity, problem.noise, steps, group)
    return float((x0 - problem.teacher.states[-1]).square().mean())


def test_times_equal_the_released_parametrisation():
    """Released: t falls from t_max to t_min by a cumulative softmax; its first number is unused."""
    cases = json.loads((ORACLES / "ld3.json").read_text())["cases"]
    cases = [case for case in cases if case["mode"] == "time"]
    assert len(cases) > 5

    for case in cases:
        result = times_from(torch.tensor(case["theta1"]).double().flip(0)[:-1], 1.0)
        expected = torch.tensor(case["t1"]).double()
        result = result * (expected[0] - expected[-1]) + expected[-1]
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6 * expected[0])


def test_the_logarithms_of_the_gaps_give_the_times_back():
    times = EDMSchedule(0.002, 80, 7).nodes(7)
    torch.testing.assert_close(
        times_from((-times.diff()).log(), float(times[0])), times, rtol=1e-12, atol=1e-14
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "start"),
    [
        (Euler(), "pinned"),
        (Euler(), "analytic"),
        (DPMSolverPP(2, lower_order_final=True), "pinned"),
    ],
    ids=["euler", "euler-analytic", "2m"],
)
def test_training_lowers_the_error_on_other_noises(mixture, solver, start):
    noise = torch.randn(112, 64, generator=torch.Generator().manual_seed(1)).double()
    velocity = mixture.velocity(None)
    search = problem(velocity, noise[:48], solver)
    other = problem(velocity, noise[48:], solver)
    init = ClosedForm(EDMSchedule(0.002, 80, 7), start)
    before = init.plan(search, [4])[4]
    after = ld3(init).plan(search, [4])[4]

    assert after.start.kind == start
    assert error(other, after) < 0.6 * error(other, before)


def test_training_never_raises_the_error_on_the_validation_half(velocity, gmm):
    whole = problem(velocity, gmm["z"], Euler())
    wild = replace(ld3(iterations=3), learning_rate=50.0).plan(whole, [4])[4]
    half = problem(velocity, gmm["z"][1::2], Euler())
    assert error(half, wild) <= error(half, UNIFORM.plan(half, [4])[4]) * (1 + 1e-12)


def test_any_micro_batch_and_any_ranks_give_the_same_times(velocity, gmm):
    whole = problem(velocity, gmm["z"], Euler())
    ranks = replace(whole, collective=SameSamplesTwice())

    expected = ld3(iterations=5).plan(whole, [3])[3].times
    small = ld3(iterations=5, micro_batch=1).plan(whole, [3])[3].times
    both = ld3(iterations=5).plan(ranks, [3])[3].times

    torch.testing.assert_close(small, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(both, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"micro_batch": -1}, "micro_batch must be at least 1, got -1"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0 and at most 100, got -1.0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"init": OSS("free", None, False, 4)}, "one schedule for all samples"),
    ],
)
def test_wrong_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(ld3(), **change)


def test_one_sample_cannot_be_halved(velocity, gmm):
    with pytest.raises(ValueError, match="it needs two or more"):
        ld3().plan(problem(velocity, gmm["z"][:1], Euler()), [2])


def test_it_learns_under_no_grad_and_refuses_inference_mode(velocity, gmm):
    whole = problem(velocity, gmm["z"], Euler())
    with torch.no_grad():  # as under a Lightning trainer
        assert not torch.equal(
            ld3(iterations=5).plan(whole, [4])[4].times, UNIFORM.plan(whole, [4])[4].times
        )
    with torch.inference_mode(), pytest.raises(ValueError, match=r"trainer\.inference_mode=false"):
        ld3().plan(whole, [2])
