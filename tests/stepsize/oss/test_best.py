"""The best of a portfolio: what made a candidate does not judge it, and nothing known is better."""

from dataclasses import replace

import pytest
import torch
from replay import final_error

import oss_exp
from oss_exp import (
    GITS,
    Band,
    ClosedForm,
    DPMSolverPP,
    FlowSchedule,
    OSSBest,
    OSSFit,
    OSSShared,
    Problem,
)
from oss_exp.models.guidance import Guidance
from oss_exp.schedule import FittedSteps
from oss_exp.solvers import sample
from oss_exp.solvers.heun import Heun
from oss_exp.stepsize.oss.best import halves
from oss_exp.stepsize.oss.coefficients import Fit, FittedStudent
from oss_exp.stepsize.oss.objectives import Shared
from oss_exp.velocity import BoundVelocity

N = 24
BAND = Band(4, 1, 0)


@pytest.fixture(scope="module")
def problem(mixture, gmm) -> Problem:
    labels = torch.arange(16) // 2 % 4
    grid = FlowSchedule(shift=2.0).nodes(N)
    velocity = mixture.velocity(labels, Guidance(2.0))
    return Problem(velocity, gmm["z"], grid, DPMSolverPP(2, True), group=labels, num_groups=4)


@pytest.mark.parametrize("objective", ["mean", "log_mean"])
def test_samples_that_do_not_count_change_nothing(problem, objective):
    """A search and a fit over some rows are those of a problem that has no others."""
    rows = torch.arange(16) % 3 > 0
    search = OSSShared("analytic", BAND, True, objective)
    alone = problem.subset(rows.nonzero()[:, 0])
    for k, path in search.paths(problem, [3, 5], Shared(objective, rows)).items():
        expected = search.paths(alone, [3, 5], Shared(objective))[k]
        assert torch.equal(path.nodes, expected.nodes)
        assert torch.equal(path.orders, expected.orders)
        with torch.no_grad():
            fitted, *_ = FittedStudent(problem, "analytic", Shared(objective, rows), Fit()).run(
                path
            )
            other, *_ = FittedStudent(alone, "analytic", Shared(objective), Fit()).run(path)
        torch.testing.assert_close(fitted.weights, other.weights, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("objective", ["mean", "log_mean"])
def test_the_best_is_chosen_and_no_baseline_is_better(problem, objective):
    plans = OSSBest(band=BAND, objective=objective).plan(problem, [2, 5])
    for steps in plans.values():
        scores = steps.about("planning")["chosen_from"]
        assert {
            "fm",
            "ddim",
            "edm",
            "logsnr",
            "gits",
            "teacher's times",
            "pinned start, fitted steps",
        } < {*scores}
        assert scores[steps.about("planning")["chosen"]] == max(scores.values())


def test_scores_are_the_judges_errors(problem):
    """By an evaluation of their own; baselines are made by nobody's samples."""
    known = {"fm": ClosedForm(), "gits": GITS()}
    steps = OSSBest(band=BAND, refine=False, baselines=known).plan(problem, [4])[4]
    judges = halves(problem)[1]
    for name, strategy in known.items():
        plan = strategy.plan(problem, [4])[4]
        x0 = sample(problem.solver, problem.velocity, problem.noise, plan, problem.group)
        error = (x0 - problem.teacher.states[-1]).square().mean(1)[judges]
        expected = float(-10 * error.log10().mean())
        assert steps.about("planning")["chosen_from"][name] == pytest.approx(expected, abs=0.006)


def test_a_better_baseline_wins_and_stays_as_it_is(problem):
    """One that was refined, and has seen the judges."""
    known = OSSFit("analytic", None, True, "mean").plan(problem, [4])[4]

    class Known(ClosedForm):
        def plan(self, problem, num_steps):
            return {4: known}

    steps = OSSBest("analytic", BAND, False, "mean", baselines={"known": Known()}).plan(
        problem, [4]
    )[4]

    assert steps.about("planning")["chosen"] == "known"
    assert torch.equal(steps.times, known.times)
    assert torch.equal(steps.steps.weights, known.steps.weights)


def test_halves_have_all_conditions_and_no_sample_twice(problem):
    makers, judges = halves(problem)
    assert torch.equal(makers, ~judges)
    one_each = replace(problem, group=torch.arange(16) % 4)
    for half in halves(one_each):
        assert one_each.group[half].unique().tolist() == [0, 1, 2, 3]
    single = replace(
        problem,
        noise=problem.noise[:1],
        samples=None,
        group=None,
        velocity=BoundVelocity(),
        num_groups=1,
    )

    assert all(bool(half.all()) for half in halves(single))


def test_a_plain_function_has_the_schedule_of_its_bound_velocity(problem):
    bound = oss_exp.BoundVelocity()
    noise = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"num_teacher_steps": 16, "strategy": OSSBest(band=None, refine=False)}
    plain, known = (
        oss_exp.search(each, noise, 3, **options) for each in (lambda x, t: bound(x, t), bound)
    )

    assert torch.equal(plain.times, known.times)
    assert torch.equal(plain.steps.weights, known.steps.weights)


@pytest.mark.parametrize("change", ["heun", "x0_mse", "required", "first times"])
def test_every_kind_of_problem_has_one(problem, change):
    """Distances without fits, solvers without orders, required times: which the schedule has."""
    given = {}
    match change:
        case "heun":
            problem = replace(problem, solver=Heun())
        case "x0_mse":
            problem = replace(problem, distance=oss_exp.X0MSE())
        case "required":
            given = {"must_visit": [float(problem.grid[7])]}
        case "first times":
            given = {"first_sigmas": [float(problem.grid[1]), float(problem.grid[5])]}
    steps = OSSBest("analytic", BAND, False, **given).plan(problem, [4])[4]
    assert steps.num_steps == 4
    for time in [*given.get("must_visit", ()), *given.get("first_sigmas", ())]:
        assert time in steps.times.tolist()
    if change == "x0_mse":
        assert not isinstance(steps.steps, FittedSteps)
    errors = [
        final_error(problem, each).log().mean()
        for each in (steps, ClosedForm().plan(problem, [4])[4])
    ]

    assert errors[0] < errors[1]


def test_a_baseline_that_does_not_fit_is_left_out(problem):
    """GITS chooses among 12 steps of its own, and is asked for 14; what the network says is no such reason."""
    strategy = OSSBest(
        "analytic", BAND, False, baselines={"fm": ClosedForm(), "gits": GITS(num_nodes=12)}
    )
    scores = strategy.plan(problem, [14])[14].about("planning")["chosen_from"]
    assert "fm" in scores
    assert "gits" not in scores

    def broken(x, t, condition):
        raise ValueError("the network's own fault")

    failing = replace(problem, velocity=replace(problem.velocity, fn=broken))

    with pytest.raises(ValueError, match="the network's own fault"):
        strategy.plan(failing, [4])


def test_a_baseline_has_one_schedule_for_all():
    with pytest.raises(ValueError, match="must plan one schedule for all samples, oss does not"):
        OSSBest(baselines={"oss": oss_exp.OSS()})
