"""Write step schedules as lists of sigmas for ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from oss_exp.export.base import SigmaList
from oss_exp.export.sigmas import sigma_text


@dataclass(frozen=True)
class ComfyUI(SigmaList):
    """A `ManualSigmas` and a sampler node in ComfyUI's API format."""

    samplers = {"euler": "euler", "heun": "heun", "dpm_2": "dpm_2", "dpmpp_2m": "dpmpp_2m"}  # noqa: RUF012

    def texts(self, sigmas: list[float], sampler: str) -> tuple[str, str]:
        """Return the nodes as JSON, and the list for a ManualSigmas of the user's own."""
        nodes = comfyui_nodes(sigmas, sampler)
        return json.dumps(nodes, indent=2), f"ManualSigmas: {sigma_text(sigmas)}, with {sampler}"


def comfyui_nodes(sigmas: Sequence[float], sampler: str = "euler") -> dict[str, Any]:
    """Return the nodes of a list of sigmas and of its sampler, in ComfyUI's API format."""
    return {
        "sigmas": {"class_type": "ManualSigmas", "inputs": {"sigmas": sigma_text(sigmas)}},
        "sampler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": sampler}},
    }
