"""iPNDM and its variable-step form: Adams-Bashforth methods on eps in sigma."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from oss_exp.checks import require_choice, require_range
from oss_exp.solvers.base import LinearMultistep
from oss_exp.solvers.lagrange import integral_weights

Weights = Literal["uniform", "exact"]
UNIFORM = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@dataclass(frozen=True)
class IPNDM(LinearMultistep):
    """d(x / (1 - t)) = eps d(sigma), sigma = t / (1 - t), with eps extrapolated from earlier ones.

    Args:
        order: 1 to 4, the outputs that are used.
        weights: "uniform" takes Adams-Bashforth's weights of equal steps, whatever the
            steps are (Zhang and Chen 2023, arXiv 2204.13902, from Liu et al. 2022,
            arXiv 2202.09778); the order is only reached on equal steps. "exact"
            integrates the polynomial in sigma over the actual steps
            (iPNDM_v, DEIS rho-AB).
    """

    prediction = "eps"
    singular_at = (1.0,)

    order: int = 3
    weights: Weights = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(at_least=1, at_most=4, order=self.order)
        require_choice(get_args(Weights), weights=self.weights)

    def higher_order(self, times: Sequence[Tensor], t_next: Tensor) -> list[Tensor]:
        sigmas = [t / (1 - t) for t in times]
        sigma_next = t_next / (1 - t_next)
        if self.weights == "exact":
            steps = integral_weights(sigmas, sigma_next)
        else:
            steps = [(sigma_next - sigmas[0]) * weight for weight in UNIFORM[len(times)]]

        # From x / (1 - t) back to x.
        weights = [(1 - t_next) / (1 - times[0])]
        for step in steps:
            weights.append((1 - t_next) * step)
        return weights
