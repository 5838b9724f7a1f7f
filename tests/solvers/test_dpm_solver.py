"""Singlestep DPM-Solver equals released code and diffusers."""

import pytest
import torch
from diffusers import DPMSolverSinglestepScheduler
from references import LATER, difference, difference_to_released, run, run_diffusers

from oss_exp.solvers.dpm_solver import DPMSolver


def test_order_2_equals_released_code(velocity, gmm):
    """The released sampler is DPM-Solver-2 with r = 1/2."""
    assert difference_to_released(DPMSolver(2), "dpm2_r0.5", velocity, gmm["z"]) < 1e-10


class Scheduler(DPMSolverSinglestepScheduler):
    """The scheduler with order 3 as in the paper: its second inner point is a step of type heun."""

    def singlestep_dpm_solver_second_order_update(self, *args, **kwargs):
        if self.config.solver_order == 3:
            self.register_to_config(solver_type="heun")
        x = super().singlestep_dpm_solver_second_order_update(*args, **kwargs)
        self.register_to_config(solver_type="midpoint")
        return x


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("order", [1, 2, 3])
def test_equals_diffusers(order, velocity, gmm):
    """The scheduler lists the time of every call: fractions 1 / order of a step in log-SNR."""
    times = LATER[:-1]
    fractions = torch.arange(order, dtype=torch.float64) / order
    log_snr = torch.logit(1 - times)
    calls = torch.sigmoid(-(log_snr[:-1, None] + log_snr.diff()[:, None] * fractions)).flatten()
    scheduler = Scheduler(
        solver_order=order,
        algorithm_type="dpmsolver",
        final_sigmas_type="sigma_min",
        lower_order_final=False,
    )
    expected = run_diffusers(
        scheduler, velocity, gmm["z"], torch.cat([calls, times[-1:]]), "variance"
    )

    assert difference(run(DPMSolver(order), velocity, gmm["z"], times), expected) < 1e-10
