"""With required times the search finds the best of the schedules that have them."""

import itertools
import re

import pytest
import torch
from replay import final_error

import oss_exp
from oss_exp import OSS, Band, Euler, FlowSchedule, OSSAve, OSSFit, OSSShared, Problem, StepSchedule
from oss_exp.distances import XtMSE
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.velocity import standard_normal_velocity

N = 10
GRID = FlowSchedule(shift=2.0).nodes(N)


@pytest.fixture(scope="module")
def problem(velocity, gmm) -> Problem:
    return Problem(velocity, gmm["z"], GRID, Euler(), XtMSE())


@pytest.fixture(scope="module")
def fine(velocity, gmm) -> Problem:
    return Problem(
        velocity, gmm["z"][:4], FlowSchedule(shift=2.0).nodes(28), DPMSolverPP(), XtMSE()
    )


def error(problem: Problem, nodes: list[int]) -> float:
    """Return the mean error of the schedule through these nodes."""
    return float(final_error(problem, StepSchedule(problem.grid[[*nodes, N]])).mean())


def times(*nodes: int) -> list[float]:
    """Return the times of these nodes."""
    return [float(GRID[node]) for node in nodes]


def indices(steps: StepSchedule) -> list[int]:
    """Return the nodes of a schedule."""
    return [int((time - GRID).abs().argmin()) for time in steps.times[:-1]]


@pytest.mark.parametrize("num_steps", [2, 3, 4])
@pytest.mark.parametrize("node", range(1, N))
def test_the_best_schedule_that_visits_a_node(problem, node, num_steps):
    """Equals brute force over all pinned schedules that contain the node."""
    others = [other for other in range(1, N) if other != node]
    best = min(
        error(problem, sorted([0, node, *inner]))
        for inner in itertools.combinations(others, num_steps - 2)
    )

    for refine in (False, True):
        strategy = OSSShared("pinned", None, refine, "mean", must_visit=times(node))
        steps = strategy.plan(problem, [num_steps])[num_steps]
        assert node in indices(steps)
        assert error(problem, indices(steps)) == pytest.approx(best, rel=1e-10)


@pytest.mark.parametrize("head", [(0, 1), (0, 3), (0, 2, 5)])
def test_the_best_schedule_that_begins_with_given_nodes(problem, head):
    for count in (1, 2):
        best = min(
            error(problem, [*head, *inner])
            for inner in itertools.combinations(range(head[-1] + 1, N), count)
        )
        k = len(head) + count
        strategy = OSSShared("pinned", None, False, "mean", first_sigmas=times(*head))
        steps = strategy.plan(problem, [k])[k]

        assert indices(steps)[: len(head)] == [*head]
        assert error(problem, indices(steps)) == pytest.approx(best, rel=1e-10)


@pytest.mark.parametrize("start", ["free", "pinned", "analytic"])
@pytest.mark.parametrize("band", [None, Band(4, 1, 1)])
@pytest.mark.parametrize("make", [OSS, OSSShared, OSSFit])
def test_every_search_visits_the_required_nodes(fine, make, band, start):
    """Two nodes, not on the band's coarse grid, after two first ones."""
    head = [float(fine.grid[i]) for i in (0, 3)]
    visited = [float(fine.grid[i]) for i in (13, 14)]
    refine = make is not OSSFit  # for time
    strategy = make(start, band, refine, must_visit=visited, first_sigmas=head)

    for k, steps in strategy.plan(fine, [5, 6]).items():
        rows = steps.times if steps.times.ndim == 2 else steps.times[None]
        for row in rows:
            assert len(row) == k + 1
            assert row[:2].tolist() == head
            assert set(visited) <= set(row.tolist())


def test_required_times_become_nodes_of_the_teacher(gmm):
    noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    required = {"must_visit": [0.874], "first_sigmas": [1.0, 0.9373]}
    steps = oss_exp.search(
        standard_normal_velocity, noise, 4, num_teacher_steps=20, solver=Euler(),
        strategy=OSSShared("pinned"), **required,
    )  # fmt: skip

    assert steps.times[:2].tolist() == required["first_sigmas"]
    assert 0.874 in steps.times.tolist()
    assert steps.about("teacher")["num_steps"] == 22
    assert steps.about("strategy")["must_visit"] == [0.874]


@pytest.mark.parametrize(
    ("required", "message"),
    [
        (
            {"must_visit": times(2, 3, 4)},
            "with the start, are 4 nodes of the 3 at which a schedule of 3 steps calls",
        ),
        ({"first_sigmas": times(0, 1, 2, 3)}, "are 4 nodes of the 3"),
        (
            {"first_sigmas": times(0, 9)},
            "search more steps, or ask for fewer nodes",
        ),  # nothing is behind
        ({"first_sigmas": times(1, 2)}, "a pinned start is; begin with it"),
        ({"first_sigmas": times(0, 2, 1)}, "need nodes of their own"),
        (
            {"must_visit": times(1), "first_sigmas": times(0, 2)},
            "the first ones first and above all others",
        ),
    ],
)
def test_nodes_that_no_schedule_can_visit_are_refused(problem, required, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OSSShared("pinned", **required).plan(problem, [3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: OSSShared(must_visit=[0.0]),
            "must_visit must be above 0 and at most 1, got 0",
        ),
        (
            lambda: OSSShared(must_visit=0.5),
            r"must_visit must be a list of times, such as \[0.5\]",
        ),
        (
            lambda: OSSAve(must_visit=[0.5]),
            "may agree on none of must_visit; use oss_shared",
        ),
    ],
)
def test_values_that_are_no_required_times_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"strategy": oss_exp.ClosedForm(), "must_visit": [0.5]},
            "must_visit and first_sigmas are of searches such as OSSBest",
        ),
        (
            {"teacher": oss_exp.EDMSchedule(0.1, 9.0), "must_visit": [0.95]},
            r"a search must visit t = 0.95, and its teacher goes from 0\.9",
        ),
    ],
)
def test_strategies_and_teachers_that_cannot_visit_a_time_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        oss_exp.search(standard_normal_velocity, torch.randn(2, 2), 2, **options)
