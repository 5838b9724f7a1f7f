"""Samplers of other programs: which of them takes the same steps as the solver that a schedule was planned for.

A step of one network call is a sum over the first state and the clean samples that the calls predict. Two solvers with
the same sums are the same sampler on these times, whatever their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor

from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, Solver, solver_of, walk
from oss_exp.solvers.dpm2 import DPM2
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.solvers.heun import Heun
from oss_exp.tensors import rowwise

Network = Literal["flow", "eps"]

# Names of k-diffusion, which step in sigma / alpha, or with the sigmas of a flow model in flow time.
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
    """Return the kind of network that the schedule was planned for, None where its file does not say."""
    clock = steps.about("native").get("clock")
    return None if clock is None else "flow" if clock == "flow time" else "eps"


def steps_of(steps: StepSchedule) -> Solver:
    """Return the solver whose steps the schedule takes; Euler where its file names none and no order is above 1.

    Raises ValueError where times and orders alone do not say what the schedule does.
    """
    if not steps.about("solver") and (steps.orders is None or bool((steps.orders == 1).all())):
        return Euler()
    return uncalibrated(solver_of(steps))


def uncalibrated(solver: Solver) -> Solver:
    """Return the solver. ValueError where it has a calibration, which no other program applies."""
    if solver.calibration is not None:
        raise ValueError(
            "a calibrated solver's steps are no sums; export without solver.calibration"
        )
    return solver


def solver_record(solver: Solver) -> dict[str, Any]:
    """Return what names the solver in a schedule's file, which `solver_of` reads."""
    settings = {field.name: getattr(solver, field.name) for field in fields(solver)}
    return {"_target_": f"oss_exp.{type(solver).__name__}", **settings}


def words(solver: Solver) -> str:
    """Return the solver's name and the settings that its steps depend on."""
    return repr(solver).replace("calibration=None, ", "").replace("(calibration=None)", "")


def sampler_of(steps: StepSchedule, network: Network, known: Mapping[str, str]) -> str:
    """Return what a program calls the sampler of this schedule's steps.

    known: its samplers, the names of `SAMPLERS` -> its own. Raises ValueError where it has none that takes these steps.
    """
    solver = steps_of(steps)
    here = {known[name]: other for name, other in SAMPLERS[network].items() if name in known}
    for name, other in here.items():
        if same_steps(steps, solver, other):
            return name
    model = "a flow model" if network == "flow" else "such a model"
    raise ValueError(
        f"the schedule was planned for steps of {words(solver)}, which {', '.join(here)} do not take on {model}; plan "
        "with solver=euler, or export to oss_scheduler"
    )


def same_steps(steps: StepSchedule, solver: Solver, other: Solver) -> bool:
    """Return whether `other`, at its own orders, does what `solver` does at the schedule's."""
    if solver == other and steps.orders is None:
        return True
    if steps.num_steps > 1 and max(solver.evals_per_step, other.evals_per_step) > 1:
        return False
    ours, theirs = states_of(steps, solver), states_of(steps.with_own_orders(), other)
    return torch.allclose(ours, theirs, rtol=0, atol=1e-9)


def states_of(steps: StepSchedule, solver: Solver) -> Tensor:
    """(K, 1 + K) states after the steps, each a sum over the first state and the x0 of the calls, oldest first.

    The solver is run on the vectors that stand for these. ValueError where a step calls the network twice.
    """
    count = steps.num_steps
    if solver.evals_per_step != 1 and count > 1:  # a single step, into t = 0, is Euler's
        raise ValueError(
            f"{words(solver)} calls the network again within a step, which no scheduler can; use a multistep one"
        )
    basis, seen = torch.eye(count + 1, dtype=torch.float64), []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x[0])
        return (x - basis[len(seen)]) / rowwise(t, x)

    orders = None if steps.orders is None else list(steps.orders)
    *_, last = walk(solver, velocity, basis[:1], steps.times, orders)
    return torch.stack([*seen[1:], last.x[0]])
