"""tAB-DEIS equals released code, and with another clock diffusers."""

import pytest
import torch
from diffusers import DEISMultistepScheduler
from references import (
    LATER,
    RELEASED,
    difference,
    difference_to_released,
    float64,
    run,
    run_diffusers,
)

from oss_exp.solvers.deis import DEIS

# The released clock: log(1 + sigma^2) at sigma = 80 is time 1, at sigma = 0.002 time 0.001.
NOISIEST, CLEANEST = torch.log1p(float64(80, 0.002) ** 2).tolist()
BETA_D = (NOISIEST - 1000 * CLEANEST) / (0.5 - 0.5e-3)
RELEASED_CLOCK = {"beta_d": BETA_D, "beta_min": NOISIEST - BETA_D / 2}


@pytest.mark.parametrize("order", [2, 3])
def test_coefficients_equal_released_code(order):
    """By adaptive quadrature; the code works on x / (1 - t), hence the division by 1 - t."""
    runs = [key for key in RELEASED if key.endswith(f"deis_tab{order}.coefficients")]
    assert len(runs) == 6

    for key in runs:
        sigmas = RELEASED[f"{key.split('.')[0]}.sigmas"]
        times = sigmas / (1 + sigmas)
        for i in range(1, len(times) - 1):
            past_times = [times[j] for j in range(i, max(-1, i - order), -1)]
            _, b = DEIS(order, **RELEASED_CLOCK).coefficients(past_times, times[i + 1])
            result = torch.stack(b) / (1 - times[i + 1])
            expected = RELEASED[key][i, : len(past_times)]
            torch.testing.assert_close(result, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("order", "tolerance"), [(2, 3e-3), (3, 3e-4)])
def test_is_near_released_code(order, tolerance, velocity, gmm):
    """The tolerance is the error of the released quadrature, a sum of 10000 rectangles."""
    solver = DEIS(order, **RELEASED_CLOCK)
    assert difference_to_released(solver, f"deis_tab{order}", velocity, gmm["z"]) < tolerance


class LogDEIS(DEIS):
    """DEIS with the clock of diffusers, log sigma."""

    def _clock(self, sigma):
        return sigma.log()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_with_its_clock_equals_diffusers(order, velocity, gmm):
    scheduler = DEISMultistepScheduler(
        solver_order=order,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        lower_order_final=False,
    )
    expected = run_diffusers(scheduler, velocity, gmm["z"], LATER[:-1])
    result = run(LogDEIS(order, beta_d=19.9, beta_min=0.1), velocity, gmm["z"], LATER[:-1])

    assert difference(result, expected) < 1e-10


@pytest.mark.parametrize("beta_d", [0, -1, 1e30, float("nan")])
def test_a_clock_that_stands_still_is_refused(beta_d):
    with pytest.raises(ValueError, match=r"beta_d must be from 0\.001 to 1000, got"):
        DEIS(2, beta_d=beta_d, beta_min=0.1)
