"""Where schedules hold, by task=certify: a table and a picture for the page, one line a setting."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence

from oss_exp.report import plots, web
from oss_exp.schedule import StepSchedule
from oss_exp.schedule_file import Cell, Certificate

HEADER = [
    "setting",
    "n",
    "PSNR, dB",
    "baseline, dB",
    "gain, dB",
    "loss, dB",
    "teacher moved to, dB",
    "",
]
NOTE = """Each line is the model with one thing changed; the schedule and the baseline {baseline} on the same held-out
noises, against the teacher of the same setting; ± 95 % intervals. gain: over the baseline, paired. loss: against the
setting that the schedule was searched in, paired; inside: at most {tolerance:g} dB. Teacher moved: PSNR of the
setting's own teacher to that of the first line, which is what the change itself does to the samples."""


def certified(plans: Sequence[tuple[str, StepSchedule]]) -> list[tuple[str, Certificate]]:
    """(name with K, certificate) of the schedules that have one."""
    return [
        (f"{name} K={plan.num_steps}", plan.range) for name, plan in plans if plan.range is not None
    ]


def setting(cell: Cell) -> str:
    return str(cell.value) if cell.axis == "base" else f"{cell.axis}={cell.value}"


def sections(plans: Sequence[tuple[str, StepSchedule]]) -> Iterator[str]:
    """HTML: the picture, then a table for each certificate."""
    found = certified(plans)
    if not found:
        return
    picture = base64.b64encode(plots.certificates(found)).decode()
    yield "<h2>Where it holds</h2>"
    yield f'<p><img style="max-width: 100%" alt="PSNR in every setting" src="data:image/png;base64,{picture}"></p>'
    for name, certificate in found:
        yield f"<h3>{html.escape(name)}</h3>"
        yield web.table(HEADER, [_line(cell, certificate) for cell in certificate.cells])
        yield f'<p class="note">{html.escape(NOTE.format(**certificate.model_dump(include={"baseline", "tolerance"})))}'
        for reason in dict.fromkeys(certificate.skipped.values()):
            labels = ", ".join(
                label for label, told in certificate.skipped.items() if told == reason
            )
            yield html.escape(f"Not measured: {labels}: {reason}.")
        yield "</p>"


def _line(cell: Cell, certificate: Certificate) -> list[str]:
    inside = "inside" if cell.loss <= certificate.tolerance else "outside"
    return [
        setting(cell),
        str(cell.n),
        f"{cell.psnr:.2f} ± {_half(cell.psnr_interval):.2f}",
        f"{cell.baseline:.2f}",
        f"{cell.gain:+.2f} ± {_half(cell.gain_interval):.2f}",
        "" if cell.axis == "base" else f"{cell.loss:.2f} ± {_half(cell.loss_interval):.2f}",
        "" if cell.moved is None else f"{cell.moved:.1f}",
        "" if cell.axis == "base" else inside,
    ]


def _half(interval: tuple[float, float]) -> float:
    return (interval[1] - interval[0]) / 2
