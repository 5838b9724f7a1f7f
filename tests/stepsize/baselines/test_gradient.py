"""Students that learn by gradient are those of their papers' formulas at any parameters, and learning helps."""

from dataclasses import replace

import pytest
import torch

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
from oss_exp.stepsize.problem import Collective
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
    """The schedule of `init`, parameters a little away from it, and the student's times and result there."""
    steps = (init or learner.init).plan(problem, [K])[K]
    draw = torch.Generator().manual_seed(1)
    parameters = [
        each + 0.1 * torch.randn(each.shape, generator=draw, dtype=torch.float64)
        for each in learner.parameters(problem, steps)
    ]
    times, weights = learner.student(problem, steps, parameters)
    learned = replace(steps, times=times, steps=FittedSteps(weights, problem.teacher.mean))
    return (
        steps,
        parameters,
        times,
        sample(Euler(), problem.velocity, problem.noise, learned, problem.group),
    )


def told(problem, x, q):
    """The clean sample that the network sees in x when it is told q."""
    return x - q * problem.velocity(x, q.expand(len(x)))


def shares(logits):
    """Times 1 .. 0 whose gaps are the softmax."""
    return torch.cat([torch.ones(1), 1 - logits.softmax(0).cumsum(0)]).double().clamp(min=0)


# --------------------------------------------------------------------------------------------------
# Formulas
# --------------------------------------------------------------------------------------------------


def test_ld3_tells_the_network_other_times_than_the_solver_has(problem):
    problem = replace(problem, solver=Euler())
    _, (logits, query_logits), times, x0 = at_random_parameters(LEARNERS["ld3"], problem)
    t = shares(logits)
    q = shares(query_logits)
    x = problem.noise
    torch.testing.assert_close(times, q, rtol=0, atol=1e-12)
    for k in range(K):
        x = t[k + 1] / t[k] * x + (1 - t[k + 1] / t[k]) * told(problem, x, q[k])

    torch.testing.assert_close(x0, x)


def test_bns_adds_to_eulers_weights_over_the_noise_and_all_predictions(problem):
    """x_{k+1} = a_k z + sum_j b_kj m_j, of Euler: a_k = t_{k+1}, b_kj = t_{k+1} (1 / t_{j+1} - 1 / t_j)."""
    _, (logits, change), times, x0 = at_random_parameters(LEARNERS["bns"], problem)
    t = shares(logits)
    x = problem.noise
    known = []
    mean = problem.teacher.sample_mean
    torch.testing.assert_close(times, t, rtol=0, atol=1e-12)
    for k in range(K):
        known.append(told(problem, x, t[k]))
        delta = change[k]
        b = [
            1.0 if k + 1 == K and j == k else t[k + 1] * (1 / t[j + 1].clamp(min=1e-9) - 1 / t[j])
            for j in range(k + 1)
        ]
        x = delta[0] * x + (t[k + 1] + delta[1]) * problem.noise + delta[2] * mean
        x = x + sum((b[j] + delta[3 + k - j]) * known[j] for j in range(k + 1))

    torch.testing.assert_close(x0, x)


def test_gs_adds_to_the_weights_of_dpm_solver(problem):
    """Lu et al. 2022, arXiv 2211.01095, equation 9 and the third order of the released code."""
    _, (logits, query_logits, change), _, x0 = at_random_parameters(LEARNERS["gs"], problem)
    t = shares(logits)
    q = shares(query_logits)
    x = problem.noise
    known = []
    mean = problem.teacher.sample_mean
    lam = ((1 - t) / t).log()
    for k in range(K):
        known.insert(0, told(problem, x, q[k]))
        m = known[0]
        step = (t[k + 1] / t[k]) * x + (
            1 - t[k + 1] / t[k]
        ) * m  # orders 1: from pure noise, and to clean data
        if k == 2:  # of the three calls that it may look back on, the first was at pure noise
            h = lam[3] - lam[2]
            r = (lam[2] - lam[1]) / (lam[3] - lam[2])
            step = t[3] / t[2] * x - (1 - t[3]) * torch.expm1(-h) * (
                (1 + 1 / (2 * r)) * m - known[1] / (2 * r)
            )
        delta = change[k]
        vectors = [x, problem.noise, mean, *known]
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
    known = []
    for k in range(K):
        level = now if k == 0 else s[k - 1] * now
        q = level / (1 + level) if by_sigma else level
        assert abs(q - times[k]) < 1e-12
        known.insert(0, (x - told(problem, x * (1 - q) if by_sigma else x, q)) / now)
        x = x + (clock[k + 1] - now) * sum(w[k, j] * d for j, d in enumerate(known))
        now = now + w[k, : k + 1].sum() * (clock[k + 1] - now)

    torch.testing.assert_close(x0, x)


# --------------------------------------------------------------------------------------------------
# Beginnings
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver", [Euler(), AdamsBashforth(3), DPMSolverPP(3), UniPC(3)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("start", ["pinned", "analytic"])
def test_a_solvers_steps_are_fitted_ones(problem, mixture, solver, start):
    """Under guidance too, where the weights of conditional and unconditional answers are their shares."""
    labels = torch.arange(len(problem.noise)) % 3
    for velocity, more in (
        (problem.velocity, {}),
        (mixture.velocity(labels, Guidance(2.0)), {"group": labels, "num_groups": 3}),
    ):
        whole = Problem(velocity, problem.noise, problem.grid, solver, **more)
        steps = ClosedForm(FlowSchedule(2.0), start).plan(whole, [5])[5]
        by_solver, by_weights = (
            sample(solver, velocity, whole.noise, each, whole.group)
            for each in (steps, as_fitted(whole, steps))
        )
        torch.testing.assert_close(by_weights, by_solver)


def test_a_singlestep_solvers_are_not(problem):
    whole = replace(problem, solver=Heun())
    with pytest.raises(ValueError, match="calls the network again within a step"):
        as_fitted(whole, FLOW.plan(whole, [3])[3])


@pytest.mark.parametrize("name", ["bns", "gs"])
@pytest.mark.parametrize("init", [FLOW, OSSFit(refine=False)], ids=["pinned", "fitted"])
def test_they_begin_with_the_steps_of_init(problem, name, init):
    learner = replace(LEARNERS[name], init=init)
    steps = init.plan(problem, [K])[K]
    times, weights = learner.student(problem, steps, learner.parameters(problem, steps))
    begun = replace(steps, times=times, steps=FittedSteps(weights, problem.teacher.mean))
    expected, x0 = (
        sample(problem.solver, problem.velocity, problem.noise, each, problem.group)
        for each in (steps, begun)
    )

    torch.testing.assert_close(x0, expected, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Learning
# --------------------------------------------------------------------------------------------------


def validation(problem, steps) -> float:
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

    class Twice(Collective):
        """Two ranks with the same samples: sums double, means stay."""

        def sum(self, tensor):
            return 2 * tensor

    whole = learner.plan(problem, [3])[3]
    small = replace(learner, micro_batch=3).plan(problem, [3])[3]
    both = learner.plan(replace(problem, collective=Twice()), [3])[3]

    for other in (small, both):
        torch.testing.assert_close(other.times, whole.times, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(other.steps.weights, whole.steps.weights, rtol=1e-8, atol=1e-8)


def test_what_was_computed_before_a_kill_is_answered_from_the_file(problem, tmp_path):
    """Calls that gradients go through are made again, the others are not, and the result is the same."""
    learner = replace(LEARNERS["bns"], iterations=3)
    asked = []

    def fn(x, t, condition):
        asked.append(len(x))
        if len(asked) == 50:  # the teacher, and some of the training
            raise KeyboardInterrupt
        return problem.velocity.fn(x, t, condition)

    expected = learner.plan(problem, [3])[3]
    calls = Calls(tmp_path, rank=0)
    kept = replace(problem, velocity=calls.kept(replace(problem.velocity, fn=fn)))
    with pytest.raises(KeyboardInterrupt), calls.of("bns"):
        learner.plan(kept, [3])
    before = len(asked)
    with calls.of("bns"):
        found = learner.plan(kept, [3])[3]

    assert torch.equal(found.times, expected.times)
    assert torch.equal(found.steps.weights, expected.steps.weights)
    assert len(asked) - before < 25  # of 60
