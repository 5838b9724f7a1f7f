"""Integrals of the polynomial through past values.

They are the weights of Adams-Bashforth methods.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def integral_weights(nodes: Sequence[Tensor], end: Tensor) -> list[Tensor]:
    """Return the integrals from nodes[0] to end of the Lagrange basis polynomials of all nodes.

    See Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, chapter
    III.1.
    """
    step = end - nodes[0]
    scaled = [(node - nodes[0]) / step for node in nodes]  # the current node is 0 and the end is 1
    weights = []
    for h, node in enumerate(scaled):
        # The basis polynomial of this node, as coefficients of 1, u, u^2, ...
        basis = [torch.ones_like(step)]
        for other in scaled[:h] + scaled[h + 1 :]:
            raised = [torch.zeros_like(step), *basis]  # times u
            terms = zip(raised, [*basis, 0.0], strict=True)
            basis = [(high - other * low) / (node - other) for high, low in terms]

        # Its integral from 0 to 1.
        weights.append(step * sum(c / (power + 1) for power, c in enumerate(basis)))
    return weights
