"""The table of a comparison, as Markdown for files and as a rich table for the terminal; that of stages."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from oss_exp.models.stages import FinetuneRecord
from oss_exp.report.results import Line

NOTE = (
    "PSNR: mean over n held-out images against the teacher's image from the same noise, ± 95 % interval. "
    "gain: paired difference to the best baseline at the same NFE (*). NFE: network rows per image. "
    "spread: 5 to 95 % amplitude of the samples relative to the teacher's. "
    "planning: network calls per search sample and seconds for all budgets together."
)


def columns(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Header and cells; the `run` column only where there are several runs."""
    more = list(dict.fromkeys(name for line in lines for name in line.result.metrics))
    header = ["strategy", "K", "NFE", "start", "PSNR, dB", "gain, dB", "spread", *more, "n", "planning"]
    cells = []
    for line in lines:
        result = line.result
        plan = result.planning
        gain = "*" if line.rival is result else "" if line.gain is None else f"{'+' * (line.gain.mean >= 0)}{line.gain}"
        calls, seconds = plan.get("network_calls_per_sample"), plan.get("seconds")
        cells.append(
            [
                result.strategy,
                str(result.num_steps),
                str(result.nfe),
                result.start,
                str(result.psnr),
                gain,
                f"{result.spread.mean:.3f}",
                *(f"{result.metrics[name]:.4g}" if name in result.metrics else "-" for name in more),
                str(result.psnr.n),
                "-" if not calls or seconds is None else f"{calls:.0f} calls, {seconds:.1f} s",
            ]
        )
    if len({line.result.run for line in lines}) > 1:
        header = ["run", *header]
        cells = [[line.result.run, *row] for line, row in zip(lines, cells, strict=True)]
    return header, cells


def markdown(lines: Sequence[Line]) -> str:
    header, cells = columns(lines)
    rows = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{NOTE}\n"


def terminal(lines: Sequence[Line], title: str) -> Table:
    header, cells = columns(lines)
    table = Table(title=title, title_justify="left", caption=NOTE, caption_justify="left")
    for name in header:
        table.add_column(name, no_wrap=True, justify="left" if name in ("run", "strategy", "start") else "right")
    for index, row in enumerate(cells):
        last = index + 1 == len(cells) or lines[index + 1].result.nfe != lines[index].result.nfe
        table.add_row(*row, end_section=last, style="bold" if lines[index].rival is lines[index].result else None)
    return table


def stages(record: FinetuneRecord) -> Table:
    """A row for each stage of finetune.json."""
    table = Table(title=f"{record.name}, finetuned by stages")
    for name in ("stage", "times", "steps", "parameters", "loss before", "after", "seconds", "peak memory"):
        table.add_column(name, justify="right")
    for stage in record.stages:
        (first, last), training = stage.times, stage.training
        table.add_row(
            str(stage.stage),
            f"{first:.4f} to {last:.4f}",
            str(stage.steps),
            f"{stage.parameters:,}",
            f"{training.loss_before:.3g}",
            f"{training.loss_after:.3g}",
            f"{training.seconds:.0f}",
            f"{training.peak_bytes / 2**30:.2f} GiB",
        )
    return table
