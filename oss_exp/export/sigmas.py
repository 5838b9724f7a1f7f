"""Lists of sigmas: step schedules as other programs write them, and back.

A flow model's sigma elsewhere is canonical time here; that of any other model is sigma / alpha = t / (1 - t). A list
holds times alone; whatever it cannot hold is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from oss_exp.noise import EDMPath
from oss_exp.schedule import Analytic, FittedSteps, Free, StepSchedule


def flow_sigmas(steps: StepSchedule) -> list[float]:
    """K + 1 sigmas of a flow model, the last 0: what ComfyUI's samplers take. Which one has to run them is not in it.

    ValueError where no sampler makes of times alone what the schedule does (`samplers.sampler_of` says which does).
    """
    lost = {
        "times of their own for each sample": steps.per_sample,
        "an analytic start": isinstance(steps.start, Analytic),
        "fitted weights": isinstance(steps.steps, FittedSteps),
    }
    if said := [name for name, here in lost.items() if here]:
        raise ValueError(
            f"a list of sigmas cannot hold {' and '.join(said)}; plan with a solver's steps for all samples and "
            "start=free or pinned, such as stepsize=oss_ave solver=euler, or, where all samples have the same times, "
            "export to oss_scheduler"
        )
    return steps.times.tolist()


def ratio_sigmas(steps: StepSchedule) -> list[float]:
    """K + 1 sigmas of any other model, sigma / alpha as k-diffusion has it, the last 0. ValueError as `flow_sigmas`."""
    times = flow_sigmas(steps)
    if times[0] == 1:
        raise ValueError(
            "the schedule's first time is 1, where sigma / alpha is infinite; plan it on a noise_schedule that begins "
            "at the network's largest sigma, such as ddim or edm"
        )
    return EDMPath().native(steps.times).tolist()


def from_flow_sigmas(sigmas: Sequence[float], **provenance: Any) -> StepSchedule:
    """Return the schedule of what `flow_sigmas` gave.

    The noise is taken as it is, however large the first sigma: start "free". Raises ValueError for what is no list of
    K + 1 sigmas, noise first and 0 last.
    """
    _require_sigmas(sigmas)
    if sigmas[0] > 1:
        raise ValueError(
            f"a flow model's sigmas are at most 1, the list begins at {sigmas[0]:g}; divide a clock's times by its "
            "length, or set network=eps for sigma / alpha"
        )
    return StepSchedule(sigmas, Free(), provenance=provenance)


def from_ratio_sigmas(sigmas: Sequence[float], **provenance: Any) -> StepSchedule:
    """Return the schedule of what `ratio_sigmas` gave. Samplers begin with noise times the first sigma.

    Raises ValueError as `from_flow_sigmas` does, and for the indices of a training chain.
    """
    _require_sigmas(sigmas)
    if sigmas[0] > 100 and (sigmas[-2] >= 10 or all(float(sigma).is_integer() for sigma in sigmas)):
        raise ValueError(
            f"the list from {sigmas[0]:g} to {sigmas[-2]:g} looks like the indices of a training chain and not like "
            "sigma / alpha; give the sigmas of these indices, in diffusers scheduler.sigmas"
        )
    times = EDMPath().canonical(torch.tensor(sigmas, dtype=torch.float64))
    return StepSchedule(times, provenance=provenance)


def _require_sigmas(sigmas: Sequence[float]) -> None:
    """ValueError unless these are finite numbers that decrease from noise to exactly 0."""
    if not sigmas or not all(math.isfinite(sigma) and sigma >= 0 for sigma in sigmas):
        raise ValueError(f"sigmas must be finite numbers of at least 0, got {_shown(sigmas)}")
    if any(later >= sigma for sigma, later in pairwise(sigmas)):
        raise ValueError(
            f"sigmas must strictly decrease, noise first, got {_shown(sigmas)}; sort them so, each once"
        )
    if sigmas[-1] != 0:
        raise ValueError(
            f"the list ends at {sigmas[-1]:g} and not at 0. If the network is called there, as with diffusers' sigmas, "
            f"write 0 after it ({len(sigmas)} steps); if it is where samplers put 0, as in published tables, write 0 "
            f"in its place ({len(sigmas) - 1} steps)"
        )
    if len(sigmas) == 1:
        raise ValueError("the list has no sigma above 0; give noise first, 0 last")


def _shown(sigmas: Sequence[float]) -> str:
    return f"[{', '.join(f'{sigma:g}' for sigma in sigmas[:20])}{', ...' * (len(sigmas) > 20)}]"


def sigma_text(sigmas: Sequence[float]) -> str:
    """For ComfyUI's ManualSigmas: "14.6, 6.4, 0.0", every digit; its node reads no exponents, so there are none."""
    return ", ".join(np.format_float_positional(sigma, trim="0") for sigma in sigmas)
