"""NeuralSolver's schedules sample as the released sampler does."""

import json

import pytest
import torch

from oss_exp.files import ASSETS
from oss_exp.noise import EDMSchedule, FlowSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.stepsize import Problem
from oss_exp.stepsize.baselines.neural_solver import NeuralSolver, released_tables

TABLES = json.loads((ASSETS / "neural_solver.json").read_text())


def problem(velocity, grid) -> Problem:
    noise = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Problem(velocity, noise, grid, Euler())


def released_sampler(velocity, x, steps, earlier):
    """Return the samples at s = 1; each step from s = 0, noise, mixes all slopes dx/ds so far."""
    s = 0.0
    slopes = []

    for step, weights in zip(steps, earlier, strict=True):
        slopes.append(-velocity(x, torch.full((len(x),), 1 - s, dtype=torch.float64)))
        mixed = (1 - sum(weights)) * slopes[-1]
        for weight, slope in zip(weights, slopes[:-1], strict=True):
            mixed = mixed + weight * slope
        x = x + step * mixed
        s = s + step
    return x


@pytest.mark.parametrize("table", ["flowdcn", "sit"])
def test_samples_are_those_of_the_released_sampler(velocity, table):
    whole = problem(velocity, FlowSchedule().nodes(20))
    plans = NeuralSolver(table).plan(whole, [*released_tables(table)])
    assert [*plans] == [5, 6, 7, 8, 9, 10, *([15] if table == "flowdcn" else [])]

    for k, steps in plans.items():
        x0 = sample(whole.solver, velocity, whole.noise, steps, whole.group)
        numbers = TABLES[table][str(k)]
        exactly_to_0 = [*numbers["steps"][:-1], 1 - sum(numbers["steps"][:-1])]
        expected = released_sampler(velocity, whole.noise, exactly_to_0, numbers["earlier"])
        torch.testing.assert_close(x0, expected, rtol=1e-9, atol=1e-9)
        rounded = released_sampler(velocity, whole.noise, numbers["steps"], numbers["earlier"])
        assert (x0 - rounded).abs().max() < 2e-3


def test_tables_are_whole():
    for table in ("flowdcn", "sit"):
        for k, numbers in TABLES[table].items():
            assert [len(row) for row in numbers["earlier"]] == [*range(int(k))]
            assert sum(numbers["steps"]) == pytest.approx(1, abs=2.5e-4)


def test_other_numbers_of_steps_and_other_tables_are_refused(velocity):
    with pytest.raises(ValueError, match=r"num_steps \[5, 6, 7, 8, 9, 10, 15\], not for \[4, 20\]"):
        NeuralSolver().plan(problem(velocity, FlowSchedule().nodes(20)), [4, 5, 20])
    with pytest.raises(ValueError, match="table must be one of flowdcn, sit, got 'dit'"):
        NeuralSolver("dit")
    with pytest.raises(
        ValueError, match=r"neural_solver puts its second time, 0.9929, above the teacher's first"
    ):
        NeuralSolver().plan(problem(velocity, EDMSchedule().nodes(20)), [8])
