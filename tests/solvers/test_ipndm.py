"""iPNDM with uniform and with exact weights equals released code and diffusers."""

import pytest
import torch
from diffusers import IPNDMScheduler
from references import LATER, difference, difference_to_released, float64, run, run_diffusers

from oss_exp.solvers.ipndm import IPNDM


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("weights", ["uniform", "exact"])
def test_equals_released_code(order, weights, velocity, gmm):
    """The exact weights are those of DEIS rho-AB; released iPNDM_v is wrong at orders 3 and 4."""
    name = f"ipndm{order}" if weights == "uniform" else f"deis_rhoab{order - 1}"
    assert difference_to_released(IPNDM(order, weights), name, velocity, gmm["z"]) < 1e-10


def test_equals_diffusers(velocity, gmm):
    """The library has order 4 only."""
    expected = run_diffusers(IPNDMScheduler(), velocity, gmm["z"], LATER, "variance_v")
    assert difference(run(IPNDM(4, "uniform"), velocity, gmm["z"], LATER), expected) < 1e-10


@pytest.mark.parametrize("order", [2, 3, 4])
def test_the_weights_agree_on_even_steps_in_sigma(order):
    times = [sigma / (1 + sigma) for sigma in float64(0.6, 0.8, 1.0, 1.2)[:order]]
    uniform, exact = (
        IPNDM(order, weights).coefficients(times, float64(2 / 7))
        for weights in ("uniform", "exact")
    )

    torch.testing.assert_close(
        torch.stack([uniform[0], *uniform[1]]), torch.stack([exact[0], *exact[1]])
    )
