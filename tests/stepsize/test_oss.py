"""Invariants of the search: replay equals table, K = N costs nothing, and no shortcut changes an answer."""

import itertools
from dataclasses import replace

import pytest
import torch

from oss_exp.distances import MSE
from oss_exp.noise import EDMSchedule, FlowSchedule
from oss_exp.solvers import BoundVelocity, Euler, Heun, sample
from oss_exp.solvers.base import LinearMultistep
from oss_exp.steps import StepSchedule
from oss_exp.stepsize import OSS, Band, ClosedForm, OSSAve, OSSShared, Problem
from oss_exp.stepsize.oss import layers, strictly_monotone
from oss_exp.stepsize.recursion import PerSample, Shared, _by_advancing, recurse
from oss_exp.stepsize.refine import refine

STARTS = ("free", "pinned", "analytic")
N = 24


@pytest.fixture(scope="module")
def problem(velocity, gmm) -> Problem:
    return Problem(velocity, gmm["z"], FlowSchedule(shift=2.0).nodes(N), Euler(), MSE())


@pytest.fixture(scope="module")
def heun(velocity, gmm) -> Problem:
    return Problem(velocity, gmm["z"], FlowSchedule(shift=2.0).nodes(N), Heun(), MSE())


def final_error(problem: Problem, steps: StepSchedule) -> torch.Tensor:
    group = problem.group if steps.mean is not None else None
    x0 = sample(problem.solver, problem.velocity, problem.noise, steps, group)
    return problem.distance(x0, problem.teacher.states[-1])


def schedule(problem: Problem, path: torch.Tensor, start: str) -> StepSchedule:
    nodes = torch.nn.functional.pad(path.T, (0, 1), value=problem.num_nodes)
    shared = nodes.shape[0] == 1
    return StepSchedule(
        problem.grid[nodes[0] if shared else nodes],
        start,
        float(problem.grid[0]),
        mean=problem.mean if start == "analytic" else None,
        samples=None if shared else tuple(range(len(nodes))),
    )


@pytest.mark.parametrize(
    "objective", [PerSample(), Shared("mean"), Shared("log_mean")], ids=["own", "mean", "log_mean"]
)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["problem", "heun"])
def test_replay_equals_table_for_every_k(kind, start, objective, request):
    problem = request.getfixturevalue(kind)
    budgets = list(range(1, 9))
    solution = recurse(problem, layers(N, budgets, start, 1, "cpu"), budgets, start, objective)
    for k in budgets:
        assert len(solution.paths[k]) == k
        replayed = final_error(problem, schedule(problem, solution.paths[k], start))
        torch.testing.assert_close(replayed, solution.costs[k], rtol=1e-10, atol=0)


@pytest.mark.parametrize("start", STARTS)
def test_every_node_of_the_table_replays(problem, start):
    """Not only the data end: following the parents from any node of any round gives that node's cost."""
    rounds = recurse(problem, layers(N, [6], start, 1, "cpu"), [6], start, Shared("mean")).rounds
    for r, last in enumerate(rounds[:-1], start=1):
        for j, node in enumerate(last.targets[:, 0].tolist()):
            if last.cost[j, 0].isinf():
                continue
            position, path = j, [node]
            for step in reversed(rounds[:r]):
                position = int(step.parent[position, 0])
                path.insert(0, int(step.sources[position, 0]))
            solver, times = problem.solver, problem.grid[torch.tensor(path)]
            first = problem.noise
            if start == "analytic":
                first = times[0] * first + (1 - times[0]) * problem.mean[0].double()
            state = solver.init(first, times[0])
            for t in times[1:]:
                state = solver.advance(problem.velocity, solver.observe(problem.velocity, state), t)
            replayed = problem.distance(state.x, problem.teacher.states[node])
            torch.testing.assert_close(replayed, last.cost[j], rtol=1e-9, atol=1e-20)


@pytest.mark.parametrize("kind", ["problem", "heun"])
def test_as_many_steps_as_the_teacher_cost_nothing(kind, request):
    problem = request.getfixturevalue(kind)
    for strategy in (OSS("pinned", None, False, 4), OSSShared("pinned", None, True, "mean")):
        plan = strategy.plan(problem, [N])[N]
        assert (plan.times == problem.grid).all()
        assert final_error(problem, plan).max() == 0


def test_inner_products_score_as_candidates_do(problem, monkeypatch):
    """The fast path for linear solvers chooses what taking every edge would."""
    for start, objective in itertools.product(STARTS, (PerSample(), Shared("log_mean"))):
        grid_layers = layers(N, [3, 6], start, 1, "cpu")
        fast = recurse(problem, grid_layers, [3, 6], start, objective)
        with monkeypatch.context() as patch:
            patch.setattr("oss_exp.stepsize.recursion._from_inner_products", _by_advancing)
            slow = recurse(problem, grid_layers, [3, 6], start, objective)
        for k in (3, 6):
            assert fast.paths[k].tolist() == slow.paths[k].tolist()


def test_one_search_serves_every_budget(problem):
    for strategy in (OSS("free", None, False, 5), OSSShared("analytic", None, True, "log_mean")):
        together = strategy.plan(problem, [2, 4, 7])
        for k in (2, 4, 7):
            assert together[k].times.equal(strategy.plan(problem, [k])[k].times)


@pytest.mark.parametrize("micro_batch", [1, 7, 1000])
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_no_split_of_the_work_changes_a_schedule(problem, velocity, chunk, micro_batch):
    part = replace(problem, velocity=replace(velocity, micro_batch=micro_batch))
    for make in (
        lambda size: OSS("analytic", None, False, size),
        lambda size: OSSAve("free", None, True, "median", size),
        lambda size: OSS("free", Band(3, 2), True, size),
    ):
        assert make(chunk).plan(part, [5])[5].times.equal(make(16).plan(problem, [5])[5].times)


def test_a_plain_callable_is_enough(problem):
    def velocity(x, t):
        return problem.velocity(x, t)

    plain = replace(problem, velocity=velocity)
    for strategy in (OSS("free", Band(3, 2), True, 4), OSSAve("free", None, False, "mean", 4)):
        assert strategy.plan(plain, [4])[4].times.equal(strategy.plan(problem, [4])[4].times)


@pytest.mark.parametrize("start", STARTS)
def test_a_band_as_wide_as_the_grid_is_the_full_search(problem, start):
    for make in (lambda band: OSS(start, band, False, 16), lambda band: OSSShared(start, band, False, "mean")):
        assert make(Band(2, N)).plan(problem, [5])[5].times.equal(make(None).plan(problem, [5])[5].times)


def test_a_band_follows_its_path(velocity, gmm):
    """A narrow band laid around a bad pilot is moved until the path no longer touches its edge, or it runs out."""
    problem = Problem(velocity, gmm["z"], FlowSchedule(shift=1.0).nodes(60), Euler(), MSE())
    full = OSSShared("analytic", None, False, "mean").plan(problem, [4])[4]
    band = OSSShared("analytic", Band(6, 3), False, "mean").plan(problem, [4])[4]
    assert final_error(problem, band).mean() <= 1.02 * final_error(problem, full).mean()


def test_refine_never_loses_on_the_search_set(problem):
    for start, objective in itertools.product(STARTS, (PerSample(), Shared("mean"), Shared("log_mean"))):
        path = recurse(problem, layers(N, [4], start, 1, "cpu"), [4], start, objective).paths[4]
        before = objective(final_error(problem, schedule(problem, path, start)), problem.collective)
        after_path = refine(problem, path, start, objective)
        after = objective(final_error(problem, schedule(problem, after_path, start)), problem.collective)
        assert (after <= before).all()
        assert (after_path.diff(dim=0) > 0).all()


def test_free_start_uses_the_noise_anywhere_pinned_only_at_its_node(problem):
    free = OSS("free", None, False, 16).plan(problem, [4])[4]
    pinned = OSS("pinned", None, False, 16).plan(problem, [4])[4]
    assert (free.times[:, 0] < problem.grid[0]).any()
    assert (pinned.times[:, 0] == problem.grid[0]).all()


def test_mean_is_per_condition(mixture, gmm):
    """At pure noise the network answers the mean of the class; a class that no sample has gets the overall mean."""
    labels = torch.tensor([0, 1, 2, 3] * 4)
    velocity = mixture.velocity(labels, 1.0)
    grid = FlowSchedule(shift=1.0).nodes(5)
    problem = Problem(velocity, gmm["z"], grid, Euler(), MSE(), group=labels, num_groups=10)
    expected = gmm["means"][:4]
    torch.testing.assert_close(problem.mean[:4].double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(problem.mean[7].double(), expected.mean(0), rtol=0, atol=1e-6)


def test_exact_number_of_network_calls(problem, velocity):
    """Without a band and refinement a search makes the calls it announces, and the teacher's first call is reused."""
    rows = [0]

    def fn(x, t, condition):
        rows[0] += len(x)
        return velocity.fn(x, t, condition)

    for start, strategy in itertools.product(STARTS, (OSS, OSSShared)):
        counted = replace(problem, velocity=BoundVelocity(fn, None, 1000))
        counted.teacher  # noqa: B018
        rows[0] = 0
        last = {"chunk": 4} if strategy is OSS else {"objective": "mean"}
        search = strategy(start=start, band=None, refine=False, **last)
        search.plan(counted, [3, 5])
        assert rows[0] == search.network_calls(N, [3, 5]) * 16


def test_a_nan_network_is_refused(problem):
    broken = replace(problem, velocity=lambda x, t: x * torch.where(t < 0.5, torch.nan, 1.0)[:, None])
    with pytest.raises(ValueError, match=r"NaN or infinite from node \d+"):
        OSSShared("pinned", None, False, "mean").plan(broken, [3])


def test_closed_forms_begin_with_the_teacher(problem):
    plan = ClosedForm(EDMSchedule(0.002, 80.0, 7.0), "pinned").plan(problem, [1, 4])
    assert plan[1].times.tolist() == [1.0, 0.0]
    nodes = EDMSchedule(0.002, 80.0, 7.0).nodes(4)
    assert plan[4].times[1:].equal(nodes[1:])
    assert float(plan[4].times[0]) == 1.0
    analytic = ClosedForm(EDMSchedule(0.002, 80.0, 7.0), "analytic").plan(problem, [4])[4]
    assert analytic.times.equal(EDMSchedule(0.002, 80.0, 7.0).nodes(5)[1:])


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [([3, 3, 3], [3, 4, 5]), ([0, 5, 9, 9], [0, 5, 8, 9]), ([9, 9, 9], [7, 8, 9]), ([1, 4, 8], [1, 4, 8])],
)
def test_strictly_monotone(nodes, expected):
    assert strictly_monotone(torch.tensor(nodes), 10).tolist() == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OSS("early", None, False, 4), "start must be one of free, pinned, analytic"),
        (lambda: OSSAve("free", None, False, "mode", 4), "aggregate must be median or mean"),
        (lambda: OSSShared("free", None, False, "max"), "objective must be mean or log_mean"),
        (lambda: Band(1, 4), "stride >= 2"),
        (lambda: ClosedForm(FlowSchedule(1.0), "free"), "pinned or analytic"),
    ],
)
def test_wrong_options(problem, make, message):
    with pytest.raises(ValueError, match=message):
        make().plan(problem, [3])


@pytest.mark.parametrize("budgets", [[0], [], [N + 1], [2.5], [-3]])
def test_wrong_budgets(problem, budgets):
    for strategy in (OSS("free", None, False, 4), ClosedForm(FlowSchedule(1.0), "pinned")):
        with pytest.raises(ValueError, match=f"whole numbers from 1 to {N}"):
            strategy.plan(problem, budgets)


def test_a_band_too_coarse_for_the_budget(problem):
    with pytest.raises(ValueError, match="too few for 10 steps"):
        OSSShared("free", Band(8, 8), False, "mean").plan(problem, [10])


def test_multistep_solvers_are_linear():
    assert isinstance(Euler(), LinearMultistep)
    assert not isinstance(Heun(), LinearMultistep)
