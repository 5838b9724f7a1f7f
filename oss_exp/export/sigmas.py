"""Lists of sigmas: step schedules as other programs write them, and back.

A flow model's sigma elsewhere is canonical time here; that of any other model is sigma / alpha = t / (1 - t). A list
holds times alone; whatever it cannot hold is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue, TypeAdapter

from oss_exp.files import Record, parse_record, read_text
from oss_exp.noise import EDMPath
from oss_exp.schedule import Analytic, FittedSteps, Free, StepSchedule


def flow_sigmas(steps: StepSchedule) -> list[float]:
    """K + 1 sigmas of a flow model, the last 0: what ComfyUI's samplers take. Only times are in it, to be run by Euler.

    ValueError where times alone do not say what the schedule does.
    """
    lost = {
        "times of their own for each sample": steps.per_sample,
        "an analytic start": isinstance(steps.start, Analytic),
        "fitted weights": isinstance(steps.steps, FittedSteps),
        "orders above 1": steps.orders is not None and bool((steps.orders > 1).any()),
    }
    if said := [name for name, here in lost.items() if here]:
        raise ValueError(
            f"a list of sigmas cannot hold {' and '.join(said)}; plan with first-order steps for all samples and "
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
    """What `flow_sigmas` gave. A last sigma above 0, as published lists have it, is where samplers put 0, and so is it.

    The noise is taken as it is, however large the first sigma: start "free".
    """
    return StepSchedule([*sigmas[:-1], 0.0], Free(), provenance=provenance)


def from_ratio_sigmas(sigmas: Sequence[float], **provenance: Any) -> StepSchedule:
    """What `ratio_sigmas` gave, the last as in `from_flow_sigmas`. Samplers begin with noise times the first sigma."""
    times = EDMPath().canonical(torch.tensor([*sigmas[:-1], 0.0], dtype=torch.float64))
    return StepSchedule(times, provenance=provenance)


def sigma_text(sigmas: Sequence[float]) -> str:
    """For ComfyUI's ManualSigmas: "14.6, 6.4, 0.0", every digit; its node reads no exponents, so there are none."""
    return ", ".join(np.format_float_positional(sigma, trim="0") for sigma in sigmas)


class ManualSigmas(Record):
    """A node of this kind in ComfyUI's API format."""

    class Inputs(Record):
        """sigmas: numbers with commas."""

        sigmas: str

    inputs: Inputs


def read_sigmas(given: str | Sequence[float]) -> list[float]:
    """Numbers, text with commas, or a file of either, of JSON or of ComfyUI's API format with one ManualSigmas."""
    if not isinstance(given, str):
        return [float(sigma) for sigma in given]
    text, said = given, given if len(given) < 60 else f"{given[:57]}..."
    if given.endswith((".json", ".txt")) or (len(given) < 256 and Path(given).is_file()):
        text, said = read_text(given, "list of sigmas"), f"list of sigmas {given}"
    if text.lstrip().startswith("{"):
        text = _sigmas_of(text, said)
    try:
        return [float(word) for word in text.strip().strip("[]").replace(",", " ").split()]
    except ValueError as error:
        reason = f"{error!s:.80}"
        raise ValueError(f"{said} is no list of sigmas ({reason}); give numbers with commas, noise first") from None


def _sigmas_of(workflow: str, name: str) -> str:
    """The text of the one node ManualSigmas in ComfyUI's API format."""
    remedy = "give the list itself"
    nodes = parse_record(workflow, TypeAdapter(dict[str, JsonValue]), name, remedy).items()
    chosen = {key: node for key, node in nodes if isinstance(node, dict) and node.get("class_type") == "ManualSigmas"}
    if len(chosen) != 1:
        raise ValueError(f"{name} has {len(chosen)} nodes ManualSigmas and should have one; {remedy}")
    (node,) = parse_record(json.dumps(chosen), TypeAdapter(dict[str, ManualSigmas]), name, remedy).values()
    return node.inputs.sigmas
