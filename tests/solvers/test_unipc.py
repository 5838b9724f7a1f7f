"""UniPC equals released code and diffusers."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from references import LATER, PINNED, difference, difference_to_released, run, run_diffusers

from oss_exp.solvers import Euler, trajectory
from oss_exp.solvers.unipc import UniPC

VARIANTS = pytest.mark.parametrize("variant", ["bh1", "bh2"])


@pytest.mark.parametrize(
    ("order", "lower_order_final"), [(1, True), (2, True), (3, True), (3, False)]
)
@VARIANTS
def test_equals_released_code(order, variant, lower_order_final, velocity, gmm):
    """The released code runs without thresholding, which ours does not have."""
    name = f"unipc{order}_{variant}_x0_lof{int(lower_order_final)}_nothresh"
    solver = UniPC(order, variant, lower_order_final)
    assert difference_to_released(solver, name, velocity, gmm["z"]) < 1e-10


def scheduler(order, variant, lower_order_final=True):
    """Return UniPC of diffusers for flow models."""
    return UniPCMultistepScheduler(
        solver_order=order,
        solver_type=variant,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        lower_order_final=lower_order_final,
    )


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("lower_order_final", [True, False])
@VARIANTS
def test_equals_diffusers(order, variant, lower_order_final, velocity, gmm):
    """To a last time above 0, which the library needs for bh1 and for steps above order 1."""
    times = LATER[:-1]
    reference = scheduler(order, variant, lower_order_final)
    expected = run_diffusers(reference, velocity, gmm["z"], times)

    result = run(UniPC(order, variant, lower_order_final), velocity, gmm["z"], times)
    assert difference(result, expected) < 1e-10


@pytest.mark.parametrize(
    ("order", "times"), [(1, PINNED), (2, LATER), (3, LATER)], ids=["1", "2", "3"]
)
def test_equals_diffusers_at_the_ends(order, times, velocity, gmm):
    """From t = 1 at order 1 only.

    There the library gives NaN at order 3, and takes a limit of order 2 where ours takes order 1;
    its own schedules start at 1 - 1e-6.
    """
    expected = run_diffusers(scheduler(order, "bh2"), velocity, gmm["z"], times)
    assert difference(run(UniPC(order, "bh2", True), velocity, gmm["z"], times), expected) < 1e-10


@VARIANTS
def test_the_last_state_is_the_predictors(variant, velocity, gmm):
    unipc = trajectory(UniPC(1, variant, True), velocity, gmm["z"], LATER[:2])
    euler = trajectory(Euler(), velocity, gmm["z"], LATER[:2])
    torch.testing.assert_close(unipc, euler, rtol=0, atol=1e-13)
