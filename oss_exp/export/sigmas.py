"""Turn step schedules into the lists of sigmas that other programs read, and back.

The sigma of a flow model is canonical time; that of any other model is sigma / alpha =
t / (1 - t). A list holds times alone, so schedules with more than times are refused.
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
    """Return the K + 1 sigmas of a flow model, the last 0, as ComfyUI's samplers take them.

    The list does not say which sampler has to run it; `samplers.sampler_of` does.

    Raises:
        ValueError: The schedule has more than times, so no sampler can run it from a
            list.
    """
    features = {
        "times of their own for each sample": steps.per_sample,
        "an analytic start": isinstance(steps.start, Analytic),
        "fitted weights": isinstance(steps.steps, FittedSteps),
    }
    losses = [name for name, present in features.items() if present]
    if losses:
        raise ValueError(
            f"a list of sigmas cannot hold {' and '.join(losses)}; plan with a solver's steps for "
            "all samples and start=free or pinned, such as stepsize=oss_ave solver=euler, or, "
            "where all samples have the same times, export to oss_scheduler"
        )
    return steps.times.tolist()


def ratio_sigmas(steps: StepSchedule) -> list[float]:
    """Return the K + 1 sigmas of any other model, sigma / alpha as in k-diffusion, the last 0.

    Raises:
        ValueError: As in `flow_sigmas`, or the first time is 1.
    """
    times = flow_sigmas(steps)
    if times[0] == 1:
        raise ValueError(
            "the schedule's first time is 1, where sigma / alpha is infinite; plan it on a "
            "noise_schedule that begins at the network's largest sigma, such as ddim or edm"
        )
    return EDMPath().native(steps.times).tolist()


def from_flow_sigmas(sigmas: Sequence[float], **provenance: Any) -> StepSchedule:
    """Return the schedule of a flow model's sigmas, as `flow_sigmas` returns them.

    The noise is not scaled by the first sigma: the start is "free".

    Args:
        sigmas: K + 1 decreasing sigmas, the last 0.
        provenance: What the schedule's file says of its origin.

    Raises:
        ValueError: The sigmas are no such list.
    """
    _require_sigmas(sigmas)
    if sigmas[0] > 1:
        raise ValueError(
            f"a flow model's sigmas are at most 1, the list begins at {sigmas[0]:g}; divide a "
            "clock's times by its length, or set network=eps for sigma / alpha"
        )
    return StepSchedule(sigmas, Free(), provenance=provenance)


def from_ratio_sigmas(sigmas: Sequence[float], **provenance: Any) -> StepSchedule:
    """Return the schedule of any other model's sigmas, as `ratio_sigmas` returns them.

    Samplers begin with noise times the first sigma: the start is "pinned".

    Args:
        sigmas: K + 1 decreasing sigmas, the last 0.
        provenance: What the schedule's file says of its origin.

    Raises:
        ValueError: The sigmas are no such list, or they are the indices of a training
            chain.
    """
    _require_sigmas(sigmas)
    whole = all(float(sigma).is_integer() for sigma in sigmas)
    if sigmas[0] > 100 and (sigmas[-2] >= 10 or whole):
        raise ValueError(
            f"the list from {sigmas[0]:g} to {sigmas[-2]:g} looks like the indices of a training "
            "chain and not like sigma / alpha; give the sigmas of these indices, in diffusers "
            "scheduler.sigmas"
        )
    times = EDMPath().canonical(torch.tensor(sigmas, dtype=torch.float64))
    return StepSchedule(times, provenance=provenance)


def _require_sigmas(sigmas: Sequence[float]) -> None:
    """Raise a ValueError unless these are finite numbers that decrease from noise to exactly 0."""
    # Finite, decreasing.
    if not sigmas or not all(math.isfinite(sigma) and sigma >= 0 for sigma in sigmas):
        raise ValueError(f"sigmas must be finite numbers of at least 0, got {_excerpt(sigmas)}")

    if any(later >= sigma for sigma, later in pairwise(sigmas)):
        raise ValueError(
            f"sigmas must strictly decrease, noise first, got {_excerpt(sigmas)}; "
            "sort them so, each once"
        )

    # Down to 0.
    if sigmas[-1] != 0:
        raise ValueError(
            f"the list ends at {sigmas[-1]:g} and not at 0. If the network is called there, as "
            f"with diffusers' sigmas, write 0 after it ({len(sigmas)} steps); if it is where "
            "samplers put 0, as in published tables, write 0 in its place "
            f"({len(sigmas) - 1} steps)"
        )
    if len(sigmas) == 1:
        raise ValueError("the list has no sigma above 0; give noise first, 0 last")


def _excerpt(sigmas: Sequence[float]) -> str:
    """Return the first twenty sigmas as text."""
    words = [f"{sigma:g}" for sigma in sigmas[:20]]
    if len(sigmas) > 20:
        words.append("...")
    return f"[{', '.join(words)}]"


def sigma_text(sigmas: Sequence[float]) -> str:
    """Return a list for ComfyUI's ManualSigmas, such as "14.6, 6.4, 0.0".

    Every digit is written, without exponents, which the node does not read.
    """
    return ", ".join(np.format_float_positional(sigma, trim="0") for sigma in sigmas)
