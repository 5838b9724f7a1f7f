"""DPM-Solver, singlestep: steps that call the network again between their ends."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oss_exp.solvers.base import Singlestep, State, VelocityFn, require_order, rowwise
from oss_exp.solvers.dpm_solver_pp import log_snr


@dataclass(frozen=True)
class DPMSolver(Singlestep):
    """DPM-Solver-2 (one call at the middle log-SNR) and -3 (two, at thirds); order 1 is Euler (arXiv 2206.00927, App.).

    The steps from t = 1 and into t = 0, which are infinitely long in log-SNR, are Euler's, with one call.
    """

    order: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_order(self.order, 3)

    @property
    def evals_per_step(self) -> int:
        return self.order

    def advance(self, f: VelocityFn, state: State, t_next: Tensor, order: int | Tensor | None = None) -> State:
        t_next = t_next.expand_as(state.t)
        euler = self.euler(state, t_next)
        finite = (state.t < 1) & (t_next > 0)
        if self.order == 1 or not bool(finite.any()):
            return replace(state, x=euler, t=t_next)
        start, end = torch.where(finite, state.t, 0.6), torch.where(finite, t_next, 0.4)
        state = replace(state, t=start)
        h = log_snr(end) - log_snr(start)

        def gain(t: Tensor) -> Tensor:
            """sigma_t (e^h - 1) from the start to t."""
            return (start - t) / (1 - start)

        def eps_change(x: Tensor, t: Tensor) -> Tensor:
            v = f(x, t)
            return x - state.x + rowwise(1 - t, x) * v - rowwise(1 - start, x) * state.outputs[0]

        if self.order == 2:
            middle = torch.sigmoid(-(log_snr(start) + h / 2))
            change = eps_change(self.euler(state, middle), middle)
            x = self.euler(state, end) - rowwise(gain(end), euler) * change
        else:
            third, two_thirds = (torch.sigmoid(-(log_snr(start) + r * h)) for r in (1 / 3, 2 / 3))
            change = eps_change(self.euler(state, third), third)
            phi = torch.expm1(2 * h / 3) / (2 * h / 3) - 1
            x = self.euler(state, two_thirds) - rowwise(2 * two_thirds * phi, euler) * change
            change = eps_change(x, two_thirds)
            phi = torch.expm1(h) / h - 1
            x = self.euler(state, end) - rowwise(1.5 * end * phi, euler) * change
        return replace(state, x=x.where(rowwise(finite, x).bool(), euler), t=t_next)

    def nfe(self, times: Tensor) -> int:
        inner = len(times) - 1 - 1 - (len(times) > 2 and float(times[0]) == 1)
        return len(times) - 1 + inner * (self.order - 1)
