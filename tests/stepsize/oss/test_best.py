"""The best of a portfolio: other samples judge the candidates, and no baseline is better."""

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
from oss_exp.calibration import Calibration
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
BASELINES = {"fm", "ddim", "edm", "logsnr", "gits"}


@pytest.fixture(scope="module")
def problem(mixture, gmm) -> Problem:
    labels = torch.arange(16) // 2 % 4
    grid = FlowSchedule(shift=2.0).nodes(N)
    velocity = mixture.velocity(labels, Guidance(2.0))
    return Problem(velocity, gmm["z"], grid, DPMSolverPP(2, True), group=labels, num_groups=4)


@pytest.mark.parametrize("objective", ["mean", "root_mean", "log_mean"])
def test_samples_that_do_not_count_change_nothing(problem, objective):
    """A search and a fit over some rows are those of a problem that has no others."""
    rows = torch.arange(16) % 3 > 0
    search = OSSShared("analytic", BAND, True, objective)
    alone = problem.subset(rows.nonzero()[:, 0])

    for k, path in search.paths(problem, [3, 5], Shared(objective, rows)).items():
        expected = search.paths(alone, [3, 5], Shared(objective))[k]
        assert torch.equal(path.nodes, expected.nodes)
        assert torch.equal(path.orders, expected.orders)
        student = FittedStudent(problem, "analytic", Shared(objective, rows), Fit())
        other_student = FittedStudent(alone, "analytic", Shared(objective), Fit())
        with torch.no_grad():
            fitted, *_ = student.run(path)
            other, *_ = other_student.run(path)
        torch.testing.assert_close(fitted.weights, other.weights, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("objective", ["mean", "root_mean", "log_mean"])
def test_the_best_is_chosen_and_no_baseline_is_better(problem, objective):
    plans = OSSBest(band=BAND, objective=objective).plan(problem, [2, 5])
    for steps in plans.values():
        scores = steps.about("planning")["chosen_from"]
        assert BASELINES | {"teacher's times", "pinned start, fitted steps"} < {*scores}
        assert scores[steps.about("planning")["chosen"]] == max(scores.values())


def test_scores_are_the_judges_errors(problem):
    baselines = {"fm": ClosedForm(), "gits": GITS()}
    steps = OSSBest(band=BAND, refine=False, baselines=baselines).plan(problem, [4])[4]
    judges = halves(problem)[1]
    for name, strategy in baselines.items():
        plan = strategy.plan(problem, [4])[4]
        x0 = sample(problem.solver, problem.velocity, problem.noise, plan, problem.group)
        error = (x0 - problem.teacher.states[-1]).square().mean(1)[judges]
        expected = float(-10 * error.log10().mean())
        assert steps.about("planning")["chosen_from"][name] == pytest.approx(expected, abs=0.006)


def test_a_calibrated_solver_plans_what_it_plans_without_its_calibration(problem):
    """A table of other amplitudes would change every score."""
    zeros = torch.zeros(len(problem.grid), dtype=torch.float64)
    table = Calibration(problem.grid, zeros - 5, zeros + 5)
    calibrated = replace(problem, solver=replace(problem.solver, calibration=table))
    strategy = OSSBest(band=BAND, refine=False)

    expected = strategy.plan(problem, [4])[4]
    steps = strategy.plan(calibrated, [4])[4]

    assert torch.equal(steps.times, expected.times)
    assert steps.about("planning") == expected.about("planning")


def test_a_better_baseline_wins_and_stays_as_it_is(problem):
    """A refined schedule, fitted to the judges too."""
    better = OSSFit("analytic", None, True, "mean").plan(problem, [4])[4]

    class Known(ClosedForm):
        def plan(self, problem, num_steps):
            return {4: better}

    strategy = OSSBest("analytic", BAND, False, "mean", baselines={"known": Known()})
    steps = strategy.plan(problem, [4])[4]

    assert steps.about("planning")["chosen"] == "known"
    assert torch.equal(steps.times, better.times)
    assert torch.equal(steps.steps.weights, better.steps.weights)


def test_halves_share_no_sample(problem):
    makers, judges = halves(problem)
    assert torch.equal(makers, ~judges)


def test_halves_have_all_conditions(problem):
    one_each = replace(problem, group=torch.arange(16) % 4)
    for half in halves(one_each):
        assert one_each.group[half].unique().tolist() == [0, 1, 2, 3]


def test_a_single_sample_is_in_both_halves(problem):
    single = Problem(BoundVelocity(), problem.noise[:1], problem.grid, problem.solver)

    assert all(bool(half.all()) for half in halves(single))


def test_a_plain_function_has_the_schedule_of_its_bound_velocity(problem):
    bound = oss_exp.BoundVelocity()
    noise = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"num_teacher_steps": 16, "strategy": OSSBest(band=None, refine=False)}
    expected = oss_exp.search(bound, noise, 3, **options)
    plain = oss_exp.search(lambda x, t: bound(x, t), noise, 3, **options)

    assert torch.equal(plain.times, expected.times)
    assert torch.equal(plain.steps.weights, expected.steps.weights)


@pytest.mark.parametrize("change", [{"solver": Heun()}, {"distance": oss_exp.X0MSE()}])
def test_solvers_without_orders_and_distances_without_fits_have_a_best_schedule(problem, change):
    problem = replace(problem, **change)
    steps = OSSBest("analytic", BAND, False).plan(problem, [4])[4]
    assert_better_than_uniform(problem, steps)
    if "distance" in change:
        assert not isinstance(steps.steps, FittedSteps)


@pytest.mark.parametrize(("option", "nodes"), [("must_visit", [7]), ("first_sigmas", [1, 5])])
def test_the_best_schedule_has_the_required_times(problem, option, nodes):
    times = problem.grid[nodes].tolist()
    steps = OSSBest("analytic", BAND, False, **{option: times}).plan(problem, [4])[4]
    assert_better_than_uniform(problem, steps)
    assert set(times) <= set(steps.times.tolist())


def assert_better_than_uniform(problem: Problem, steps) -> None:
    """Assert a lower error than that of four steps of the flow schedule."""
    assert steps.num_steps == 4
    uniform = ClosedForm().plan(problem, [4])[4]
    error = final_error(problem, steps).log().mean()
    assert error < final_error(problem, uniform).log().mean()


def test_a_baseline_that_does_not_fit_is_left_out(problem):
    """GITS has 12 steps of its own, fewer than the 14 of the search."""
    baselines = {"fm": ClosedForm(), "gits": GITS(num_nodes=12)}
    strategy = OSSBest("analytic", BAND, False, baselines=baselines)
    scores = strategy.plan(problem, [14])[14].about("planning")["chosen_from"]
    assert "fm" in scores
    assert "gits" not in scores


def test_an_error_of_the_network_is_raised(problem):
    def broken(x, t, condition):
        raise ValueError("the network's own fault")

    failing = replace(problem, velocity=replace(problem.velocity, fn=broken))

    with pytest.raises(ValueError, match="the network's own fault"):
        OSSBest("analytic", BAND, False, baselines={"fm": ClosedForm()}).plan(failing, [4])


def test_a_baseline_has_one_schedule_for_all():
    with pytest.raises(ValueError, match="must plan one schedule for all samples, oss does not"):
        OSSBest(baselines={"oss": oss_exp.OSS()})


def test_a_second_path_is_refined_where_the_judges_hardly_tell_it_from_the_best(problem):
    counts = []
    for k, steps in OSSBest(band=BAND).plan(problem, [2, 3, 4, 5, 6]).items():
        scores = steps.provenance["planning"]["chosen_from"]
        refined = {name.removesuffix(", refined") for name in scores if name.endswith("refined")}
        others = {name: score for name, score in scores.items() if not name.endswith("refined")}
        paths = [name for name in others if name.endswith(("start", "fitted steps"))]
        best = sorted(paths, key=others.get)[-2:]
        assert refined == {name for name in best if others[name] > max(others.values()) - 1}, k
        counts.append(len(refined))
    assert {1, 2} <= set(counts)
