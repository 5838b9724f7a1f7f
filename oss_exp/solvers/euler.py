"""Euler's method in canonical time."""

from dataclasses import dataclass

from oss_exp.solvers.base import LinearMultistep


@dataclass(frozen=True)
class Euler(LinearMultistep):
    """x + (t' - t) v.

    In canonical coordinates it is also DDIM (arXiv 2010.02502, eq. 12, eta = 0), and
    Euler's method in sigma.
    """

    order = 1
    prediction = "v"
