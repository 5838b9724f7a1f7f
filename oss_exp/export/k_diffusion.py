"""Step schedules for k-diffusion."""

from __future__ import annotations

import json
from dataclasses import dataclass

from oss_exp.export.base import SigmaList


@dataclass(frozen=True)
class KDiffusion(SigmaList):
    """A JSON list of sigmas for k-diffusion's `sample_euler`."""

    def texts(self, sigmas: list[float]) -> tuple[str, str]:
        return json.dumps(sigmas), f"sample_euler(model, noise * {sigmas[0]:.6g}, torch.tensor(sigmas))"
