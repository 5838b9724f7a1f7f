"""Integrals of the polynomial through past values: what Adams-Bashforth methods are made of."""

from collections.abc import Sequence

import torch
from torch import Tensor


def integral_weights(nodes: Sequence[Tensor], end: Tensor) -> list[Tensor]:
    """Integrals from nodes[0] to end of the Lagrange basis polynomials of all nodes (Hairer et al., ch. III.1)."""
    step = end - nodes[0]
    scaled = [(node - nodes[0]) / step for node in nodes]  # the current node is 0 and the end is 1
    weights = []
    for h, node in enumerate(scaled):
        # The basis polynomial of this node, as coefficients of 1, u, u^2, ...
        basis = [torch.ones_like(step)]
        for other in scaled[:h] + scaled[h + 1 :]:
            shifted = [torch.zeros_like(step), *basis]
            basis = [
                (up - other * low) / (node - other)
                for up, low in zip(shifted, [*basis, 0.0], strict=True)
            ]
        weights.append(step * sum(c / (power + 1) for power, c in enumerate(basis)))
    return weights
