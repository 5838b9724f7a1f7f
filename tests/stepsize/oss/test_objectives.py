"""Objectives: the costs' mean, the mean of their roots, and that of their logarithms."""

from typing import get_args

import pytest
import torch

from oss_exp.stepsize.oss.objectives import Mean, Shared, restored, slope, transformed
from oss_exp.stepsize.problem import Collective

EACH = pytest.mark.parametrize("objective", get_args(Mean))


def costs(*shape: int) -> torch.Tensor:
    """Return costs over six decades."""
    exponents = 6 * torch.rand(*shape, dtype=torch.float64, generator=torch.manual_seed(0))
    return 10**-exponents


@EACH
def test_a_lower_weighted_mean_of_costs_is_a_lower_objective(objective):
    """The objective lies below its tangent, so reweighted least squares never raises it."""
    shared = Shared(objective)
    before, after = costs(2, 1000, 16)

    for c0, c in zip(before, after, strict=True):
        weights = shared.emphasis(c0)
        c = c * min(1.0, float(weights @ c0 / (weights @ c)))  # of no higher weighted mean
        assert shared(c, Collective()) <= shared(c0, Collective()) + 1e-12


@EACH
def test_slopes_are_derivatives(objective):
    cost = costs(64).requires_grad_()
    (derivative,) = torch.autograd.grad(transformed(cost, objective).sum(), cost)
    ratio = slope(cost, objective) / derivative
    torch.testing.assert_close(ratio, ratio[:1].expand(64))


@EACH
def test_the_mean_of_equal_costs_is_that_cost(objective):
    for cost in costs(8):
        value = float(transformed(cost, objective))
        assert restored(value, objective) == pytest.approx(float(cost))


def test_a_mean_of_logarithms_is_psnr_and_one_of_roots_rmse():
    cost = costs(16)
    log_mean = float(transformed(cost, "log_mean").mean())
    psnr = -10 * cost.log10()
    assert -10 * torch.tensor(restored(log_mean, "log_mean")).log10() == pytest.approx(psnr.mean())
    rmse = float(transformed(cost, "root_mean").mean())
    assert rmse == pytest.approx(float(cost.sqrt().mean()))
