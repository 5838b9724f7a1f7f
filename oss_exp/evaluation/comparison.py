"""A comparison of measured schedules: paired differences to the best baseline, and its table.

A schedule's record has the PSNR of every image and the spread: the 5 to 95 % amplitude
of a sample relative to the teacher's (below 1, the sample is blurred). The table is
written as Markdown for files, HTML for notebooks and a rich table for the terminal.
"""

from __future__ import annotations

import html as escaping
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table
from torch import Tensor

from oss_exp.calibration import amplitude
from oss_exp.escaping import markdown_table, plain, visible
from oss_exp.evaluation.psnr import Interval

NOTE = (
    "PSNR: mean over n held-out images against the teacher's image from the same noise, "
    "± 95 % interval. gain: paired difference to the best baseline at the same NFE (*). "
    "NFE: network rows per image. "
    "worst 1 %: the PSNR that 99 % of the images reach. "
    "spread: 5 to 95 % amplitude of the samples relative to the teacher's. "
    "planning: network calls per search sample and seconds for all budgets together."
)


@dataclass(frozen=True)
class Result:
    """The measurements of one schedule.

    Attributes:
        run: Folder of the run.
        strategy: Name of the step-size strategy.
        num_steps: Steps of the schedule, K.
        nfe: Network rows for an image.
        baseline: True for a baseline, which gains are measured against.
        start: How the schedule starts.
        psnr: Mean PSNR in dB with its interval.
        spread: Mean relative amplitude with its interval.
        values: PSNR of every sample, by sample index.
        planning: Cost of the search.
        metrics: Other metrics, such as FID, by name.
        group: Names a group of comparable results: same model, teacher, noises and
            NFE.
    """

    run: str
    strategy: str
    num_steps: int
    nfe: int
    baseline: bool
    start: str
    psnr: Interval
    spread: Interval
    values: dict[int, float]
    planning: dict[str, Any]
    metrics: dict[str, float]
    group: str

    @classmethod
    def of(cls, row: Mapping[str, Any], group: str, run: str = "") -> Result:
        """Return the result that a row of metrics.json or of a `Comparison` records."""
        names = ("strategy", "num_steps", "nfe", "baseline", "start", "planning", "metrics")
        fields = {name: row[name] for name in names}
        samples = row["per_image"]
        return cls(
            run=run,
            psnr=Interval(**row["psnr"]),
            spread=Interval(**row["spread"]),
            values=dict(zip(samples["index"], samples["psnr"], strict=True)),
            group=group,
            **fields,
        )

    @property
    def worst(self) -> float:
        """The PSNR in dB that 99 % of the images reach."""
        return float(np.quantile(list(self.values.values()), 0.01))


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        result: The schedule's measurements.
        rival: The best baseline of the same group, which may be `result` itself; None
            without one.
        gain: Paired PSNR difference to the rival in dB; None for the rival itself and
            where the two have no sample in common.
    """

    result: Result
    rival: Result | None
    gain: Interval | None


def with_gains(results: Sequence[Result]) -> list[Line]:
    """Return the lines of a table, by budget and then by PSNR, best first.

    Gains are computed on the samples that both results have.
    """
    # The best baseline of each comparison.
    rivals: dict[str, Result] = {}
    for result in results:
        best = rivals.get(result.group)
        if result.baseline and (best is None or result.psnr.mean > best.psnr.mean):
            rivals[result.group] = result

    lines = []
    for result in sorted(results, key=lambda r: (r.nfe, r.group, -r.psnr.mean)):
        rival = rivals.get(result.group)
        gain = None if rival is None or rival is result else _paired_gain(result, rival)
        lines.append(Line(result, rival, gain))
    return lines


def _paired_gain(result: Result, rival: Result) -> Interval | None:
    """Return the mean PSNR difference on common samples; None where there are none."""
    common = sorted(result.values.keys() & rival.values.keys())
    if not common:
        return None
    return Interval.of(np.array([result.values[i] - rival.values[i] for i in common]))


def spread(x: Tensor) -> Tensor:
    """Return the distance between the 5 % and the 95 % quantile of each sample.

    Args:
        x: Samples, shape (B, *E).

    Returns:
        Shape (B,), float64.
    """
    low, high = amplitude(x, per_channel=False)
    return high - low


def measured(index: np.ndarray, psnr: np.ndarray, spread: np.ndarray) -> dict[str, Any]:
    """Return the entries of a schedule's record for its per-sample values.

    Args:
        index: Sample indices, shape (n,).
        psnr: PSNR of these samples in dB, shape (n,).
        spread: Their spread relative to the teacher's, shape (n,).
    """
    return {
        "psnr": Interval.of(psnr).to_dict(),
        "spread": Interval.of(spread).to_dict(),
        "per_image": {"index": index.tolist(), "psnr": psnr.round(4).tolist()},
    }


def columns(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table.

    The `run` column is there only where the lines come from several runs.
    """
    # Header, with a column for every metric that any result has.
    metrics = list(dict.fromkeys(name for line in lines for name in line.result.metrics))
    header = ["strategy", "K", "NFE", "start", "PSNR, dB", "gain, dB", "worst 1 %", "spread"]
    header += [*metrics, "n", "planning"]

    # Rows.
    rows = [_row(line, metrics) for line in lines]
    if len({line.result.run for line in lines}) > 1:
        header = ["run", *header]
        rows = [[line.result.run, *row] for line, row in zip(lines, rows, strict=True)]
    return header, rows


def _row(line: Line, metrics: Sequence[str]) -> list[str]:
    """Return the cells of a line, the run's left out."""
    result = line.result

    # Paired gain.
    if line.rival is result:
        gain = "*"
    elif line.gain is None:
        gain = ""
    else:
        sign = "+" if line.gain.mean >= 0 else ""
        gain = f"{sign}{line.gain}"

    # Other metrics.
    extra = []
    for name in metrics:
        extra.append(f"{result.metrics[name]:.4g}" if name in result.metrics else "-")

    # Planning cost.
    calls = result.planning.get("network_calls_per_sample")
    seconds = result.planning.get("seconds")
    planning = "-" if not calls or seconds is None else f"{calls:.0f} calls, {seconds:.1f} s"

    return [
        result.strategy,
        str(result.num_steps),
        str(result.nfe),
        result.start,
        str(result.psnr),
        gain,
        f"{result.worst:.2f}",
        f"{result.spread.mean:.3f}",
        *extra,
        str(result.psnr.n),
        planning,
    ]


def markdown(lines: Sequence[Line]) -> str:
    """Return the table as Markdown, with a note on its columns."""
    return f"{markdown_table(*columns(lines))}\n{NOTE}\n"


def terminal(lines: Sequence[Line], title: str) -> Table:
    """Return the table for the terminal, with the best baselines in bold."""
    header, rows = columns(lines)
    table = Table(title=plain(title), title_justify="left", caption=NOTE, caption_justify="left")

    # Columns: names to the left, numbers to the right.
    for name in header:
        justify = "left" if name in ("run", "strategy", "start") else "right"
        table.add_column(plain(name), no_wrap=True, justify=justify)

    # Rows, with a rule below each budget.
    for index, (line, row) in enumerate(zip(lines, rows, strict=True)):
        last = index + 1 == len(lines) or lines[index + 1].result.nfe != line.result.nfe
        style = "bold" if line.rival is line.result else None
        table.add_row(*map(plain, row), end_section=last, style=style)
    return table


def html(lines: Sequence[Line], title: str) -> str:
    """Return the table as escaped HTML for a notebook, with the best baselines in bold."""
    header, rows = columns(lines)
    parts = [
        f"<table><caption>{escaping.escape(visible(title))}</caption>",
        _html_row("th", header),
    ]
    for line, row in zip(lines, rows, strict=True):
        parts.append(_html_row("th" if line.rival is line.result else "td", row))
    return "\n".join([*parts, f"</table><p>{escaping.escape(NOTE)}</p>"])


def _html_row(tag: str, cells: Sequence[str]) -> str:
    texts = [f"<{tag}>{escaping.escape(visible(cell))}</{tag}>" for cell in cells]
    return f"<tr>{''.join(texts)}</tr>"
