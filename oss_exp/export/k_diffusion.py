"""Write step schedules as lists of sigmas for k-diffusion."""

from __future__ import annotations

import json
from dataclasses import dataclass

from oss_exp.export.base import SigmaList


@dataclass(frozen=True)
class KDiffusion(SigmaList):
    """A JSON list of sigmas for the sampler of k-diffusion that takes the schedule's steps."""

    samplers = {  # noqa: RUF012
        "euler": "sample_euler",
        "heun": "sample_heun",
        "dpm_2": "sample_dpm_2",
        "dpmpp_2m": "sample_dpmpp_2m",
    }

    def texts(self, sigmas: list[float], sampler: str) -> tuple[str, str]:
        """Return the list as JSON, and the call of its sampler."""
        call = f"{sampler}(model, noise * {sigmas[0]:.6g}, torch.tensor(sigmas))"
        return json.dumps(sigmas), call
