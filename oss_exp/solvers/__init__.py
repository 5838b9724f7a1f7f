"""Solvers of the probability-flow ODE in canonical time."""

from oss_exp.solvers.adams_bashforth import AdamsBashforth
from oss_exp.solvers.base import (
    BoundVelocity,
    LinearMultistep,
    Solver,
    State,
    VelocityFn,
    sample,
    trajectory,
    walk,
)
from oss_exp.solvers.euler import Euler
from oss_exp.solvers.heun import Heun

__all__ = [
    "AdamsBashforth",
    "BoundVelocity",
    "Euler",
    "Heun",
    "LinearMultistep",
    "Solver",
    "State",
    "VelocityFn",
    "sample",
    "trajectory",
    "walk",
]
