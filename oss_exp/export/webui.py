"""Step schedules for AUTOMATIC1111's web UI and Forge, which need the extension webUI_ExtraSchedulers for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oss_exp.export.base import SigmaList
from oss_exp.export.sigmas import sigma_text


@dataclass(frozen=True)
class WebUI(SigmaList):
    """The list of sigmas that the extension's scheduler `custom` takes."""

    samplers = {"euler": "Euler", "heun": "Heun", "dpmpp_2m": "DPM++ 2M"}  # noqa: RUF012  (DPM2 leaves a sigma out)

    def texts(self, sigmas: list[float], sampler: str) -> tuple[str, str]:
        return webui_text(
            sigmas
        ), f"webUI_ExtraSchedulers, custom, with {sampler}: {webui_text(sigmas)}"


def webui_text(sigmas: Sequence[float]) -> str:
    """Return the text for the field "custom" of the extension; AUTOMATIC1111 and Forge alone take no list.

    It stretches a list from 1 to 0 to the model's own range: a first 1 is written as a little less.
    """
    return (
        f"[{sigma_text([min(sigmas[0], 1 - 1e-7) if sigmas[0] <= 1 else sigmas[0], *sigmas[1:]])}]"
    )
