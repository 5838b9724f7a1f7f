"""Reports of a run folder or a sweep: table.md, pictures and a self-contained report.html."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig

from oss_exp import escaping
from oss_exp.escaping import PlainConsole
from oss_exp.evaluation.comparison import (
    NOTE,
    Line,
    Result,
    columns,
    markdown,
    terminal,
    with_gains,
)
from oss_exp.files import inside, write_atomically
from oss_exp.report import certificate, geneval, plots, web
from oss_exp.report.records import (
    read_amplitude,
    read_configuration,
    read_finetuning,
    read_metrics,
    read_pictures,
    read_teacher_times,
    read_training,
    read_ways,
)
from oss_exp.report.results import read_run, read_schedules
from oss_exp.report.table import stages
from oss_exp.schedule import StepSchedule
from oss_exp.tasks.task import Task

FILTER = """<form class="filter" hidden><label>Strategies <input type="search" id="filter"
placeholder="such as oss, fm" autocomplete="off"></label> <output></output></form>"""
SCHEDULES = """<h2>Step schedules</h2>
<div class="panels" id="panels"></div><div class="legend" id="legend"></div>
<p class="note">The mouse or the arrow keys show a point's strategy and time. In the legend a click
hides or shows a strategy, a double click shows it alone. Dashed: baselines. Ticks on the left: the
teacher's nodes.</p>
<noscript>This plot needs JavaScript; it is also in schedules.png.</noscript>"""
CURVES = """<h2>{}</h2>
<div class="panels" id="{}"></div><div class="legend"></div>
<p class="note">{}</p>"""
COSTS = """Mean distance of the search samples to the teacher after every step, along the path that
the dynamic program found, before it was agreed on by several samples or refined."""
SAMPLES = """<h2>Samples</h2>
<p class="note">The teacher and every schedule on the same noises, at {width} x {height} pixels
({form}); PSNR is of all images at their own size. A click enlarges a sample, arrow keys go to its
neighbours.</p>
<p><label><input type="checkbox" id="errors"> errors</label>
<span class="note">absolute difference to the teacher's pixels: 0 black, 0.5 and above bright
</span></p>
<div id="grid"></div>
<noscript>These pictures need JavaScript; they are also in samples.png.</noscript>"""
TRAJECTORIES = """<h2>On the way</h2>
<p class="note">The clean sample that the network predicts when a step calls it, x0 = x - t v, and
below it the step's time t (1 noise, 0 data); the teacher at some of its steps, of a video the
middle frame. At t = 0 the sample itself. A click on one of the samples shows its trajectory, a
click on a step enlarges it, arrow keys go to its neighbours.</p>
<div id="choice"></div><div id="ways"></div>
<noscript>These pictures need JavaScript; they are also in trajectories.npz.</noscript>"""
DETAILS = "<details><summary><h2>{}</h2></summary><pre>{}</pre></details>"


def write(folder: Path) -> None:
    """Write the tables, pictures and pages that a folder has the data for, and print their paths.

    All files are made before the first is written, so that an earlier report stays
    whole if one cannot be made.
    """
    console = PlainConsole()
    plans = read_schedules(folder)
    teacher = read_teacher_times(folder)
    files: dict[Path, str | bytes] = {}
    samples: list[Path] = []

    # Schedules and measurements.
    if plans:
        files[folder / "schedules.png"] = plots.schedules(plans, teacher)
    if (folder / "metrics.json").exists():
        files |= _comparison(folder, plans, teacher, console)
    elif plans:
        console.print("\n".join(_times(plans)), soft_wrap=True)

    # Certificates.
    certificates = certificate.certified(plans)
    if certificates:
        files[folder / "certificate.png"] = plots.certificates(certificates)
        if folder / "report.html" not in files:
            body = [
                *certificate.sections(plans),
                DETAILS.format("Configuration", html.escape(read_configuration(folder))),
            ]
            files[folder / "report.html"] = web.page(
                "Where a step schedule holds", body, {"curves": {}}
            )

    # Calibration and training.
    if (folder / "amplitude.json").exists():
        files[folder / "amplitude.png"] = plots.amplitude(read_amplitude(folder).curves)
        console.print(
            f"calibration: {folder / 'calibration.json'}  (use it: solver.calibration=FILE)",
            soft_wrap=True,
        )
    if (folder / "training.json").exists():
        files[folder / "training.png"] = plots.training(read_training(folder).losses)
        samples = sorted((folder / "samples").glob("step_*.png"))[-1:]
    if (folder / "finetune.json").exists():
        finetuned = read_finetuning(folder)
        files[folder / "stages.png"] = plots.stages(finetuned.stages)
        console.print(stages(finetuned))

    # GenEval.
    if (folder / "geneval.json").exists():
        files |= geneval.files(folder)
        console.print(files[folder / "geneval.md"], soft_wrap=True)

    # Files.
    if plans:
        console.print(f"schedules ({len(plans)}): {folder / 'schedules'}", soft_wrap=True)
    for path, content in files.items():
        write_atomically(path, content)
    for path in [*files, *samples]:
        console.print(f"{path}", soft_wrap=True)


def _comparison(
    folder: Path,
    plans: Sequence[tuple[str, StepSchedule]],
    teacher: Sequence[float],
    console: PlainConsole,
) -> dict[Path, str | bytes]:
    """Return table, pictures and page of a run that was measured, and print the table."""
    results = read_run(folder)
    lines = with_gains(results)
    pictures = read_pictures(folder)
    trajectories = read_ways(folder)
    files: dict[Path, str | bytes] = {}

    # Pictures.
    if pictures:
        files[folder / "samples.png"] = plots.samples(pictures, results)
        animation = plots.animation(pictures, results)
        if animation is not None:
            files[folder / "samples.gif"] = animation

    # Table and page.
    title = _title(folder)
    files[folder / "table.md"] = markdown(lines) + _rounding(plans)
    page = _page(folder, title, lines, plans, teacher, pictures, trajectories)
    files[folder / "report.html"] = page
    console.print(terminal(lines, title))
    console.print(_rounding(plans), end="", soft_wrap=True)
    return files


@dataclass(frozen=True)
class Report(Task):
    """Gather the runs of a --multirun's folder `sweep` into one table, picture and page."""

    sweep: str

    def __call__(self, cfg: DictConfig) -> None:
        gather(Path(self.sweep).expanduser())


def _by_number(path: Path) -> list[str | int]:
    """Return a key that sorts jobs 2 and 10 by their numbers."""
    parts = re.split(r"(\d+)", str(path))
    return [int(part) if part.isdecimal() else part for part in parts]


def gather(sweep: Path) -> None:
    """Write one table, picture and page of all runs below a folder.

    Runs that failed or whose files are damaged are listed with the reason.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If no run can be reported.
    """
    logs = [path for path in sorted(sweep.rglob("error.log"), key=_by_number) if path.is_file()]
    folders = sorted((path.parent for path in sweep.rglob("metrics.json")), key=_by_number)
    if not folders:
        raise FileNotFoundError(
            f"no metrics.json below {sweep.resolve()}; sweep must be the folder of a --multirun"
        )

    # Runs that can be read, and those that failed.
    failed = {}
    for log in logs:
        if log.parent not in folders:
            failed[_name(sweep, log.parent)] = _reason(sweep, log)
    runs: list[_Run] = []
    for folder in folders:
        try:
            runs.append(_read(folder, _name(sweep, folder)))
        except (OSError, ValueError) as error:
            failed[_name(sweep, folder)] = escaping.line(str(error))
    title = f"Failed, {len(failed)} of {len(runs) + len(failed)} runs:"
    reasons = [f"{run}: {reason}" for run, reason in failed.items()]
    failures = "\n- ".join([title, *reasons]) if failed else ""
    if not runs:
        raise ValueError(f"no run below {sweep} can be reported\n{failures}")

    # Results, and schedules; a name that several runs have is followed by the run's.
    results: list[Result] = []
    counts: Counter[tuple[str, int]] = Counter()
    for run in runs:
        results += run.results
        counts.update((name, plan.num_steps) for name, plan in run.plans)
    lines = with_gains(results)
    plans = []
    for run in runs:
        for name, plan in run.plans:
            unique = counts[name, plan.num_steps] == 1
            plans.append((name if unique else f"{name} (run {run.name})", plan))

    # Table, with the failures below it.
    table = markdown(lines)
    if failed:
        items = "".join(f"- {escaping.markdown(reason)}\n" for reason in reasons)
        table += f"\n{title}\n\n{items}"

    # Files.
    teacher = runs[0].teacher
    page = _page(sweep, f"Sweep of {len(runs)} runs", lines, plans, teacher, {}, {}, failures)
    files: dict[Path, str | bytes] = {
        sweep / "schedules.png": plots.schedules(plans, teacher),
        sweep / "table.md": table,
        sweep / "report.html": page,
    }
    for path, content in files.items():
        write_atomically(path, content)

    # Terminal.
    console = PlainConsole()
    console.print(terminal(lines, f"{len(runs)} runs in {sweep}"))
    if failures:
        console.print(failures, soft_wrap=True)
    console.print(f"{sweep / 'table.md'}\n{sweep / 'report.html'}", soft_wrap=True)


class _Run(NamedTuple):
    """A run of a sweep, as its report shows it; `teacher` has the times of the teacher's nodes."""

    name: str
    results: list[Result]
    plans: list[tuple[str, StepSchedule]]
    teacher: list[float]


def _read(folder: Path, name: str) -> _Run:
    """Read a run for a sweep's report; raise ValueError or OSError if it is not complete."""
    run = _Run(name, read_run(folder, name), read_schedules(folder), read_teacher_times(folder))
    if not run.plans:
        raise ValueError(f"{folder / 'schedules'} has no schedules; restore them, or run it again")
    return run


def _name(sweep: Path, folder: Path) -> str:
    return str(folder.relative_to(sweep))


def _reason(sweep: Path, log: Path) -> str:
    """Return the first line of an error.log."""
    with inside(sweep, str(log.relative_to(sweep))).open(errors="replace") as file:
        return escaping.line(file.read(10_000))


def _times(plans: Sequence[tuple[str, StepSchedule]]) -> list[str]:
    """Return a line for each schedule, except for those of single samples."""
    shared = [(name, plan) for name, plan in plans if not plan.per_sample]
    lines = []
    for name, plan in sorted(shared, key=lambda pair: pair[1].num_steps):
        orders = (
            "" if plan.orders is None else f", orders {'-'.join(map(str, plan.orders.tolist()))}"
        )
        times = ", ".join(f"{t:.4g}" for t in plan.times.tolist())
        lines.append(f"{name} K={plan.num_steps} {plan.kind}{orders}: {times}")
    return lines


def _rounding(plans: Sequence[tuple[str, StepSchedule]]) -> str:
    """Return a line on how far the rounding of a pipeline's clock moves steps, or nothing."""
    moved = []
    for _, plan in plans:
        value = plan.about("native").get("rounding")
        if isinstance(value, float):
            moved.append(value)
    if max(moved, default=0.0) == 0:
        return ""
    return (
        f"rounding: the pipeline's own rounding of t moves the steps by at most {max(moved):.2g}\n"
    )


def _title(folder: Path) -> str:
    run = read_metrics(folder)
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in run.teacher_metrics.items())
    teacher = f"{run.teacher.num_steps}-step teacher" + (f" ({metrics})" if metrics else "")
    return f"{run.model.name}: few-step students against the {teacher}"


def _page(
    folder: Path,
    title: str,
    lines: Sequence[Line],
    plans: Sequence[tuple[str, StepSchedule]],
    teacher: Sequence[float],
    pictures: Mapping[str, np.ndarray],
    ways: Mapping[str, np.ndarray],
    failures: str = "",
) -> str:
    """Return the text of report.html.

    Args:
        folder: The run or the sweep.
        title: Title of the page.
        lines: Lines of the table.
        plans: Names of strategies and their schedules.
        teacher: Times of the teacher's nodes.
        pictures: The arrays of samples.npz.
        ways: The arrays of trajectories.npz.
        failures: The runs that failed, as text.
    """
    # Table.
    kinds = []
    for above, line in zip([None, *lines], lines, strict=False):
        first = above is None or above.result.nfe != line.result.nfe
        kinds.append("best " * (line.rival is line.result) + "first" * first)
    body = [
        FILTER,
        web.table(*columns(lines), kinds),
        f'<p class="note">{html.escape(NOTE)} A click on a column sorts.</p>',
    ]
    if failures:
        body.append(f"<pre>{html.escape(failures)}</pre>")

    # Curves and schedules.
    data: dict[str, Any] = {"curves": {}}
    measured = web.measured(lines)
    if measured:
        data["curves"]["measured"] = measured
        body.append(CURVES.format("Against the number of steps", "measured", "Dashed: baselines."))
    if plans:
        body.append(SCHEDULES)
        data["schedules"] = web.schedules(plans, teacher)
    costs = web.costs(plans)
    if costs:
        data["curves"]["costs"] = costs
        body.append(CURVES.format("Cost per round of the search", "costs", COSTS))
    body += certificate.sections(plans)

    # Pictures.
    results = [line.result for line in lines]
    if pictures:
        data["samples"] = web.samples(pictures, results)
        body.append(SAMPLES.format_map(data["samples"]))
    if ways:
        data["trajectories"] = web.trajectories(ways, results)
        body.append(TRAJECTORIES)

    # Details.
    body.append(DETAILS.format("Times (1 noise, 0 data)", html.escape("\n".join(_times(plans)))))
    if (folder / "config.yaml").exists():
        body.append(DETAILS.format("Configuration", html.escape(read_configuration(folder))))
    return web.page(title, body, data)
