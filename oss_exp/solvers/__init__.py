"""Solvers of the probability-flow ODE in canonical time."""

from oss_exp.solvers.base import LinearMultistep, Solver, State, named_solver
from oss_exp.solvers.euler import Euler
from oss_exp.solvers.sampling import Watch, nfe, sample, solver_of, trajectory, walk

__all__ = [
    "Euler",
    "LinearMultistep",
    "Solver",
    "State",
    "Watch",
    "named_solver",
    "nfe",
    "sample",
    "solver_of",
    "trajectory",
    "walk",
]
