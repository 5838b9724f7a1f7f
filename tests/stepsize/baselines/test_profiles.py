"""Profiles equal their known quantiles: of a helix, of powers of t, of a normal law."""

import pytest
import torch
from replay import RowCounter

from oss_exp.noise import EDMSchedule, FlowSchedule
from oss_exp.noise.heuristics import CosineSchedule
from oss_exp.solvers import Euler
from oss_exp.stepsize import Problem
from oss_exp.stepsize.baselines.profiles import (
    TORS,
    Entropic,
    SharpEuler,
    angle,
    rotation,
    smoothed,
)

STRATEGIES = [TORS(), SharpEuler(), Entropic()]


def problem(f, shape=(4, 5), num_nodes=200, shift=2.0) -> Problem:
    noise = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Problem(f, noise, FlowSchedule(shift).nodes(num_nodes), Euler())


def even(num_steps: int, power: float) -> torch.Tensor:
    """Return powers of even numbers from 1 to 0."""
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64) ** power


def test_angles_are_exact_when_they_are_small():
    tiny = torch.tensor([[1.0, 1e-12, 0.0]]).double()
    assert float(angle(torch.tensor([[1.0, 0.0, 0.0]]).double(), tiny)) == pytest.approx(
        1e-12, rel=1e-12
    )


def test_a_helix_rotates_by_its_curvature_and_torsion():
    """Radius 2, pitch 2 pi: curvature 2/5 and torsion 1/5 per arc length, at any points."""
    turn = torch.linspace(0, 3, 400, dtype=torch.float64) ** 2
    angles = rotation(torch.stack([2 * turn.cos(), 2 * turn.sin(), turn], dim=1))
    expected = turn.diff() * 5**0.5 * (0.4**2 + 0.2**2) ** 0.5
    torch.testing.assert_close(angles[1:-1], expected[1:-1], rtol=2e-3, atol=1e-6)


def test_tors_steps_evenly_along_a_helix_in_any_space():
    axes = torch.linalg.qr(
        torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double()
    ).Q[:3]

    def helix(x, t):
        slope = torch.stack(
            [-12 * (12 * t).sin(), 12 * (12 * t).cos(), 4 * torch.ones_like(t)], dim=1
        )
        return slope @ axes

    for k, steps in TORS().plan(problem(helix), [1, 4, 7]).items():
        torch.testing.assert_close(steps.times, even(k, 1), rtol=0, atol=3e-3)


@pytest.mark.parametrize(("gamma", "power"), [(1 / 2, 1 / 2), (1 / 3, 3 / 5)])
def test_sharp_euler_of_a_velocity_that_is_a_cube(gamma, power):
    """The acceleration is 3 t^2, so the density is t^(2 gamma), with powers as its quantiles."""
    plans = SharpEuler(gamma, smoothing=0).plan(
        problem(lambda x, t: t[:, None] ** 3 * torch.ones_like(x)), [1, 5, 10]
    )
    for k, steps in plans.items():
        torch.testing.assert_close(steps.times, even(k, power), rtol=0, atol=2e-3)


def test_smoothing_is_that_of_the_released_code():
    """A convolution with exp(-d^2 / 2 width^2), d up to 3 width; the ends are mirrored."""
    values = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for width in (0.5, 1.0, 5.0):
        reach = max(1, int(3 * width))
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1).double() / width) ** 2)
        mirrored = torch.cat(
            [values[1 : reach + 1].flip(0), values, values[-reach - 1 : -1].flip(0)]
        )
        expected = (mirrored.unfold(0, 2 * reach + 1, 1) * kernel).sum(1) / kernel.sum()
        torch.testing.assert_close(smoothed(values, width), expected, rtol=1e-12, atol=0)

    assert smoothed(values, 0) is values


def test_rescaled_entropic_time_of_a_normal_law_is_the_cosine_clock():
    """The loss is sigma^2 / (1 + sigma^2), so the density over sigma is that of an arctangent."""

    def exact(x, t):
        t = t[:, None]
        return (2 * t - 1) / (t**2 + (1 - t) ** 2) * x

    for k, steps in Entropic().plan(problem(exact, (16, 1000)), [1, 4, 9]).items():
        torch.testing.assert_close(steps.times, CosineSchedule().nodes(k), rtol=0, atol=0.01)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
def test_every_budget_begins_with_the_teacher_at_the_announced_calls(strategy, velocity):
    counter = RowCounter(velocity)
    noise = torch.randn(6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counted = Problem(counter, noise, EDMSchedule().nodes(20), Euler())
    counted.teacher.run()
    counter.rows = 0

    plans = strategy.plan(counted, range(1, 21))

    assert counter.rows == 6 * strategy.network_calls(20, [5])
    for k, steps in plans.items():
        assert steps.num_steps == k
        assert steps.times[0] == counted.grid[0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SharpEuler(gamma=0), "gamma must be above 0 .* got 0"),
        (lambda: SharpEuler(smoothing=-1), "smoothing must be from 0 .* got -1"),
        (
            lambda: SharpEuler().plan(problem(lambda x, t: x, num_nodes=1), [1]),
            "the teacher takes one step",
        ),
        (
            lambda: TORS().plan(problem(lambda x, t: x, num_nodes=3), [2]),
            "4 or more steps, and the teacher takes 3",
        ),
    ],
)
def test_what_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
