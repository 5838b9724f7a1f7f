"""DEIS: polynomials in the variance-preserving clock.

They are integrated with the exact exponential weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.solvers.base import LinearMultistep

QUADRATURE = 64  # Gauss-Legendre points; the integrands are smooth in log(1 + sigma)


@dataclass(frozen=True)
class DEIS(LinearMultistep):
    """tAB-DEIS of orders 1 to 3 (Zhang and Chen 2023, arXiv 2204.13902, eq. 15).

    It integrates d(x / (1 - t)) = eps d(sigma), with eps a polynomial in the clock tau
    of the linear variance-preserving process, log(1 + sigma^2) = beta_d tau^2 / 2 +
    beta_min tau. The clock is the same whatever process the network was trained with.

    Args:
        order: 1 to 3.
        beta_d: slope of the process's beta.
        beta_min: its first beta.
    """

    prediction = "eps"
    singular_at = (1.0,)

    order: int = 3
    beta_d: float = 19.9
    beta_min: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(at_least=1, at_most=3, order=self.order)
        require_range(at_least=1e-3, at_most=1e3, beta_d=self.beta_d)
        require_range(at_least=-1e3, at_most=1e3, beta_min=self.beta_min)

    def higher_order(self, times: Sequence[Tensor], t_next: Tensor) -> list[Tensor]:
        # Quadrature points over y = log(1 + sigma) = -log(1 - t).
        points, quadrature = np.polynomial.legendre.leggauss(QUADRATURE)
        points = torch.from_numpy(points).to(t_next.device)
        quadrature = torch.from_numpy(quadrature).to(t_next.device)
        start = -torch.log1p(-times[0])
        half = (-torch.log1p(-t_next) - start) / 2
        y = (start + half)[..., None] + half[..., None] * points
        measure = half[..., None] * quadrature * y.exp()  # d(sigma)

        # Integrals of the Lagrange basis polynomials in the clock.
        tau = self._clock(torch.expm1(y))
        nodes = [self._clock(t / (1 - t)) for t in times]
        weights = []
        for h, node in enumerate(nodes):
            basis = torch.ones_like(y)
            for other in nodes[:h] + nodes[h + 1 :]:
                basis = basis * (tau - other[..., None]) / (node - other)[..., None]
            weights.append((1 - t_next) * (basis * measure).sum(-1))
        return [(1 - t_next) / (1 - times[0]), *weights]

    def _clock(self, sigma: Tensor) -> Tensor:
        """Return tau at sigma, in the linear variance-preserving process."""
        root = torch.sqrt(self.beta_min**2 + 2 * self.beta_d * torch.log1p(sigma**2))
        return (root - self.beta_min) / self.beta_d
