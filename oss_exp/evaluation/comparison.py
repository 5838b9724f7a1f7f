"""A comparison of measured schedules: paired differences to the best baseline, and the table that shows them.

Measured are PSNR per image and the spread: the 5 to 95 % amplitude of a sample relative to the teacher's (below 1: it
blurs). The table is Markdown for files, HTML for notebooks and a rich table for the terminal.
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
    "PSNR: mean over n held-out images against the teacher's image from the same noise, ± 95 % interval. "
    "gain: paired difference to the best baseline at the same NFE (*). NFE: network rows per image. "
    "worst 1 %: the PSNR that 99 % of the images reach. "
    "spread: 5 to 95 % amplitude of the samples relative to the teacher's. "
    "planning: network calls per search sample and seconds for all budgets together."
)


@dataclass(frozen=True)
class Result:
    """One measured schedule. values: {sample index: PSNR}; arena: what must agree for a comparison to be fair."""

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
    metrics: dict[str, float]  # FID and the like, by name
    arena: str

    @classmethod
    def of(cls, row: Mapping[str, Any], arena: str, run: str = "") -> Result:
        """Return the result that a row of metrics.json or of a `Comparison` records."""
        shared = ("strategy", "num_steps", "nfe", "baseline", "start", "planning", "metrics")
        return cls(
            run=run,
            psnr=Interval(**row["psnr"]),
            spread=Interval(**row["spread"]),
            values=dict(zip(row["per_image"]["index"], row["per_image"]["psnr"], strict=True)),
            arena=arena,
            **{name: row[name] for name in shared},
        )

    @property
    def worst(self) -> float:
        """The PSNR that 99 % of the images reach."""
        return float(np.quantile(list(self.values.values()), 0.01))


@dataclass(frozen=True)
class Line:
    """A line of the table: a result and its paired difference to the best baseline of its arena (None: it is that)."""

    result: Result
    rival: Result | None
    gain: Interval | None


def with_gains(results: Sequence[Result]) -> list[Line]:
    """Lines by budget, then best first; differences on the samples that both have."""
    rivals: dict[str, Result] = {}
    for result in results:
        best = rivals.get(result.arena)
        if result.baseline and (best is None or result.psnr.mean > best.psnr.mean):
            rivals[result.arena] = result

    lines = []
    for result in sorted(results, key=lambda r: (r.nfe, r.arena, -r.psnr.mean)):
        rival = rivals.get(result.arena)
        gain = None
        if rival is not None and rival is not result:
            common = sorted(result.values.keys() & rival.values.keys())
            if common:
                gain = Interval.of(np.array([result.values[i] - rival.values[i] for i in common]))
        lines.append(Line(result, rival, gain))
    return lines


def spread(x: Tensor) -> Tensor:
    """(B, *E) -> (B,) float64, from the 5 to the 95 % quantile of each sample."""
    low, high = amplitude(x, per_channel=False)
    return high - low


def measured(index: np.ndarray, psnr: np.ndarray, spread: np.ndarray) -> dict[str, Any]:
    """The entries of a schedule's record that its values (n,) give: PSNR and relative spread of the samples `index`."""
    return {
        "psnr": Interval.of(psnr).to_dict(),
        "spread": Interval.of(spread).to_dict(),
        "per_image": {"index": index.tolist(), "psnr": psnr.round(4).tolist()},
    }


def columns(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Header and cells; the `run` column only where there are several runs."""
    more = list(dict.fromkeys(name for line in lines for name in line.result.metrics))
    header = [
        "strategy",
        "K",
        "NFE",
        "start",
        "PSNR, dB",
        "gain, dB",
        "worst 1 %",
        "spread",
        *more,
        "n",
        "planning",
    ]
    cells = []
    for line in lines:
        result = line.result
        plan = result.planning
        gain = (
            "*"
            if line.rival is result
            else ""
            if line.gain is None
            else f"{'+' * (line.gain.mean >= 0)}{line.gain}"
        )
        calls, seconds = plan.get("network_calls_per_sample"), plan.get("seconds")
        cells.append(
            [
                result.strategy,
                str(result.num_steps),
                str(result.nfe),
                result.start,
                str(result.psnr),
                gain,
                f"{result.worst:.2f}",
                f"{result.spread.mean:.3f}",
                *(
                    f"{result.metrics[name]:.4g}" if name in result.metrics else "-"
                    for name in more
                ),
                str(result.psnr.n),
                "-" if not calls or seconds is None else f"{calls:.0f} calls, {seconds:.1f} s",
            ]
        )
    if len({line.result.run for line in lines}) > 1:
        header = ["run", *header]
        cells = [[line.result.run, *row] for line, row in zip(lines, cells, strict=True)]
    return header, cells


def markdown(lines: Sequence[Line]) -> str:
    return f"{markdown_table(*columns(lines))}\n{NOTE}\n"


def terminal(lines: Sequence[Line], title: str) -> Table:
    header, cells = columns(lines)
    table = Table(title=plain(title), title_justify="left", caption=NOTE, caption_justify="left")
    for name in header:
        table.add_column(
            plain(name),
            no_wrap=True,
            justify="left" if name in ("run", "strategy", "start") else "right",
        )
    for index, row in enumerate(cells):
        last = index + 1 == len(cells) or lines[index + 1].result.nfe != lines[index].result.nfe
        table.add_row(
            *map(plain, row),
            end_section=last,
            style="bold" if lines[index].rival is lines[index].result else None,
        )
    return table


def html(lines: Sequence[Line], title: str) -> str:
    """The table for a notebook, its cells and the title escaped; the best baseline's row is bold."""
    header, cells = columns(lines)
    parts = [
        f"<table><caption>{escaping.escape(visible(title))}</caption>",
        _html_row("th", header),
    ]
    for line, row in zip(lines, cells, strict=True):
        parts.append(_html_row("th" if line.rival is line.result else "td", row))
    return "\n".join([*parts, f"</table><p>{escaping.escape(NOTE)}</p>"])


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return (
        "<tr>"
        + "".join(f"<{tag}>{escaping.escape(visible(cell))}</{tag}>" for cell in cells)
        + "</tr>"
    )
