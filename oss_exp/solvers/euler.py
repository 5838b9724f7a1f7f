"""Euler's method on the canonical flow."""

from dataclasses import dataclass

from oss_exp.solvers.base import LinearMultistep


@dataclass(frozen=True)
class Euler(LinearMultistep):
    """x + (t' - t) v. In these coordinates it is DDIM (arXiv 2010.02502, eq. 12, eta = 0) and Euler in sigma too."""

    order = 1
    prediction = "v"
