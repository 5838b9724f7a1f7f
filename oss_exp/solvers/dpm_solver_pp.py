"""DPM-Solver++ multistep: the exact linear part in half log-SNR, finite differences of x0 for the rest."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.solvers.base import LinearMultistep


@dataclass(frozen=True)
class DPMSolverPP(LinearMultistep):
    """Orders 1 to 3, data prediction (Lu et al. 2022, arXiv 2211.01095, Alg. 2 and its third-order form in the code).

    The third-order form is the released one, here and in diffusers: its last term has half the weight that order 3
    needs, so its error falls with the square of the step. UniPC's third order is of order 3.

    lower_order_final: the last step but one at most of order 2. (The last, into t = 0, is always of order 1.)
    """

    prediction = "x0"
    singular_at = (1.0, 0.0)

    order: int = 2
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(at_least=1, at_most=3, order=self.order)

    def higher_order(self, times: Sequence[Tensor], t_next: Tensor) -> list[Tensor]:
        lambdas = [log_snr(t) for t in times]
        h = log_snr(t_next) - lambdas[0]
        alpha, phi_1 = 1 - t_next, torch.expm1(-h)
        r_0 = (lambdas[0] - lambdas[1]) / h
        if len(times) == 2:
            slope = -alpha * phi_1 / (2 * r_0)
            return [t_next / times[0], slope - alpha * phi_1, -slope]
        phi_2 = phi_1 / h + 1
        phi_3 = phi_2 / h - 0.5
        r_1 = (lambdas[1] - lambdas[2]) / h
        # D1 and D2 of the paper as combinations of x0_0, x0_1, x0_2.
        mix = r_0 / (r_0 + r_1)
        first = [(1 + mix) / r_0, -(1 + mix) / r_0 - mix / r_1, mix / r_1]
        second = [1 / r_0 / (r_0 + r_1), -(1 / r_0 + 1 / r_1) / (r_0 + r_1), 1 / r_1 / (r_0 + r_1)]
        b = [alpha * (phi_2 * d1 - phi_3 * d2) for d1, d2 in zip(first, second, strict=True)]
        return [t_next / times[0], b[0] - alpha * phi_1, *b[1:]]


def log_snr(t: Tensor) -> Tensor:
    """Half the log signal-to-noise ratio, log((1 - t) / t): the same for every path, whatever its scale."""
    return torch.log1p(-t) - t.log()
