"""DPM-Solver++ multistep, in half log-SNR.

The linear part of the ODE is exact; finite differences of x0 stand for the derivatives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.solvers.base import LinearMultistep


@dataclass(frozen=True)
class DPMSolverPP(LinearMultistep):
    """DPM-Solver++ with data prediction (Lu et al. 2022, arXiv 2211.01095, Algorithm 2).

    Order 3 has the form of the released code and of diffusers. Its last term has half
    the weight that order 3 needs, so its error falls with the square of the step;
    UniPC's third order is of order 3.

    Args:
        order: 1 to 3.
        lower_order_final: the last step but one has at most order 2. (The last, into
            t = 0, always has order 1.)
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
        alpha = 1 - t_next
        phi_1 = torch.expm1(-h)
        r_0 = (lambdas[0] - lambdas[1]) / h

        # Order 2.
        if len(times) == 2:
            slope = -alpha * phi_1 / (2 * r_0)
            return [t_next / times[0], slope - alpha * phi_1, -slope]

        # Order 3: D1 and D2 of the paper as combinations of x0_0, x0_1, x0_2.
        phi_2 = phi_1 / h + 1
        phi_3 = phi_2 / h - 0.5
        r_1 = (lambdas[1] - lambdas[2]) / h
        mix = r_0 / (r_0 + r_1)
        first = [(1 + mix) / r_0, -(1 + mix) / r_0 - mix / r_1, mix / r_1]
        second = [1 / r_0 / (r_0 + r_1), -(1 / r_0 + 1 / r_1) / (r_0 + r_1), 1 / r_1 / (r_0 + r_1)]
        weights = [t_next / times[0]]
        for d1, d2 in zip(first, second, strict=True):
            weights.append(alpha * (phi_2 * d1 - phi_3 * d2))
        weights[1] = weights[1] - alpha * phi_1
        return weights


def log_snr(t: Tensor) -> Tensor:
    """Return half the log signal-to-noise ratio, log((1 - t) / t).

    It is the same for every path, whatever the path's scale.
    """
    return torch.log1p(-t) - t.log()
