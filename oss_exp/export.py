"""Step schedules in the words of other programs, and back.

A flow model's sigma there is canonical time here: ComfyUI's, k-diffusion's and diffusers' lists of sigmas are times,
with the resolution's shift in them. diffusers shifts once more whatever list it is given, so it gets another list.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from oss_exp.noise import shift_time
from oss_exp.steps import StepSchedule


def flow_sigmas(steps: StepSchedule) -> list[float]:
    """K + 1 sigmas of a flow model, the last 0: what ComfyUI's samplers take. Only times are in it, to be run by Euler.

    ValueError where times alone do not say what the schedule does.
    """
    lost = {
        "times of their own for each sample": steps.samples is not None,
        "an analytic start": steps.start == "analytic",
        "fitted weights": steps.weights is not None,
        "orders above 1": steps.orders is not None and bool((steps.orders > 1).any()),
    }
    if said := [name for name, here in lost.items() if here]:
        raise ValueError(
            f"a list of sigmas cannot hold {' and '.join(said)}; plan with first-order steps for all samples and "
            "start=free or pinned, such as stepsize=oss_ave solver=euler"
        )
    return steps.times.tolist()


def from_flow_sigmas(sigmas: Sequence[float], **provenance: Any) -> StepSchedule:
    """What `flow_sigmas` gave. A last sigma above 0, as published lists have it, is where samplers put 0, and so is it.

    The noise is taken as it is, however large the first sigma: start "free".
    """
    return StepSchedule([*sigmas[:-1], 0.0], "free", provenance=provenance)


def diffusers_sigmas(steps: StepSchedule, config: Mapping[str, Any], mu: float | None = None) -> list[float]:
    """The K `sigmas` with which a scheduler of diffusers runs exactly these times of a flow model.

    config: the scheduler's; FlowMatchEulerDiscreteScheduler's, or with use_flow_sigmas UniPC's and others'.
    mu:     that the pipeline passes with use_dynamic_shifting; for FLUX `math.log(flux_shift(height, width))`.
    ValueError for a scheduler that puts times of its own in place of those it is given.
    """
    own = [f"use_{kind}_sigmas" for kind in ("karras", "exponential", "beta")] + ["shift_terminal", "invert_sigmas"]
    if replaced := [name for name in own if config.get(name)]:
        raise ValueError(f"a scheduler with {replaced[0]} does not run the sigmas it is given; build it without")
    if config.get("use_flow_sigmas") is False:
        raise ValueError("a scheduler without use_flow_sigmas has no flow times; build it with use_flow_sigmas=True")
    if not config.get("use_dynamic_shifting"):
        shift = config.get("shift") or config.get("flow_shift") or 1.0
    elif mu is None:
        raise ValueError("a scheduler with use_dynamic_shifting shifts by the pipeline's mu; give it")
    else:
        shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    times = steps.times.new_tensor(flow_sigmas(steps)[:-1])
    return shift_time(times, 1 / shift).tolist()
