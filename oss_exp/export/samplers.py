"""Find the samplers of other programs that take the steps of a schedule.

A step of one network call is a weighted sum of the first state and the clean samples
that the calls predict. Two solvers with the same weights are the same sampler on these
times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor

from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, Solver, solver_of
from oss_exp.solvers.dpm2 import DPM2
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.solvers.heun import Heun
from oss_exp.solvers.sums import solver_sums

Network = Literal["flow", "eps"]

# By the names of k-diffusion, whose samplers step in sigma / alpha, or in the time of a flow model.
SAMPLERS: Mapping[Network, Mapping[str, Solver]] = {
    "flow": {"euler": Euler(), "heun": Heun(clock="t")},
    "eps": {
        "euler": Euler(),
        "heun": Heun(clock="sigma"),
        "dpm_2": DPM2(r=0.5),
        "dpmpp_2m": DPMSolverPP(order=2),
    },
}


def network_of(steps: StepSchedule) -> Network | None:
    """Return the kind of network that a schedule was planned for; None if its file does not say."""
    clock = steps.about("native").get("clock")
    if clock is None:
        return None
    return "flow" if clock == "flow time" else "eps"


def steps_of(steps: StepSchedule) -> Solver:
    """Return the solver whose steps a schedule takes; Euler if its file names none.

    Raises:
        ValueError: Times and orders alone do not say what the schedule does.
    """
    if not steps.about("solver") and (steps.orders is None or bool((steps.orders == 1).all())):
        return Euler()
    return uncalibrated(solver_of(steps))


def uncalibrated(solver: Solver) -> Solver:
    """Return the solver unchanged.

    Raises:
        ValueError: It has a calibration, which no other program applies.
    """
    if solver.calibration is not None:
        raise ValueError(
            "a calibrated solver's steps are no sums; export without solver.calibration"
        )
    return solver


def solver_record(solver: Solver) -> dict[str, Any]:
    """Return the record of a solver in a schedule's file, which `solver_of` reads."""
    settings = {field.name: getattr(solver, field.name) for field in fields(solver)}
    return {"_target_": f"oss_exp.{type(solver).__name__}", **settings}


def words(solver: Solver) -> str:
    """Return a solver's name, and the settings that its steps depend on."""
    return repr(solver).replace("calibration=None, ", "").replace("(calibration=None)", "")


def sampler_of(steps: StepSchedule, network: Network, names: Mapping[str, str]) -> str:
    """Return a program's name for the sampler that takes a schedule's steps.

    Args:
        steps: The schedule.
        network: Kind of its network.
        names: The program's samplers: names in `SAMPLERS` -> its names.

    Raises:
        ValueError: The program has no such sampler.
    """
    solver = steps_of(steps)
    samplers = {names[name]: other for name, other in SAMPLERS[network].items() if name in names}
    for name, other in samplers.items():
        if same_steps(steps, solver, other):
            return name

    model = "a flow model" if network == "flow" else "such a model"
    raise ValueError(
        f"the schedule was planned for steps of {words(solver)}, which {', '.join(samplers)} do "
        f"not take on {model}; plan with solver=euler, or export to oss_scheduler"
    )


def same_steps(steps: StepSchedule, solver: Solver, other: Solver) -> bool:
    """Return whether `other`, at its own orders, takes the steps of `solver` at the schedule's."""
    if solver == other and steps.orders is None:
        return True
    if steps.num_steps > 1 and max(solver.evals_per_step, other.evals_per_step) > 1:
        return False
    states = states_of(steps, solver)
    others = states_of(steps.with_own_orders(), other)
    return torch.allclose(states, others, rtol=0, atol=1e-9)


def states_of(steps: StepSchedule, solver: Solver) -> Tensor:
    """Return the states after the steps as weighted sums.

    Returns:
        Weights (K, 1 + K) over the first state and the x0 of the calls, oldest first.

    Raises:
        ValueError: A step calls the network twice.
    """
    orders = None if steps.orders is None else list(steps.orders)
    return solver_sums(solver, steps.times, orders)
