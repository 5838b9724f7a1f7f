"""Searches under distances that call networks: exact costs, and calls as announced."""

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from helpers import mostly_slow
from replay import RowCounter, assert_tables_replay, final_error, schedule
from torch import nn

from oss_exp.distances import X0MSE, Distance, Inception, Select, XtMSE
from oss_exp.noise import FlowSchedule
from oss_exp.solvers import Euler
from oss_exp.solvers.adams_bashforth import AdamsBashforth
from oss_exp.solvers.dpm_solver import DPMSolver
from oss_exp.solvers.heun import Heun
from oss_exp.solvers.unipc import UniPC
from oss_exp.stepsize import OSS, Band, OSSAve, OSSShared, Problem
from oss_exp.stepsize.base import edge_calls
from oss_exp.stepsize.oss.band import layers
from oss_exp.stepsize.oss.objectives import PerSample, Shared
from oss_exp.stepsize.oss.recursion import recurse
from oss_exp.stepsize.oss.refine import refine
from oss_exp.velocity import BoundVelocity

STARTS = ("free", "pinned", "analytic")
N = 12


class Projection(nn.Module):
    """A stand-in for the Inception network: fixed random features of 64 pixels."""

    def __init__(self):
        super().__init__()
        weights = torch.randn(
            64, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        self.register_buffer("weights", weights)

    def forward(self, images):
        return torch.tanh(images.flatten(1) @ self.weights)


def distances(mixture) -> dict[str, Distance]:
    inception = Inception(Projection()).bind(mixture)
    return {
        "xt-1": XtMSE(norm=1),
        "x0-2": X0MSE(),
        "x0-1": X0MSE(norm=1),
        "inception": inception,
        "half_inception": Select(inception, None, channels=5),
        "half_x0": Select(X0MSE(), None, channels=30),
    }


@pytest.fixture(scope="module")
def make(mixture, gmm):
    """A function from a distance's name and a solver to a problem with classes."""
    labels = torch.arange(6) % 2
    velocity = mixture.velocity(labels)
    grid = FlowSchedule(shift=2.0).nodes(N)
    noise = gmm["z"][:6]

    def problem(name: str, solver) -> Problem:
        distance = distances(mixture)[name]
        return Problem(velocity, noise, grid, solver, distance, group=labels, num_groups=2)

    return problem


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("name", "solver"),
    mostly_slow(
        [
            *(
                (name, AdamsBashforth(2))
                for name in ("xt-1", "x0-2", "x0-1", "inception", "half_inception", "half_x0")
            ),
            *(("x0-2", solver) for solver in (Euler(), UniPC(2, "bh2", True), Heun("t"))),
        ],
        ("x0-2", AdamsBashforth(2)),
        ("inception", AdamsBashforth(2)),
    ),
    ids=str,
)
def test_replay_equals_table(make, name, solver, start):
    problem = make(name, solver)
    budgets = [2, 4]
    for objective in (PerSample(), Shared("log_mean")):
        solution = recurse(problem, layers(N, budgets, start, 1, "cpu"), budgets, start, objective)
        assert_tables_replay(problem, solution.stages, start)
        for k in budgets:
            replayed = final_error(problem, schedule(problem, solution.paths[k], start))
            torch.testing.assert_close(replayed, solution.costs[k], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", mostly_slow(["xt-1", "x0-2", "inception"], "xt-1"))
def test_refine_never_loses(make, name):
    problem = make(name, AdamsBashforth(2))
    for start, objective in product(STARTS, (PerSample(), Shared("mean"))):
        path = recurse(problem, layers(N, [4], start, 1, "cpu"), [4], start, objective).paths[4]
        refined = refine(problem, path, start, objective)
        before = final_error(problem, schedule(problem, path, start))
        after = final_error(problem, schedule(problem, refined, start))
        gain = objective(before, problem.collective) - objective(after, problem.collective)
        assert bool((gain >= 0).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x0-2", "inception"])
def test_no_split_of_the_work_changes_a_schedule(make, name):
    problem = make(name, AdamsBashforth(2))
    part = replace(problem, velocity=replace(problem.velocity, micro_batch=5))

    for strategy in (
        OSS("free", Band(4, 2, 1), True, 16),
        OSSAve("analytic", None, False, "median", 16),
    ):
        whole = strategy.plan(problem, [4])[4]
        parts = replace(strategy, chunk=4).plan(part, [4])[4]
        assert torch.equal(whole.times, parts.times)
        assert torch.equal(whole.orders, parts.orders)


def test_distances_disagree_about_the_best_schedule(make):
    names = ("xt-1", "x0-2", "inception")
    strategy = OSS("analytic", None, False, 6)
    times = [strategy.plan(make(name, Euler()), [4])[4].times for name in names]
    assert not any(torch.equal(a, b) for a, b in combinations(times, 2))


# --------------------------------------------------------------------------------------------------
# Network calls
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "distance", "calls"),
    [
        (Euler(), XtMSE(), 0),
        (AdamsBashforth(3), XtMSE(norm=1), 0),
        (Euler(), X0MSE(), 1),
        (AdamsBashforth(3), X0MSE(), 3),
        (AdamsBashforth(3), Select(X0MSE(), None, 1), 3),
        (Heun("t"), XtMSE(), 1),
        (DPMSolver(2), XtMSE(), 1),
        (DPMSolver(3), Inception(Projection()), 3),
    ],
    ids=str,
)
def test_an_edge_calls_the_network_for_every_order_or_within_its_step(solver, distance, calls):
    assert edge_calls(solver, distance) == calls


@pytest.mark.parametrize("band", [None, Band(4, 1)], ids=["full", "band"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("name", "solver"),
    mostly_slow(
        [
            ("xt-1", Euler()),
            ("x0-2", Euler()),
            ("x0-2", AdamsBashforth(2)),
            ("xt-1", Heun("t")),
            ("x0-2", DPMSolver(2)),
        ],
        ("x0-2", Euler()),
    ),
    ids=str,
)
def test_the_announced_calls_are_about_those_made(make, velocity, name, solver, start, band):
    counter = RowCounter(velocity.fn)
    problem = replace(
        make(name, solver),
        velocity=BoundVelocity(counter, None, 1000),
        grid=FlowSchedule(shift=2.0).nodes(24),
        group=None,
        num_groups=1,
    )
    problem.teacher.run()
    counter.rows = 0

    strategy = OSSShared(start, band, False, "mean")
    strategy.plan(problem, [3, 5])

    announced = strategy.network_calls(24, [3, 5], edge_calls(solver, problem.distance)) * 6
    # A band's windows are cut off at its ends.
    lowest, highest = (0.85, 1.05) if band is None else (0.5, 1.0)
    assert lowest * announced <= counter.rows <= highest * announced
