"""The search has exact costs, costs nothing at K = N, and no shortcut changes its result."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import mostly_slow
from replay import RowCounter, assert_tables_replay, final_error, schedule

from oss_exp.distances import XtMSE
from oss_exp.noise import EDMSchedule, FlowSchedule
from oss_exp.schedule import FittedSteps
from oss_exp.solvers import Euler, LinearMultistep, Solver, walk
from oss_exp.solvers.adams_bashforth import AdamsBashforth
from oss_exp.solvers.heun import Heun
from oss_exp.solvers.sampling import stepper
from oss_exp.stepsize import OSS, Band, ClosedForm, OSSAve, OSSFit, OSSShared, Problem
from oss_exp.stepsize.oss.band import layers, stretch, strictly_monotone
from oss_exp.stepsize.oss.objectives import PerSample, Shared
from oss_exp.stepsize.oss.recursion import recurse
from oss_exp.stepsize.oss.refine import refine
from oss_exp.velocity import BoundVelocity

STARTS = ("free", "pinned", "analytic")
N = 24


@pytest.fixture(scope="module")
def problem(velocity, gmm) -> Problem:
    return Problem(velocity, gmm["z"], FlowSchedule(shift=2.0).nodes(N), Euler(), XtMSE())


@pytest.fixture(scope="module")
def heun(velocity, gmm) -> Problem:
    return Problem(velocity, gmm["z"], FlowSchedule(shift=2.0).nodes(N), Heun("t"), XtMSE())


@pytest.fixture(scope="module", params=[2, 3], ids=["order2", "order3"])
def adams(velocity, gmm, request) -> Problem:
    """A problem whose solver has memory: a node's history is that of its best path."""
    return Problem(
        velocity, gmm["z"], FlowSchedule(shift=2.0).nodes(N), AdamsBashforth(request.param), XtMSE()
    )


@pytest.mark.parametrize(
    "objective", [PerSample(), Shared("mean"), Shared("log_mean")], ids=["own", "mean", "log_mean"]
)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", mostly_slow(["problem", "heun"], "problem"))
def test_replay_equals_table_for_every_k(kind, start, objective, request):
    problem = request.getfixturevalue(kind)
    budgets = list(range(1, 9))
    solution = recurse(problem, layers(N, budgets, start, 1, "cpu"), budgets, start, objective)
    for k in budgets:
        assert len(solution.paths[k].nodes) == k
        replayed = final_error(problem, schedule(problem, solution.paths[k], start))
        torch.testing.assert_close(replayed, solution.costs[k], rtol=1e-10, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_every_node_of_the_table_replays(problem, start):
    """Following the parents from any node of any round gives that node's cost."""
    for objective in (PerSample(), Shared("mean")):
        stages = recurse(problem, layers(N, [6], start, 1, "cpu"), [6], start, objective).stages
        assert_tables_replay(problem, stages, start)


@pytest.mark.parametrize("objective", [PerSample(), Shared("mean")], ids=["own", "mean"])
@pytest.mark.parametrize("start", mostly_slow(STARTS, "free"))
def test_replay_equals_table_with_a_solver_that_remembers(adams, start, objective):
    budgets = list(range(1, 9))
    solution = recurse(adams, layers(N, budgets, start, 1, "cpu"), budgets, start, objective)
    for k in budgets:
        replayed = final_error(adams, schedule(adams, solution.paths[k], start))
        torch.testing.assert_close(replayed, solution.costs[k], rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "strategy",
    [
        OSSShared("pinned", None, False, "mean"),
        OSSShared("analytic", None, True, "mean"),
        OSSAve("free", Band(4, 2), False, "median", 5),
        OSSFit("pinned", None, False, "mean", history=2, ridge=1e-7),
        OSS("free", None, False, 5),
    ],
)
def test_a_schedule_says_what_the_rounds_cost(strategy, problem):
    """The costs of a path that was not changed are those of sampling it, step by step."""
    steps = strategy.plan(problem, [3, 6])[6]
    costs = steps.about("planning")["cost_per_round"]
    assert len(costs) == 6
    assert all(cost >= 0 for cost in costs)
    if isinstance(strategy, OSSAve) or strategy.refine:
        return

    # The path, step by step.
    times = steps.times if steps.samples is None else steps.times.T
    solver = problem.solver
    if isinstance(steps.steps, FittedSteps):
        solver = stepper(problem.solver, steps, problem.noise, problem.group)[0]
    _, *states = walk(solver, problem.velocity, problem.noise, times)
    expected = []
    for state in states:
        nodes = torch.stack([(problem.grid == t).nonzero()[0, 0] for t in state.t])
        expected.append(problem.cost(state.x, nodes).mean().item())

    assert costs == pytest.approx(expected, rel=1e-3)


def test_nodes_searched_with_the_samplers_solver_beat_those_of_euler(adams):
    strategy = OSSShared("pinned", None, True, "mean")
    searched = strategy.plan(adams, [6])[6]
    euler = strategy.plan(replace(adams, solver=Euler()), [6])[6]
    assert final_error(adams, searched).mean() < final_error(adams, euler).mean()


@pytest.mark.parametrize("kind", ["problem", "heun"])
def test_as_many_steps_as_the_teacher_cost_nothing(kind, request):
    problem = request.getfixturevalue(kind)
    for strategy in (OSS("pinned", None, False, 4), OSSShared("pinned", None, True, "mean")):
        plan = strategy.plan(problem, [N])[N]
        assert (plan.times == problem.grid).all()
        assert final_error(problem, plan).max() == 0


@dataclass(frozen=True)
class EulerByHand(Solver):
    """Euler, but no LinearMultistep: the search must take every step."""

    order = 1
    evals_per_step = 1

    def observe(self, f, state):
        return replace(state, outputs=(f(state.x, state.t),), times=(state.t,))

    def advance(self, f, state, t_next, order=None):
        step = (t_next - state.t).to(state.x.dtype)[:, None]
        return replace(state, x=state.x + step * state.outputs[0], t=t_next.expand_as(state.t))


@pytest.mark.slow
@pytest.mark.parametrize("objective", [PerSample(), Shared("log_mean")], ids=["own", "log_mean"])
@pytest.mark.parametrize("start", STARTS)
def test_inner_products_score_as_candidates_do(problem, start, objective):
    by_hand = replace(problem, solver=EulerByHand())
    grid_layers = layers(N, [3, 6], start, 1, "cpu")

    fast = recurse(problem, grid_layers, [3, 6], start, objective)
    slow = recurse(by_hand, grid_layers, [3, 6], start, objective)

    for quick, careful in zip(fast.stages, slow.stages, strict=True):
        alive = careful.cost.isfinite()
        parents = quick.parent.expand_as(alive)[alive]
        assert torch.equal(parents, careful.parent.expand_as(alive)[alive])
        torch.testing.assert_close(quick.cost, careful.cost, rtol=1e-9, atol=1e-14)


@pytest.mark.slow
def test_one_search_serves_every_budget(problem):
    for strategy in (OSS("free", None, False, 5), OSSShared("analytic", None, True, "log_mean")):
        together = strategy.plan(problem, [2, 4, 7])
        for k in (2, 4, 7):
            assert together[k].times.equal(strategy.plan(problem, [k])[k].times)


@pytest.fixture(scope="module", params=[Euler(), AdamsBashforth(2)], ids=["euler", "adams"])
def small(velocity, gmm, request):
    """A small problem and what three strategies plan for it without splitting the work."""
    problem = Problem(
        velocity, gmm["z"][:5], FlowSchedule(shift=2.0).nodes(10), request.param, XtMSE()
    )
    strategies = [
        OSS("analytic", None, False, 16),
        OSSAve("free", None, True, "median", 16),
        OSS("free", Band(4, 2, 1), True, 16),
    ]
    return problem, [(strategy, strategy.plan(problem, [4])[4]) for strategy in strategies]


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("chunk", mostly_slow([1, 3, 16], 3))
def test_no_split_of_the_work_changes_a_schedule(small, velocity, chunk, micro_batch):
    problem, plans = small
    part = replace(problem, velocity=replace(velocity, micro_batch=micro_batch))
    for strategy, whole in plans:
        result = replace(strategy, chunk=chunk).plan(part, [4])[4]
        assert result.times.equal(whole.times)
        assert (result.orders is None and whole.orders is None) or result.orders.equal(whole.orders)


def test_a_plain_callable_is_enough(problem):
    def velocity(x, t):
        return problem.velocity(x, t)

    plain = replace(problem, velocity=velocity)
    for strategy in (OSS("free", Band(4, 2, 1), True, 4), OSSAve("free", None, False, "mean", 4)):
        assert strategy.plan(plain, [4])[4].times.equal(strategy.plan(problem, [4])[4].times)


@pytest.mark.parametrize("start", mostly_slow(STARTS, "analytic"))
def test_a_band_as_wide_as_the_grid_is_the_full_search(problem, start):
    for strategy in (OSS(start, None, False, 16), OSSShared(start, None, False, "mean")):
        full = strategy.plan(problem, [3, 5])
        band = replace(strategy, band=Band(4, N)).plan(problem, [3, 5])
        for k in (3, 5):
            assert band[k].times.equal(full[k].times)


def test_a_narrow_band_is_nearly_as_good_for_a_quarter_of_the_calls(velocity, gmm):
    problem = Problem(velocity, gmm["z"], FlowSchedule(shift=1.0).nodes(60), Euler(), XtMSE())
    full = OSSShared("analytic", None, False, "mean")
    band = OSSShared("analytic", Band(8, 1), False, "mean")
    errors = [
        final_error(problem, strategy.plan(problem, [6])[6]).mean() for strategy in (full, band)
    ]

    assert errors[1] <= 1.05 * errors[0]
    assert band.network_calls(60, [6]) <= 0.25 * full.network_calls(60, [6])


@pytest.mark.slow
@pytest.mark.parametrize("start", mostly_slow(STARTS, "free"))
def test_a_band_serves_every_budget_of_a_small_grid(problem, start):
    budgets = list(range(1, N + 1))
    strategy = OSSShared(start, Band(8, 1), False, "mean")
    for k, path in strategy.paths(problem, budgets, Shared("mean")).items():
        assert len(path.nodes) == k
        assert (path.nodes.diff(dim=0) > 0).all()
        assert 0 <= int(path.nodes.min()) <= int(path.nodes.max()) < N


def test_a_band_moves_when_its_path_touches_the_edge(velocity, gmm):
    """From a path far off, a band of width 1 gets nearer with every shift it is allowed."""
    problem = Problem(velocity, gmm["z"], FlowSchedule(shift=1.0).nodes(60), Euler(), XtMSE())
    far = torch.tensor([1, 2, 3, 4])[:, None]
    best = OSSShared("analytic", None, False, "mean").paths(problem, [4], Shared("mean"))[4]
    distances = []
    for shifts in (0, 2, 30):
        search = OSSShared("analytic", Band(8, 1, shifts), False, "mean")
        moved = search._in_band(problem, far, 1, Shared("mean"), shifts)
        distances.append(int((moved.nodes - best.nodes).abs().sum()))

    assert distances[0] > distances[1] > distances[2]


@pytest.mark.parametrize("path", [[0, 10, 25], [4, 12, 30]])
def test_stretch_keeps_the_curve(path):
    column = torch.tensor(path)[:, None]
    assert stretch(column, 3, 40).equal(column)
    assert stretch(column, 6, 40)[::2].equal(column)
    assert (stretch(column, 35, 40).diff(dim=0) > 0).all()


@pytest.mark.slow
def test_refine_never_loses_on_the_search_set(problem):
    objectives = (PerSample(), Shared("mean"), Shared("log_mean"))
    for start, objective in itertools.product(STARTS, objectives):
        path = recurse(problem, layers(N, [4], start, 1, "cpu"), [4], start, objective).paths[4]
        refined = refine(problem, path, start, objective)

        before = final_error(problem, schedule(problem, path, start))
        after = final_error(problem, schedule(problem, refined, start))
        gain = objective(before, problem.collective) - objective(after, problem.collective)
        assert (gain >= 0).all()
        assert (refined.nodes.diff(dim=0) > 0).all()


def test_free_start_uses_the_noise_anywhere_pinned_only_at_its_node(problem):
    free = OSS("free", None, False, 16).plan(problem, [4])[4]
    pinned = OSS("pinned", None, False, 16).plan(problem, [4])[4]
    assert (free.times[:, 0] < problem.grid[0]).any()
    assert (pinned.times[:, 0] == problem.grid[0]).all()


def test_mean_is_per_condition(mixture, gmm):
    """A class without samples gets the overall mean."""
    labels = torch.tensor([0, 1, 2, 3] * 4)
    velocity = mixture.velocity(labels)
    grid = FlowSchedule(shift=1.0).nodes(5)
    problem = Problem(velocity, gmm["z"], grid, Euler(), XtMSE(), group=labels, num_groups=10)
    expected = gmm["means"][:4]

    torch.testing.assert_close(problem.teacher.mean[:4].double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        problem.teacher.mean[7].double(), expected.mean(0), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    "strategy",
    [OSS(band=None, refine=False, chunk=4), OSSShared(band=None, refine=False, objective="mean")],
)
@pytest.mark.parametrize("start", STARTS)
def test_a_search_makes_the_calls_that_it_announces(problem, velocity, start, strategy):
    """Exactly so without a band and refinement; the teacher's first call is used again."""
    counter = RowCounter(velocity.fn)
    counted = replace(problem, velocity=BoundVelocity(counter, None, 1000))
    counted.teacher.run()
    counter.rows = 0

    search = replace(strategy, start=start)
    search.plan(counted, [3, 5])

    assert counter.rows == search.network_calls(N, [3, 5]) * 16


def test_a_nan_network_is_refused(problem):

    def velocity(x, t):
        return x * torch.where(t < 0.5, torch.nan, 1.0)[:, None]

    broken = replace(problem, velocity=velocity)
    with pytest.raises(ValueError, match=r"NaN or infinite from node \d+"):
        OSSShared("pinned", None, False, "mean").plan(broken, [3])


def test_closed_forms_begin_with_the_teacher(problem):
    edm = EDMSchedule(0.002, 80.0, 7.0)
    plan = ClosedForm(edm, "pinned").plan(problem, [1, 4])
    nodes = edm.nodes(4)
    assert plan[1].times.tolist() == [1.0, 0.0]
    assert plan[4].times[1:].equal(nodes[1:])
    assert float(plan[4].times[0]) == 1.0

    analytic = ClosedForm(edm, "analytic").plan(problem, [4])[4]
    assert analytic.times.equal(edm.nodes(5)[1:])


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([3, 3, 3], [3, 4, 5]),
        ([0, 5, 9, 9], [0, 5, 8, 9]),
        ([9, 9, 9], [7, 8, 9]),
        ([1, 4, 8], [1, 4, 8]),
    ],
)
def test_strictly_monotone_moves_equal_nodes_apart(nodes, expected):
    assert strictly_monotone(torch.tensor(nodes), 10).tolist() == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OSS("early", None, False, 4), "start must be one of free, pinned, analytic"),
        (
            lambda: OSSAve("free", None, False, "mode", 4),
            "aggregate must be one of median, mean, got",
        ),
        (
            lambda: OSSShared("free", None, False, "max"),
            "objective must be one of mean, root_mean, log_mean, got",
        ),
        (lambda: Band(6, 4), "power of two"),
        (lambda: Band(8, 0), "width must be at least 1, got 0"),
        (
            lambda: ClosedForm(FlowSchedule(1.0), "free"),
            "start must be one of pinned, analytic, got",
        ),
    ],
)
def test_wrong_options_are_refused(problem, make, message):
    with pytest.raises(ValueError, match=message):
        make().plan(problem, [3])


@pytest.mark.parametrize("budgets", [[0], [], [N + 1], [2.5], [-3]])
def test_wrong_budgets_are_refused(problem, budgets):
    for strategy in (OSS("free", None, False, 4), ClosedForm(FlowSchedule(1.0), "pinned")):
        with pytest.raises(ValueError, match=f"whole numbers from 1 to {N}"):
            strategy.plan(problem, budgets)


def test_a_grid_too_small_for_the_pilot_is_searched_whole(problem):
    plans = [
        OSSShared("free", band, False, "mean").plan(problem, [10])[10]
        for band in (Band(32, 1), None)
    ]
    assert torch.equal(plans[0].times, plans[1].times)


def test_multistep_solvers_are_linear():
    assert isinstance(Euler(), LinearMultistep)
    assert not isinstance(Heun("t"), LinearMultistep)
