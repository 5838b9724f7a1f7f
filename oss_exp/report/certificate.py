"""The page's section on certificates, by task=certify: in which settings a schedule holds."""

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
NOTE = """Each line is the model with one thing changed; the schedule and the baseline
{baseline} on the same held-out noises, against the teacher of the same setting; ± 95 % intervals.
gain: over the baseline, paired. loss: against the setting that the schedule was searched in,
paired; inside: at most {tolerance:g} dB. Teacher moved: PSNR of the setting's own teacher to that
of the first line, which is what the change itself does to the samples."""
IMAGE = (
    '<p><img style="max-width: 100%" alt="PSNR in every setting" '
    'src="data:image/png;base64,{}"></p>'
)


def certified(plans: Sequence[tuple[str, StepSchedule]]) -> list[tuple[str, Certificate]]:
    """Return the names, with K, and certificates of the schedules that have one."""
    certificates = []
    for name, plan in plans:
        if plan.range is not None:
            certificates.append((f"{name} K={plan.num_steps}", plan.range))
    return certificates


def sections(plans: Sequence[tuple[str, StepSchedule]]) -> Iterator[str]:
    """Yield HTML: the picture, then a table and its note for each certificate."""
    certificates = certified(plans)
    if not certificates:
        return

    # Picture of all certificates.
    picture = base64.b64encode(plots.certificates(certificates)).decode()
    yield "<h2>Where it holds</h2>"
    yield IMAGE.format(picture)

    for name, certificate in certificates:
        # Table.
        yield f"<h3>{html.escape(name)}</h3>"
        yield web.table(HEADER, [_row(cell, certificate) for cell in certificate.cells])

        # Note, with the settings that were not measured.
        note = NOTE.format(baseline=certificate.baseline, tolerance=certificate.tolerance)
        yield f'<p class="note">{html.escape(note)}'
        for reason, labels in _skipped(certificate).items():
            yield html.escape(f"Not measured: {', '.join(labels)}: {reason}.")
        yield "</p>"


def _skipped(certificate: Certificate) -> dict[str, list[str]]:
    """Return the settings that were not measured, by reason."""
    labels: dict[str, list[str]] = {}
    for label, reason in certificate.skipped.items():
        labels.setdefault(reason, []).append(label)
    return labels


def _row(cell: Cell, certificate: Certificate) -> list[str]:
    """Return the table's row for a setting; the first setting has no loss."""
    base = cell.axis == "base"
    inside = "inside" if cell.loss <= certificate.tolerance else "outside"
    return [
        plots.setting(cell),
        str(cell.n),
        f"{cell.psnr:.2f} ± {_half(cell.psnr_interval):.2f}",
        f"{cell.baseline:.2f}",
        f"{cell.gain:+.2f} ± {_half(cell.gain_interval):.2f}",
        "" if base else f"{cell.loss:.2f} ± {_half(cell.loss_interval):.2f}",
        "" if cell.moved is None else f"{cell.moved:.1f}",
        "" if base else inside,
    ]


def _half(interval: tuple[float, float]) -> float:
    return (interval[1] - interval[0]) / 2
