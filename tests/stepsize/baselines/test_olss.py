"""OLSS has the path and the samples of the paper's procedure, done by hand."""

import numpy as np
import pytest
import torch
from replay import RowCounter

from oss_exp.models.guidance import Guidance
from oss_exp.noise import FlowSchedule
from oss_exp.solvers import sample
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.stepsize import Problem
from oss_exp.stepsize.baselines.linear_steps import linear_steps
from oss_exp.stepsize.baselines.olss import OLSS

N = 24
BUDGETS = [1, 3, 5, 8, 24]


@pytest.fixture(scope="module")
def problem(mixture) -> Problem:
    noise = torch.randn(12, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Problem(
        mixture.velocity(None),
        noise,
        FlowSchedule(2.0).nodes(N),
        DPMSolverPP(2, lower_order_final=True),
    )


@pytest.fixture(scope="module")
def teacher(problem):
    """The states (N+1, F) and velocities (N, F) of all samples."""
    states = problem.teacher.states
    velocities = [
        problem.velocity(x, t.expand(len(x)))
        for x, t in zip(states[:-1], problem.grid[:-1], strict=True)
    ]
    return states.flatten(1).numpy(), torch.stack(velocities).flatten(1).numpy()


def least_squares(teacher, path, node):
    """Return the weights over the noise and the path's velocities for a node, and their error."""
    states, velocities = teacher
    basis = np.stack([states[0], *velocities[path]], axis=1)
    weights = np.linalg.lstsq(basis, states[node], rcond=None)[0]
    return weights, np.mean((basis @ weights - states[node]) ** 2)


def greedy(teacher, bound):
    """Return the path that always goes to the farthest node within the bound."""
    path = [0]
    while True:
        low = path[-1] + 1
        high = N
        while low < high:
            middle = (low + high + 1) // 2
            if least_squares(teacher, path, middle)[1] > bound:
                high = middle - 1
            else:
                low = middle
        if low == N:
            return path
        path.append(low)


def expected_path(teacher, num_steps):
    """Return the greedy path at the least bound that makes it short enough.

    Its length is not quite monotone in the bound, so the bracket of the bisection matters.
    """
    low = 0.0
    high = max(least_squares(teacher, [0], node)[1] for node in range(1, N + 1))
    for _ in range(60):
        bound = (low + high) / 2
        if len(greedy(teacher, bound)) > num_steps:
            low = bound
        else:
            high = bound
    return greedy(teacher, high)


def run_by_hand(problem, nodes, coefficients):
    """Return x = w_z z + sum_j w_j v_j, with the student's own velocities."""
    x = problem.noise
    velocities = []

    for step, t in enumerate(problem.grid[nodes[:-1]]):
        velocities.append(problem.velocity(x, t.expand(len(x))))
        over_noise, *over_velocities = coefficients[step]
        x = over_noise * problem.noise + sum(
            w * v for w, v in zip(over_velocities, velocities, strict=True)
        )
    return x


def test_path_and_samples_are_those_of_the_paper(problem, teacher):
    plans = OLSS().plan(problem, BUDGETS)
    exact = 0
    for k, steps in plans.items():
        path = expected_path(teacher, k)
        nodes = [int((problem.grid == t).nonzero()) for t in steps.times]
        assert len(nodes) == k + 1
        if len(path) == k:
            exact += 1
            assert nodes == [*path, N]
        coefficients = [
            least_squares(teacher, nodes[: step + 1], nodes[step + 1])[0] for step in range(k)
        ]
        x0 = sample(problem.solver, problem.velocity, problem.noise, steps, problem.group)
        torch.testing.assert_close(x0, run_by_hand(problem, nodes, coefficients), rtol=0, atol=1e-8)

    assert exact >= 3


def test_more_steps_come_nearer_and_one_search_serves_all(problem):
    errors = []
    for k in BUDGETS:
        steps = OLSS().plan(problem, [k])[k]
        assert torch.equal(steps.times, OLSS().plan(problem, BUDGETS)[k].times)
        x0 = sample(problem.solver, problem.velocity, problem.noise, steps, problem.group)
        errors.append(float((x0 - problem.teacher.states[-1]).square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_linear_steps_of_a_guided_network(mixture):
    """The two outputs of a guided call get the shares that make the guided velocity."""
    labels = torch.arange(12) % 3
    noise = torch.randn(12, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    problem = Problem(
        mixture.velocity(labels, Guidance(2.0)),
        noise,
        FlowSchedule().nodes(4),
        group=labels,
        num_groups=3,
    )
    rows = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    over_velocities = rows[:, 1:].tril()
    steps = linear_steps(problem, problem.grid[[0, 1, 3, 4]], rows[:, 0], over_velocities)
    x0 = sample(problem.solver, problem.velocity, noise, steps, labels)
    coefficients = [[float(rows[k, 0]), *over_velocities[k, : k + 1].tolist()] for k in range(3)]

    torch.testing.assert_close(
        x0, run_by_hand(problem, [0, 1, 3, 4], coefficients), rtol=1e-9, atol=1e-9
    )


def test_a_search_makes_the_calls_that_it_announces(problem, velocity):
    counter = RowCounter(velocity)
    counted = Problem(counter, problem.noise, problem.grid, problem.solver)
    counted.teacher.run()
    counter.rows = 0

    OLSS().plan(counted, BUDGETS)

    assert counter.rows == 12 * OLSS().network_calls(N, BUDGETS)
