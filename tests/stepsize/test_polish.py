"""Polish: exact slopes, least squares on a single step, and better held-out samples."""

from dataclasses import replace

import pytest
import torch
from replay import SameSamplesTwice

from oss_exp.distances import XtMSE
from oss_exp.models.guidance import Guidance
from oss_exp.noise import FlowSchedule
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.stepsize import ClosedForm, OSSFit, Problem
from oss_exp.stepsize.polish import _Run, polish
from oss_exp.stepsize.solver_weights import as_fitted

SOLVER = DPMSolverPP(2, lower_order_final=True)
UNIFORM = ClosedForm(FlowSchedule(), "pinned")
ANALYTIC = ClosedForm(FlowSchedule(), "analytic")


@pytest.fixture(scope="module")
def problem(velocity, gmm) -> Problem:
    return Problem(velocity, gmm["z"], FlowSchedule(shift=2.0).nodes(40), SOLVER, XtMSE())


@pytest.fixture(scope="module")
def guided(mixture, gmm) -> Problem:
    labels = torch.arange(16) % 4
    velocity = mixture.velocity(labels, Guidance(2.0))
    return Problem(
        velocity, gmm["z"], FlowSchedule(shift=2.0).nodes(40), SOLVER, group=labels, num_groups=10
    )


def error(problem: Problem, steps: StepSchedule, rows=slice(None)) -> float:
    """Return the mean logarithm of the errors of these samples."""
    x0 = sample(problem.solver, problem.velocity, problem.noise, steps, problem.group)
    return float((x0 - problem.teacher.states[-1]).square().mean(1)[rows].log().mean())


@pytest.mark.parametrize("init", [UNIFORM, ANALYTIC], ids=["pinned", "analytic"])
def test_slopes_are_the_gradient_of_the_mean_logarithm(problem, init):
    steps = as_fitted(problem, init.plan(problem, [3])[3])
    times = steps.times.requires_grad_()
    weights = steps.steps.weights.requires_grad_()
    noise = problem.noise
    mean = problem.teacher.sample_mean

    # The gradient by backpropagation through the samples.
    x = noise
    predictions = []
    if init is ANALYTIC:
        x = times[0] / problem.grid[0] * noise + (1 - times[0] / problem.grid[0]) * mean
    for k in range(3):
        predictions.insert(0, x - times[k] * problem.velocity(x, times[k].expand(len(x))))
        x = sum(w * u for w, u in zip(weights[k], [x, noise, mean, *predictions], strict=False))
    (x - problem.teacher.states[-1]).square().mean(1).log().sum().backward()

    run = _Run(problem, replace(steps, times=times.detach()), "log_mean", None, 5)
    with torch.no_grad():
        whole = torch.ones(16, dtype=torch.bool)
        slopes, curvature = run.normal_equations(run.start, run.slopes(run.start, whole))

    over_weights = [weights.grad[k, columns] for k, columns in enumerate(run.columns)]
    expected = [times.grad[run.times], *over_weights]

    torch.testing.assert_close(2 * slopes, torch.cat(expected), rtol=0.05, atol=0.1)
    assert float(torch.linalg.eigvalsh(curvature)[0]) > -1e-9


@torch.no_grad()
def test_an_iteration_on_a_single_step_is_least_squares(problem):
    run = _Run(problem, as_fitted(problem, UNIFORM.plan(problem, [1])[1]), "mean", None, 5)
    whole = torch.ones(16, dtype=torch.bool)
    gradient, curvature = run.normal_equations(run.start, run.slopes(run.start, whole))
    better = run.schedule(run.moved(run.start, gradient, curvature, damping=1e-12))

    x0 = problem.noise - problem.grid[0] * problem.velocity(
        problem.noise, problem.grid[:1].expand(16)
    )
    vectors = torch.stack([problem.noise.flatten(), x0.flatten()], 1)
    target = problem.teacher.states[-1].flatten()
    least = (vectors @ torch.linalg.lstsq(vectors, target).solution).reshape(16, 64)
    result = sample(SOLVER, problem.velocity, problem.noise, better, problem.group)

    torch.testing.assert_close(result, least, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "init", [UNIFORM, ANALYTIC, OSSFit(refine=False)], ids=["pinned", "analytic", "fitted"]
)
def test_the_samples_that_are_not_trained_on_get_better(problem, init):
    steps = init.plan(problem, [4])[4]
    held_out = slice(3, None, 4)
    polished = error(problem, polish(problem, steps, 4), held_out)
    assert polished < error(problem, steps, held_out) - 0.1


def test_a_schedule_that_nothing_improves_stays(problem):
    """The teacher's own nodes leave no error."""
    few = Problem(problem.velocity, problem.noise, FlowSchedule().nodes(5), SOLVER)
    steps = UNIFORM.plan(few, [5])[5]
    assert error(few, polish(few, steps, 2)) <= error(few, as_fitted(few, steps))


def test_both_outputs_of_a_guided_call_have_weights(guided):
    steps = ANALYTIC.plan(guided, [3])[3]
    better = polish(guided, steps, 3)
    assert better.steps.weights.shape == (3, 9)
    assert error(guided, better) < error(guided, steps)


def test_any_micro_batch_and_any_ranks_polish_alike(problem):
    steps = UNIFORM.plan(problem, [3])[3]
    whole = polish(problem, steps, 2)
    small = polish(problem, steps, 2, micro_batch=1)
    both = polish(replace(problem, collective=SameSamplesTwice()), steps, 2)

    def final(steps):
        return sample(SOLVER, problem.velocity, problem.noise, steps, problem.group)

    torch.testing.assert_close(final(small), final(whole), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(final(both), final(whole), rtol=1e-5, atol=1e-6)


def test_required_times_stay(problem):
    time = float(problem.grid[20])
    plan = OSSFit(refine=False, polish=2, must_visit=[time]).plan(problem, [3])[3]
    assert time in plan.times.tolist()
    assert not set(plan.times.tolist()) <= set(problem.grid.tolist())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"distance": XtMSE(norm=1)}, "norm=2"),
        ({"velocity": lambda x, t: -x}, "a plain function knows all"),
    ],
)
def test_what_it_cannot_polish_is_refused(problem, change, words):
    parts = {"velocity": problem.velocity, "noise": problem.noise, **change}
    with pytest.raises(ValueError, match=words):
        polish(Problem(**parts), StepSchedule([1.0, 0.0]))


def test_three_samples_are_too_few(velocity, gmm):
    few = Problem(velocity, gmm["z"][:3], FlowSchedule().nodes(10), Euler())
    with pytest.raises(ValueError, match="it needs four or more"):
        polish(few, StepSchedule([1.0, 0.5, 0.0]))
