"""Solvers of the probability-flow ODE in canonical time. Those not named here are imported from their own files."""

from oss_exp.solvers.base import BoundVelocity, LinearMultistep, Solver, State, VelocityFn, trajectory, walk
from oss_exp.solvers.euler import Euler
from oss_exp.solvers.sampling import Watch, nfe, sample

__all__ = [
    "BoundVelocity",
    "Euler",
    "LinearMultistep",
    "Solver",
    "State",
    "VelocityFn",
    "Watch",
    "nfe",
    "sample",
    "trajectory",
    "walk",
]
