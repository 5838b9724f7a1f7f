"""Write step schedules as lists of sigmas for AUTOMATIC1111's web UI and Forge.

Neither takes a list by itself; the extension webUI_ExtraSchedulers adds a field for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oss_exp.export.base import SigmaList
from oss_exp.export.sigmas import sigma_text


@dataclass(frozen=True)
class WebUI(SigmaList):
    """A list of sigmas for the extension's scheduler `custom`."""

    # Without DPM2, which leaves a sigma out.
    samplers = {"euler": "Euler", "heun": "Heun", "dpmpp_2m": "DPM++ 2M"}  # noqa: RUF012

    def texts(self, sigmas: list[float], sampler: str) -> tuple[str, str]:
        """Return the list, and where to put it."""
        text = webui_text(sigmas)
        return text, f"webUI_ExtraSchedulers, custom, with {sampler}: {text}"


def webui_text(sigmas: Sequence[float]) -> str:
    """Return the text for the extension's field "custom".

    The extension stretches a list from 1 to 0 to the model's own range, so a first
    sigma of 1 is written as a little less.
    """
    first = min(sigmas[0], 1 - 1e-7) if sigmas[0] <= 1 else sigmas[0]
    return f"[{sigma_text([first, *sigmas[1:]])}]"
