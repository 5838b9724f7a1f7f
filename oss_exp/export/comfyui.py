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

    def texts(self, sigmas: list[float]) -> tuple[str, str]:
        return json.dumps(comfyui_nodes(sigmas), indent=2), f"ManualSigmas: {sigma_text(sigmas)}, with euler"


def comfyui_nodes(sigmas: Sequence[float]) -> dict[str, Any]:
    """Return ComfyUI's API format of the sigmas, and of the sampler that they are for."""
    return {
        "sigmas": {"class_type": "ManualSigmas", "inputs": {"sigmas": sigma_text(sigmas)}},
        "sampler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    }
