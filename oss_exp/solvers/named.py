"""The solver that a step schedule's provenance names."""

from __future__ import annotations

from oss_exp.names import named_object
from oss_exp.schedule import StepSchedule
from oss_exp.solvers.base import Solver


def named_solver(steps: StepSchedule) -> Solver:
    """Return the solver that the schedule was searched with, Euler where its provenance names none.

    ValueError where it names one that is not of this package, or where the steps have orders and no solver is named.
    """
    settings = dict(steps.about("solver"))
    if not settings and steps.orders is not None:
        raise ValueError("the schedule has orders and names no solver; give the one they were searched with")
    target = str(settings.pop("_target_", "oss_exp.Euler"))
    try:
        kind = named_object(target)
    except ValueError:
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, Solver)):
        raise ValueError(f"the schedule's solver {target} is no solver of oss_exp; give the solver itself")
    return kind(**settings)
