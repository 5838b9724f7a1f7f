"""Students that learn by gradient follow their papers' formulas, and learning helps them."""

from dataclasses import replace

import pytest
import torch
from replay import SameSamplesTwice

from oss_exp.distances import XtMSE
from oss_exp.models.guidance import Guidance
from oss_exp.noise import EDMSchedule, FlowSchedule
from oss_exp.schedule import FittedSteps
from oss_exp.solvers import Euler, sample
from oss_exp.solvers.adams_bashforth import AdamsBashforth
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.solvers.heun import Heun
from oss_exp.solvers.unipc import UniPC
from oss_exp.stepsize import ClosedForm, OSSFit, Problem
from oss_exp.stepsize.baselines.bns import BNS
from oss_exp.stepsize.baselines.dyweight import DyWeight
from oss_exp.stepsize.baselines.gs import GS
from oss_exp.stepsize.baselines.ld3 import LD3
from oss_exp.stepsize.solver_weights import as_fitted
from oss_exp.tasks.call_log import Calls

K = 4
FLOW = ClosedForm(FlowSchedule(2.0))
EDM = ClosedForm(EDMSchedule(0.002, 80.0, 7.0))
LEARNERS = {
    "ld3": LD3(FLOW, decoupled=True),
    "bns": BNS(FLOW),
    "gs": GS(FLOW),
    "dyweight": DyWeight(FLOW),
}


@pytest.fixture(scope="module")
def problem(velocity, gmm) -> Problem:
    return Problem(
        velocity,
        gmm["z"],
        FlowSchedule().nodes(40),
        DPMSolverPP(2, lower_order_final=True),
        XtMSE(),
    )


@pytest.fixture(scope="module")
def from_edm(velocity, gmm) -> Problem:
    """The noise is of a finite sigma, 80."""
    grid = EDMSchedule(0.002, 80.0, 7.0).nodes(40)
    return Problem(
        velocity, gmm["z"] * grid[0], grid, DPMSolverPP(2, lower_order_final=True), XtMSE()
    )


def at_random_parameters(learner, problem, init=None):
    """Return the schedule of `init`, parameters near it, and their times and samples."""
    steps = (init or learner.init).plan(problem, [K])[K]
    generator = torch.Generator().manual_seed(1)
    parameters = [
        parameter + 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for parameter in learner.parameters(problem, steps)
    ]
    times, weights = learner.student(problem, steps, parameters)
    learned = replace(steps, times=times, steps=FittedSteps(weights, problem.teacher.mean))
    x0 = sample(Euler(), problem.velocity, problem.noise, learned, problem.group)
    return steps, parameters, times, x0


def prediction_at(problem, x, q):
    """Return the clean sample that the network predicts from x at time q."""
    return x - q * problem.velocity(x, q.expand(len(x)))


def shares(logits):
    """Return times from 1 to 0 whose gaps are the softmax."""
    return torch.cat([torch.ones(1), 1 - logits.softmax(0).cumsum(0)]).double().clamp(min=0)


# --------------------------------------------------------------------------------------------------
# Formulas
# --------------------------------------------------------------------------------------------------


def test_ld3_calls_the_network_at_other_times_than_the_solver_has(problem):
    problem = replace(problem, solver=Euler())
    _, (logits, query_logits), times, x0 = at_random_parameters(LEARNERS["ld3"], problem)
    t = shares(logits)
    q = shares(query_logits)
    x = problem.noise
    torch.testing.assert_close(times, q, rtol=0, atol=1e-12)
    for k in range(K):
        x = t[k + 1] / t[k] * x + (1 - t[k + 1] / t[k]) * prediction_at(problem, x, q[k])

    torch.testing.assert_close(x0, x)


def test_bns_adds_to_eulers_weights_over_the_noise_and_all_predictions(problem):
    """x_{k+1} = a_k z + sum_j b_kj m_j. Euler: a_k = t_{k+1}, b_kj = a_k (1/t_{j+1} - 1/t_j)."""
    _, (logits, change), times, x0 = at_random_parameters(LEARNERS["bns"], problem)
    t = shares(logits)
    x = problem.noise
    predictions = []
    mean = problem.teacher.sample_mean
    torch.testing.assert_close(times, t, rtol=0, atol=1e-12)
    for k in range(K):
        predictions.append(prediction_at(problem, x, t[k]))
        delta = change[k]
        b = [t[k + 1] * (1 / t[j + 1].clamp(min=1e-9) - 1 / t[j]) for j in range(k + 1)]
        if k + 1 == K:
            b[k] = 1.0
        x = delta[0] * x + (t[k + 1] + delta[1]) * problem.noise + delta[2] * mean
        x = x + sum((b[j] + delta[3 + k - j]) * predictions[j] for j in range(k + 1))

    torch.testing.assert_close(x0, x)


def test_gs_adds_to_the_weights_of_dpm_solver(problem):
    """Lu et al. 2022, arXiv 2211.01095, equation 9 and the third order of the released code."""
    _, (logits, query_logits, change), _, x0 = at_random_parameters(LEARNERS["gs"], problem)
    t = shares(logits)
    q = shares(query_logits)
    x = problem.noise
    predictions = []
    mean = problem.teacher.sample_mean
    lam = ((1 - t) / t).log()
    for k in range(K):
        predictions.insert(0, prediction_at(problem, x, q[k]))
        m = predictions[0]
        step = (t[k + 1] / t[k]) * x + (1 - t[k + 1] / t[k]) * m  # order 1
        if k == 2:  # order 2: of its three calls the first was at pure noise
            h = lam[3] - lam[2]
            r = (lam[2] - lam[1]) / h
            d = (1 + 1 / (2 * r)) * m - predictions[1] / (2 * r)
            step = t[3] / t[2] * x - (1 - t[3]) * torch.expm1(-h) * d
        delta = change[k]
        vectors = [x, problem.noise, mean, *predictions]
        x = step + sum(delta[p] * vector for p, vector in enumerate(vectors))

    torch.testing.assert_close(x0, x)


@pytest.mark.parametrize("by_sigma", [False, True])
def test_dyweight_moves_its_clock_by_the_sum_of_its_weights(problem, from_edm, by_sigma):
    problem = from_edm if by_sigma else problem
    steps, (w, s), times, x0 = at_random_parameters(DyWeight(EDM), problem)
    scale = 1 - steps.times
    clock = steps.times / scale if by_sigma else steps.times
    x = problem.noise / (scale[0] if by_sigma else 1)
    now = clock[0]
    slopes = []
    for k in range(K):
        level = now if k == 0 else s[k - 1] * now
        q = level / (1 + level) if by_sigma else level
        assert abs(q - times[k]) < 1e-12
        slopes.insert(0, (x - prediction_at(problem, x * (1 - q) if by_sigma else x, q)) / now)
        x = x + (clock[k + 1] - now) * sum(w[k, j] * d for j, d in enumerate(slopes))
        now = now + w[k, : k + 1].sum() * (clock[k + 1] - now)

    torch.testing.assert_close(x0, x)


# --------------------------------------------------------------------------------------------------
# Initial steps
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver", [Euler(), AdamsBashforth(3), DPMSolverPP(3), UniPC(3)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("start", ["pinned", "analytic"])
def test_the_steps_of_a_multistep_solver_are_fitted_ones(problem, mixture, solver, start):
    """Under guidance too, where each output's weight is its share of the guided velocity."""
    labels = torch.arange(len(problem.noise)) % 3
    for velocity, more in (
        (problem.velocity, {}),
        (mixture.velocity(labels, Guidance(2.0)), {"group": labels, "num_groups": 3}),
    ):
        whole = Problem(velocity, problem.noise, problem.grid, solver, **more)
        steps = ClosedForm(FlowSchedule(2.0), start).plan(whole, [5])[5]
        by_solver, by_weights = (
            sample(solver, velocity, whole.noise, plan, whole.group)
            for plan in (steps, as_fitted(whole, steps))
        )
        torch.testing.assert_close(by_weights, by_solver)


def test_the_steps_of_a_singlestep_solver_are_not(problem):
    whole = replace(problem, solver=Heun())
    with pytest.raises(ValueError, match="calls the network again within a step"):
        as_fitted(whole, FLOW.plan(whole, [3])[3])


@pytest.mark.parametrize("name", ["bns", "gs"])
@pytest.mark.parametrize("init", [FLOW, OSSFit(refine=False)], ids=["pinned", "fitted"])
def test_before_learning_they_have_the_steps_of_init(problem, name, init):
    learner = replace(LEARNERS[name], init=init)
    steps = init.plan(problem, [K])[K]
    times, weights = learner.student(problem, steps, learner.parameters(problem, steps))
    initial = replace(steps, times=times, steps=FittedSteps(weights, problem.teacher.mean))
    expected, x0 = (
        sample(problem.solver, problem.velocity, problem.noise, plan, problem.group)
        for plan in (steps, initial)
    )

    torch.testing.assert_close(x0, expected, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Learning
# --------------------------------------------------------------------------------------------------


def validation(problem, steps) -> float:
    """Return the mean squared error on the half of the samples that is not trained on."""
    with torch.no_grad():
        x0 = sample(problem.solver, problem.velocity, problem.noise, steps, problem.group)
        return float((x0 - problem.teacher.states[-1])[1::2].square().mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_learning_lowers_the_error_on_the_samples_that_are_not_trained_on(problem, name):
    learner = replace(LEARNERS[name], iterations=40)
    before = validation(problem, FLOW.plan(problem, [K])[K])
    assert validation(problem, learner.plan(problem, [K])[K]) < 0.7 * before


@pytest.mark.parametrize("name", LEARNERS)
def test_any_micro_batch_and_any_ranks_learn_the_same(problem, name):
    learner = replace(LEARNERS[name], iterations=3)
    whole = learner.plan(problem, [3])[3]
    small = replace(learner, micro_batch=3).plan(problem, [3])[3]
    both = learner.plan(replace(problem, collective=SameSamplesTwice()), [3])[3]

    for other in (small, both):
        torch.testing.assert_close(other.times, whole.times, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(other.steps.weights, whole.steps.weights, rtol=1e-8, atol=1e-8)


def test_calls_from_before_a_kill_are_answered_from_the_log(problem, tmp_path):
    """Only calls that gradients go through are made again, and the result is the same."""
    learner = replace(LEARNERS["bns"], iterations=3)
    calls_made = []

    def fn(x, t, condition):
        calls_made.append(len(x))
        if len(calls_made) == 50:  # the teacher, and some of the training
            raise KeyboardInterrupt
        return problem.velocity.fn(x, t, condition)

    expected = learner.plan(problem, [3])[3]
    log = Calls(tmp_path, rank=0)
    logged_problem = replace(problem, velocity=log.recorded(replace(problem.velocity, fn=fn)))
    with pytest.raises(KeyboardInterrupt), log.of("bns"):
        learner.plan(logged_problem, [3])
    before = len(calls_made)
    with log.of("bns"):
        result = learner.plan(logged_problem, [3])[3]

    assert torch.equal(result.times, expected.times)
    assert torch.equal(result.steps.weights, expected.steps.weights)
    assert len(calls_made) - before < 25  # of 60
