"""Euler's method on the canonical flow."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oss_exp.solvers.base import LinearMultistep


@dataclass(frozen=True)
class Euler(LinearMultistep):
    """x + (t' - t) v. In these coordinates it is DDIM (arXiv 2010.02502, eq. 12, eta = 0) and Euler in sigma too."""

    order = 1

    def coefficients(self, times: Sequence[Tensor], t_next: Tensor) -> tuple[Tensor, list[Tensor]]:
        return torch.ones_like(t_next), [t_next - times[0]]
