"""Fitted steps sample what the fit scored, and do at least as well as the solver's steps."""

from dataclasses import replace

import pytest
import torch
from helpers import mostly_slow
from replay import RowCounter, final_error, schedule

from oss_exp.distances import X0MSE, Select, XtMSE
from oss_exp.models.guidance import Guidance
from oss_exp.noise import FlowSchedule
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, State, sample, walk
from oss_exp.solvers.adams_bashforth import AdamsBashforth
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.solvers.heun import Heun
from oss_exp.solvers.sampling import stepper
from oss_exp.stepsize import Band, OSSFit, OSSShared, Problem
from oss_exp.stepsize.oss.band import layers
from oss_exp.stepsize.oss.coefficients import Fit, FittedPath, FittedStudent
from oss_exp.stepsize.oss.objectives import Shared
from oss_exp.stepsize.oss.recursion import SolverPath, recurse
from oss_exp.stepsize.oss.refine import refine_fitted
from oss_exp.velocity import BoundVelocity

STARTS = ("free", "pinned", "analytic")
OBJECTIVES = [Shared("mean"), Shared("log_mean")]
N = 16
RIDGE = 1e-6


@pytest.fixture(scope="module")
def problem(velocity, gmm) -> Problem:
    return Problem(velocity, gmm["z"], FlowSchedule(shift=2.0).nodes(N), Euler(), XtMSE())


@pytest.fixture(scope="module")
def guided(mixture, gmm) -> Problem:
    """A guided problem: every network call has a conditional and an unconditional output."""
    labels = torch.arange(16) % 4
    velocity = mixture.velocity(labels, Guidance(2.0))
    grid = FlowSchedule(shift=2.0).nodes(N)
    return Problem(
        velocity, gmm["z"], grid, DPMSolverPP(2, True), XtMSE(), group=labels, num_groups=10
    )


def as_float32(velocity: BoundVelocity) -> BoundVelocity:
    """Return a velocity whose network rounds to single precision."""
    return replace(
        velocity, fn=lambda x, t, condition: velocity.fn(x.double(), t, condition).float()
    )


def search(problem: Problem, budgets, start: str, objective, fit: Fit) -> dict[int, FittedPath]:
    """Return the paths of Algorithm 2 with fitted coefficients."""
    steps = layers(problem.num_nodes, budgets, start, 1, "cpu")
    paths = recurse(problem, steps, budgets, start, objective).paths
    return {
        k: fit_along(problem, path.nodes[:, 0].tolist(), start, objective, fit)
        for k, path in paths.items()
    }


@torch.no_grad()
def fit_along(problem: Problem, nodes, start: str, objective, fit: Fit) -> FittedPath:
    """Return a path through these nodes with fitted coefficients."""
    column = torch.tensor(nodes)[:, None]
    return FittedStudent(problem, start, objective, fit).run(SolverPath(column, column, column))[0]


def fitted_states(problem: Problem, path, start: str) -> list[State]:
    """Return the observed states of a fitted schedule at all its times, by the sampling loop."""
    steps = schedule(problem, path, start)
    solver = stepper(problem.solver, steps, problem.noise, problem.group)[0]
    first = steps.initial_state(problem.noise, problem.group if start == "analytic" else None)
    return list(walk(solver, problem.velocity, first, steps.times))


# --------------------------------------------------------------------------------------------------
# Replay equals table
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", mostly_slow([1, 2, None], None))
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["problem", "guided"])
def test_replay_equals_table_at_every_node(kind, start, history, request):
    problem = request.getfixturevalue(kind)
    num_outputs = len(problem.teacher.first_outputs)
    for objective in OBJECTIVES:
        for k, path in search(problem, [1, 2, 5, 8], start, objective, Fit(history, RIDGE)).items():
            assert path.weights.shape == (k, 3 + (history or k) * num_outputs)
            states = fitted_states(problem, path, start)[1:]
            for node, state, cost in zip([*path.nodes[1:, 0], N], states, path.costs, strict=True):
                replayed = problem.cost(state.x, torch.tensor([int(node)]))
                torch.testing.assert_close(replayed, cost, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kind", ["problem", "guided"])
def test_a_schedule_survives_a_file(kind, request, tmp_path):
    problem = request.getfixturevalue(kind)
    plan = OSSFit("analytic", None, False, "log_mean", 3, RIDGE).plan(problem, [4])[4]
    loaded = StepSchedule.load(plan.save(tmp_path / "plan.json"))
    runs = [
        sample(Euler(), problem.velocity, problem.noise, steps, problem.group)
        for steps in (plan, loaded)
    ]

    assert torch.equal(*runs)


# --------------------------------------------------------------------------------------------------
# Between the ordinary step and the best one
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["problem", "guided"])
def test_a_strong_pull_gives_the_weights_of_the_solver(kind, order, request):
    """Of the highest order that the history allows; guided outputs have their shares."""
    solver = DPMSolverPP(order, lower_order_final=False)
    problem = replace(request.getfixturevalue(kind), solver=solver)
    mix = problem.velocity.mix
    history = 2
    path = fit_along(problem, [1, 4, 6, 10, 13], "analytic", Shared("mean"), Fit(history, 1e12))
    times = problem.grid[[*path.nodes[:, 0].tolist(), N]]

    for step, row in enumerate(path.weights):
        highest = min(order, history, step + 1)
        a, b = solver.coefficients(list(times[: step + 1].flip(0)[:highest]), times[step + 1])
        expected = torch.zeros_like(row)
        expected[0] = a
        for h, weight in enumerate(b):
            for r, share in enumerate(mix):
                expected[3 + h * len(mix) + r] = weight * share
        torch.testing.assert_close(row, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["problem", "guided"])
def test_a_fitted_edge_is_never_worse_than_the_ordinary_ones_from_the_same_state(
    kind, start, request
):
    """Least squares with a weak pull may choose any step of DPM-Solver++ in its history."""
    problem = request.getfixturevalue(kind)
    fit = Fit(3, 1e-12)
    nodes = [0 if start == "pinned" else 2, 5, 6, 10, 13]
    path = fit_along(problem, nodes, start, Shared("mean"), fit)
    states = fitted_states(problem, path, start)
    past = []

    for node, state, cost in zip([*nodes[1:], N], states, path.costs, strict=False):
        data = state.x - state.t[:, None] * problem.velocity(state.x, state.t)
        past.insert(0, (data, state.t))
        for order in range(1, min(len(past), 3) + 1):
            outputs, times = zip(*past[:order], strict=True)
            source = State(state.x, state.t, outputs, times)
            ordinary = DPMSolverPP(3, False).advance(None, source, problem.grid[node])
            edge = problem.cost(ordinary.x, torch.tensor([node])).mean()
            assert cost.mean() <= edge * (1 + 1e-8)


@pytest.mark.parametrize("kind", ["problem", "guided"])
def test_a_fit_for_the_mean_of_logarithms_lowers_it(kind, request):
    """Compared with least squares of the mean, on every edge from the same source."""
    problem = request.getfixturevalue(kind)
    gains = []
    for node in range(3, N):
        mean, log_mean = (
            fit_along(problem, [2, node], "free", o, Fit(1, 1e-9)).costs[0] for o in OBJECTIVES
        )
        assert mean.mean() <= log_mean.mean() * (1 + 1e-6)
        gains.append(float(mean.log().mean() - log_mean.log().mean()))

    assert min(gains) > -1e-6
    assert max(gains) > 0.01


def test_weights_are_those_of_a_ridge_regression(problem):
    """One edge as an ordinary least-squares problem, where the pull adds rows."""
    ridge, node = 1e-2, 7
    path = fit_along(problem, [3, node], "analytic", Shared("mean"), Fit(1, ridge))

    # The basis of the step, and its weights in an Euler step.
    x = fitted_states(problem, path, "analytic")[0]
    mean = problem.teacher.mean[problem.group].double()
    basis = torch.stack([u.flatten() for u in (x.x, problem.noise, mean, x.outputs[0])], dim=1)
    t = problem.grid[3]
    t_next = problem.grid[node]
    ordinary = torch.stack([t_next / t, 0 * t, 0 * t, 1 - t_next / t])

    # The regression.
    pull = (ridge * basis.square().sum(0)).sqrt()
    matrix = torch.cat([basis, pull.diag()])
    target = torch.cat([problem.teacher.states[node].flatten(), pull * ordinary])
    expected = torch.linalg.lstsq(matrix, target[:, None]).solution[:, 0]

    torch.testing.assert_close(path.weights[0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("start", ["pinned", "analytic"])
def test_fitted_steps_beat_searched_orders_and_history_helps(problem, start):
    multistep = replace(problem, solver=DPMSolverPP(2, lower_order_final=False))
    strategies = [OSSShared(start, None, True, "mean")]
    strategies += [OSSFit(start, None, False, "mean", history, RIDGE) for history in (1, 2, 3)]
    plans = [strategy.plan(multistep, [5])[5] for strategy in strategies]
    errors = [float(final_error(multistep, plan).mean()) for plan in plans]
    assert errors[1] < errors[0] / 2
    assert errors == sorted(errors, reverse=True)


# --------------------------------------------------------------------------------------------------
# Guidance
# --------------------------------------------------------------------------------------------------


def test_the_two_guided_outputs_have_separate_weights(guided):
    weights = OSSFit("analytic", None, False, "mean", 2, RIDGE).plan(guided, [5])[5].steps.weights
    conditional = weights[:, 3::2]
    unconditional = weights[:, 4::2]
    conditional_share = conditional[:, 0] / (conditional[:, 0] + unconditional[:, 0])
    assert bool(((conditional_share - 2.0).abs() > 0.01).any())
    assert conditional_share.std() > 0.01
    assert bool((weights[0, 5:] == 0).all())  # one call so far, no history


def test_separate_weights_of_the_guided_outputs_do_better_than_their_mixture(guided):
    """Compared at the same nodes with a network that returns only the guided velocity."""
    mixed = replace(guided, velocity=guided.velocity.__call__)
    for nodes in ([2, 4, 7, 10, 13], [1, 2, 4, 6, 8, 10, 12, 14]):
        apart, together = (
            fit_along(p, nodes, "analytic", Shared("mean"), Fit(None, RIDGE)).costs[-1]
            for p in (guided, mixed)
        )
        assert apart.mean() < together.mean()


# --------------------------------------------------------------------------------------------------
# No shortcut changes a result
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("start", mostly_slow(STARTS, "pinned"))
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_refine_never_loses_and_its_weights_are_those_of_its_nodes(problem, start, objective):
    fit = Fit(2, RIDGE)
    path = search(problem, [4], start, objective, fit)[4]
    better = refine_fitted(FittedStudent(problem, start, objective, fit), path)
    before = final_error(problem, schedule(problem, path, start))
    after = final_error(problem, schedule(problem, better, start))
    gain = objective(before, problem.collective) - objective(after, problem.collective)
    assert bool((gain >= 0).all())

    again = fit_along(problem, better.nodes[:, 0].tolist(), start, objective, fit)

    torch.testing.assert_close(better.weights, again.weights, rtol=1e-9, atol=0)


@pytest.mark.parametrize("start", mostly_slow(STARTS, "analytic"))
@pytest.mark.parametrize("kind", ["problem", "guided"])
def test_a_band_as_wide_as_the_grid_is_the_full_search(kind, start, request):
    problem = request.getfixturevalue(kind)
    full = OSSFit(start, None, False, "mean", 2, RIDGE).plan(problem, [3, 5])
    band = OSSFit(start, Band(4, N), False, "mean", 2, RIDGE).plan(problem, [3, 5])

    for k in (3, 5):
        assert torch.equal(full[k].times, band[k].times)
        torch.testing.assert_close(
            full[k].steps.weights, band[k].steps.weights, rtol=1e-8, atol=1e-8
        )


@pytest.mark.slow
def test_a_narrow_band_gives_a_schedule_that_runs(problem):
    plan = OSSFit("analytic", Band(4, 1, 1), True, "log_mean", 3, RIDGE).plan(problem, [5])[5]
    ordinary = OSSShared("analytic", Band(4, 1, 1), True, "log_mean").plan(problem, [5])[5]
    assert final_error(problem, plan).log().mean() < final_error(problem, ordinary).log().mean()


@pytest.mark.slow
def test_one_search_serves_every_budget(problem):
    strategy = OSSFit("analytic", None, True, "mean", 2, RIDGE)
    together = strategy.plan(problem, [2, 5])
    for k in (2, 5):
        alone = strategy.plan(problem, [k])[k]
        assert torch.equal(together[k].times, alone.times)
        torch.testing.assert_close(
            together[k].steps.weights, alone.steps.weights, rtol=1e-8, atol=1e-8
        )


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [1, 7])
@pytest.mark.parametrize("kind", ["problem", "guided"])
def test_micro_batches_change_nothing(kind, micro_batch, request):
    problem = request.getfixturevalue(kind)
    part = replace(problem, velocity=replace(problem.velocity, micro_batch=micro_batch))
    strategy = OSSFit("analytic", None, False, "mean", 2, RIDGE)
    whole = strategy.plan(problem, [4])[4]
    parts = strategy.plan(part, [4])[4]
    assert torch.equal(whole.times, parts.times)
    torch.testing.assert_close(whole.steps.weights, parts.steps.weights, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("start", STARTS)
def test_fitting_costs_no_network_call(problem, velocity, start):
    counter = RowCounter(velocity.fn)
    counted = replace(problem, velocity=BoundVelocity(counter, None, 1000))
    counted.teacher.run()
    counter.rows = 0

    strategy = OSSFit(start, None, False, "mean", 3, RIDGE)
    strategy.plan(counted, [3, 5])

    announced = strategy.network_calls(N, [3, 5]) - 2 * (start == "pinned")
    assert counter.rows == announced * 16


def test_a_selection_of_the_state_is_fitted_to_what_it_selects(mixture, gmm):
    """The inner products are those of the features, here the first two rows of the images."""

    def velocity(x, t):
        return mixture.velocity(None)(x.flatten(1), t).unflatten(1, (8, 8))

    grid = FlowSchedule(shift=2.0).nodes(8)
    images = gmm["z"].unflatten(1, (8, 8))
    problem = Problem(velocity, images, grid, Euler(), Select(XtMSE(), None, channels=2))

    path = search(problem, [3], "analytic", Shared("mean"), Fit(2, RIDGE))[3]
    replayed = final_error(problem, schedule(problem, path, "analytic"))

    torch.testing.assert_close(replayed, path.costs[-1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("start", mostly_slow(STARTS, "analytic"))
@pytest.mark.parametrize("kind", ["problem", "guided"])
def test_single_precision_is_enough_at_the_default_ridge(kind, start, request):
    """The search sums in double precision what the network gives in single precision."""
    problem = request.getfixturevalue(kind)
    single = replace(problem, noise=problem.noise.float(), velocity=as_float32(problem.velocity))
    nodes = [0 if start == "pinned" else 2, 4, 7, 10, 13]
    errors = []
    for precision in (problem, single):
        path = fit_along(precision, nodes, start, Shared("log_mean"), Fit(None, RIDGE))
        replayed = final_error(precision, schedule(precision, path, start))
        torch.testing.assert_close(replayed, path.costs[-1], rtol=1e-3, atol=0)
        errors.append(float(replayed.log().mean()))

    assert errors[1] == pytest.approx(errors[0], abs=0.05)


@pytest.mark.parametrize("solver", [Euler(), AdamsBashforth(3), Heun("t")], ids=str)
def test_the_teacher_may_use_any_solver(problem, solver):
    """The ordinary step is then Euler's, and any solver samples the schedule alike."""
    other = replace(problem, solver=solver)
    path = search(other, [4], "pinned", Shared("mean"), Fit(2, RIDGE))[4]
    steps = schedule(other, path, "pinned")
    for sampler in (Euler(), solver):
        x0 = sample(sampler, problem.velocity, problem.noise, steps, problem.group)
        cost = other.cost(x0, torch.tensor([N]))
        torch.testing.assert_close(cost, path.costs[-1], rtol=1e-9, atol=0)


def test_a_mean_of_0_is_no_obstacle():
    """Standard normal data has mean 0, so one vector of the basis is 0."""

    def velocity(x, t):
        t = t.to(x)[:, None]
        return (2 * t - 1) / ((1 - t) ** 2 + t**2) * x

    noise = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    problem = Problem(velocity, noise, FlowSchedule(shift=1.0).nodes(10), Euler(), XtMSE())
    plan = OSSFit("pinned", None, False, "mean", 2, RIDGE).plan(problem, [3])[3]

    assert final_error(problem, plan).max() < 1e-6


# --------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "distance", [X0MSE(), XtMSE(norm=1), Select(XtMSE(norm=1), None, None)], ids=str
)
def test_a_distance_that_is_no_least_squares_is_refused(problem, distance):
    strategy = OSSFit("analytic", None, False, "mean", 2, RIDGE)
    with pytest.raises(ValueError, match=r"least squares.*use xt_mse"):
        strategy.plan(replace(problem, distance=distance), [3])


@pytest.mark.parametrize(
    ("history", "ridge", "message"),
    [
        (0, RIDGE, "history must be at least 1"),
        (2, 0, "ridge must be above 0.*, got"),
        (2, -1.0, "ridge must be above 0.*, got"),
        (2, float("nan"), "ridge must be above 0.*, got"),
    ],
)
def test_wrong_options_are_refused(history, ridge, message):
    with pytest.raises(ValueError, match=message):
        OSSFit("analytic", None, False, "mean", history, ridge)
