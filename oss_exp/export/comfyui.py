"""Step schedules for ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from oss_exp.export.base import SigmaList
from oss_exp.export.sigmas import sigma_text


@dataclass(frozen=True)
class ComfyUI(SigmaList):
    """Nodes in ComfyUI's API format, which `ManualSigmas` and a sampler node take."""

    samplers = {"euler": "euler", "heun": "heun", "dpm_2": "dpm_2", "dpmpp_2m": "dpmpp_2m"}  # noqa: RUF012

    def texts(self, sigmas: list[float], sampler: str) -> tuple[str, str]:
        nodes = comfyui_nodes(sigmas, sampler)
        return json.dumps(nodes, indent=2), f"ManualSigmas: {sigma_text(sigmas)}, with {sampler}"


def comfyui_nodes(sigmas: Sequence[float], sampler: str = "euler") -> dict[str, Any]:
    """Return ComfyUI's API format of the sigmas, and of the sampler that they are for."""
    return {
        "sigmas": {"class_type": "ManualSigmas", "inputs": {"sigmas": sigma_text(sigmas)}},
        "sampler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": sampler}},
    }
