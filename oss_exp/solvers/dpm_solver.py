"""DPM-Solver, singlestep: steps that call the network again between their ends."""

from dataclasses import dataclass

import torch
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.solvers.base import Singlestep, State
from oss_exp.solvers.dpm_solver_pp import log_snr
from oss_exp.tensors import rowwise
from oss_exp.velocity import VelocityFn


@dataclass(frozen=True)
class DPMSolver(Singlestep):
    """DPM-Solver-2 and DPM-Solver-3 (Lu et al. 2022, arXiv 2206.00927, appendix).

    The steps from t = 1 and into t = 0, which are infinitely long in log-SNR, are
    Euler's, with one call.

    Args:
        order: 1 is Euler, 2 has a second call at the middle log-SNR, 3 has two more
            calls at thirds of it.
    """

    order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(at_least=1, at_most=3, order=self.order)

    def inner_step(self, f: VelocityFn, state: State, t_next: Tensor) -> Tensor:
        start = state.t
        h = log_snr(t_next) - log_snr(start)

        def eps_change(x: Tensor, t: Tensor) -> Tensor:
            v = f(x, t)
            return x - state.x + rowwise(1 - t, x) * v - rowwise(1 - start, x) * state.outputs[0]

        if self.order == 2:
            middle = torch.sigmoid(-(log_snr(start) + h / 2))
            change = eps_change(self.euler(state, middle), middle)
            gain = (start - t_next) / (1 - start)  # sigma (e^h - 1)
            return self.euler(state, t_next) - rowwise(gain, change) * change

        # Order 3: a call at one third of the step in log-SNR.
        third = torch.sigmoid(-(log_snr(start) + 1 / 3 * h))
        change = eps_change(self.euler(state, third), third)

        # A call at two thirds.
        two_thirds = torch.sigmoid(-(log_snr(start) + 2 / 3 * h))
        phi = torch.expm1(2 * h / 3) / (2 * h / 3) - 1
        x = self.euler(state, two_thirds) - rowwise(2 * two_thirds * phi, change) * change
        change = eps_change(x, two_thirds)

        # The end.
        phi = torch.expm1(h) / h - 1
        return self.euler(state, t_next) - rowwise(1.5 * t_next * phi, change) * change
