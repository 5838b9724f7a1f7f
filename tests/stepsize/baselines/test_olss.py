"""OLSS against the paper's procedure written down once more, and a student run from its coefficients by hand."""

import numpy as np
import pytest
import torch

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
    """States (N+1, F) and velocities (N, F) of all samples."""
    states = problem.teacher.states
    velocities = [
        problem.velocity(x, t.expand(len(x)))
        for x, t in zip(states[:-1], problem.grid[:-1], strict=True)
    ]
    return states.flatten(1).numpy(), torch.stack(velocities).flatten(1).numpy()


def least_squares(teacher, path, node):
    states, velocities = teacher
    basis = np.stack([states[0], *velocities[path]], axis=1)
    weights = np.linalg.lstsq(basis, states[node], rcond=None)[0]
    return weights, np.mean((basis @ weights - states[node]) ** 2)


def greedy(teacher, bound):
    """The farthest node within the bound, by bisection, again and again."""
    path = [0]
    while True:
        low = path[-1] + 1
        high = N
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (low, middle - 1)
                if least_squares(teacher, path, middle)[1] > bound
                else (middle, high)
            )
        if low == N:
            return path
        path.append(low)


def expected_path(teacher, num_steps):
    """At a bound where the greedy path gets short enough: its length is not quite monotone, so the bracket matters."""
    low = 0.0
    high = max(least_squares(teacher, [0], node)[1] for node in range(1, N + 1))
    for _ in range(60):
        bound = (low + high) / 2
        low, high = (bound, high) if len(greedy(teacher, bound)) > num_steps else (low, bound)
    return greedy(teacher, high)


def run_by_hand(problem, nodes, coefficients):
    """x = w_z z + sum_j w_j v_j, with the velocities that the student itself meets."""
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
    """The two answers of a guided call get the shares that make the guided velocity."""
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


def test_network_calls(problem, velocity):
    rows = [0]

    def counted(x, t):
        rows[0] += len(x)
        return velocity(x, t)

    asked = Problem(counted, problem.noise, problem.grid, problem.solver)
    asked.teacher.run()
    rows[0] = 0
    OLSS().plan(asked, BUDGETS)

    assert rows[0] == 12 * OLSS().network_calls(N, BUDGETS)
