"""DEIS: polynomials in the variance-preserving clock, integrated with the exact exponential weight."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.solvers.base import LinearMultistep

QUADRATURE = 64  # Gauss-Legendre points: the integrands are smooth in log(1 + sigma)


@dataclass(frozen=True)
class DEIS(LinearMultistep):
    """tAB-DEIS of orders 1 to 3 (Zhang & Chen 2023, arXiv 2204.13902, eq. 15).

    d(x / (1 - t)) = eps d(sigma) with eps a polynomial in the clock tau of the linear variance-preserving process,
    log(1 + sigma^2) = beta_d tau^2 / 2 + beta_min tau, whatever process the network was trained with.
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
        points, quadrature = np.polynomial.legendre.leggauss(QUADRATURE)
        points, quadrature = (torch.from_numpy(a).to(t_next.device) for a in (points, quadrature))
        # Integrate over y = log(1 + sigma) = -log(1 - t).
        start, end = -torch.log1p(-times[0]), -torch.log1p(-t_next)
        half = (end - start) / 2
        y = (start + half)[..., None] + half[..., None] * points
        tau, nodes = self._clock(torch.expm1(y)), [self._clock(t / (1 - t)) for t in times]
        measure = half[..., None] * quadrature * y.exp()  # d(sigma)
        weights = []
        for h, node in enumerate(nodes):
            basis = torch.ones_like(y)
            for other in nodes[:h] + nodes[h + 1 :]:
                basis = basis * (tau - other[..., None]) / (node - other)[..., None]
            weights.append((1 - t_next) * (basis * measure).sum(-1))
        return [(1 - t_next) / (1 - times[0]), *weights]

    def _clock(self, sigma: Tensor) -> Tensor:
        root = torch.sqrt(self.beta_min**2 + 2 * self.beta_d * torch.log1p(sigma**2))
        return (root - self.beta_min) / self.beta_d
