"""Turn a run folder, or a sweep of them, into table.md, pictures and one self-contained report.html."""

from __future__ import annotations

import html
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

SCHEDULES = """<h2>Step schedules</h2>
<div class="panels" id="panels"></div><div class="legend" id="legend"></div>
<p class="note">The mouse shows a point's strategy and time. In the legend a click hides or shows a strategy, a double
click shows it alone. Dashed: baselines. Ticks on the left: the teacher's nodes.</p>
<noscript>This plot needs JavaScript; it is also in schedules.png.</noscript>"""
CURVES = """<h2>{}</h2>
<div class="panels" id="{}"></div><div class="legend"></div>
<p class="note">{}</p>"""
COSTS = """Mean distance of the search samples to the teacher after every step, along the path that the dynamic program
found, before it was agreed on by several samples or refined."""
SAMPLES = """<h2>Samples</h2>
<p class="note">The teacher and every schedule on the same noises, at {width} x {height} pixels ({form}); PSNR is of all
images at their own size. A click enlarges a sample, arrow keys go to its neighbours.</p>
<p><label><input type="checkbox" id="errors"> errors</label>
<span class="note">absolute difference to the teacher's pixels: 0 black, 0.5 and above bright</span></p>
<div id="grid"></div>
<noscript>These pictures need JavaScript; they are also in samples.png.</noscript>"""
TRAJECTORIES = """<h2>On the way</h2>
<p class="note">What the network takes for the clean sample when a step calls it, x0 = x - t v, and below it the step's
time t (1 noise, 0 data); of the teacher at some of its steps, of a video the middle frame. At t = 0 the sample itself.
A click on one of the samples shows its way, a click on a step enlarges it, arrow keys go to its neighbours.</p>
<div id="choice"></div><div id="ways"></div>
<noscript>These pictures need JavaScript; they are also in trajectories.npz.</noscript>"""
DETAILS = "<details><summary><h2>{}</h2></summary><pre>{}</pre></details>"


def write(folder: Path) -> None:
    """Everything that <folder> has the data for; prints the table and where the files are.

    All files are made before the first is written: where one cannot be, those of an
    earlier report stay as they are.
    """
    console = PlainConsole()
    plans, shown = read_schedules(folder), list[Path]()
    files: dict[Path, str | bytes] = {}
    teacher = read_teacher_times(folder)
    if plans:
        files[folder / "schedules.png"] = plots.schedules(plans, teacher)
    if (folder / "metrics.json").exists():
        results = read_run(folder)
        lines = with_gains(results)
        pictures, ways = read_pictures(folder), read_ways(folder)
        if pictures:
            files[folder / "samples.png"] = plots.samples(pictures, results)
            if (moving := plots.animation(pictures, results)) is not None:
                files[folder / "samples.gif"] = moving
        files[folder / "table.md"] = markdown(lines) + _rounding(plans)
        files[folder / "report.html"] = _page(
            folder, _title(folder), lines, plans, teacher, pictures, ways
        )
        console.print(terminal(lines, _title(folder)))
        console.print(_rounding(plans), end="", soft_wrap=True)
    elif plans:
        console.print("\n".join(_times(plans)), soft_wrap=True)
    if found := certificate.certified(plans):
        files[folder / "certificate.png"] = plots.certificates(found)
        if folder / "report.html" not in files:
            body = [
                *certificate.sections(plans),
                DETAILS.format("Configuration", html.escape(read_configuration(folder))),
            ]
            files[folder / "report.html"] = web.page(
                "Where a step schedule holds", body, {"curves": {}}
            )
    if (folder / "amplitude.json").exists():
        files[folder / "amplitude.png"] = plots.amplitude(read_amplitude(folder).curves)
        console.print(
            f"calibration: {folder / 'calibration.json'}  (use it: solver.calibration=FILE)",
            soft_wrap=True,
        )
    if (folder / "training.json").exists():
        files[folder / "training.png"] = plots.training(read_training(folder).losses)
        shown = sorted((folder / "samples").glob("step_*.png"))[-1:]
    if (folder / "finetune.json").exists():
        finetuned = read_finetuning(folder)
        files[folder / "stages.png"] = plots.stages(finetuned.stages)
        console.print(stages(finetuned))
    if (folder / "geneval.json").exists():
        made = geneval.files(folder)
        files |= made
        console.print(made[folder / "geneval.md"], soft_wrap=True)
    if plans:
        console.print(f"schedules ({len(plans)}): {folder / 'schedules'}", soft_wrap=True)
    for path, content in files.items():
        write_atomically(path, content)
    for path in [*files, *shown]:
        console.print(f"{path}", soft_wrap=True)


@dataclass(frozen=True)
class Report(Task):
    """Gather the runs of the folder `sweep`, of a --multirun, into one table, picture and page."""

    sweep: str

    def __call__(self, cfg: DictConfig) -> None:
        gather(Path(self.sweep).expanduser())


def gather(sweep: Path) -> None:
    """One table over all runs below `sweep`, and why the others are not in it: they failed, or their files are damaged.

    ValueError where none can be reported.
    """
    logs = [path for path in sorted(sweep.rglob("error.log")) if path.is_file()]
    folders = sorted(path.parent for path in sweep.rglob("metrics.json"))
    if not folders:
        raise FileNotFoundError(
            f"no metrics.json below {sweep.resolve()}; sweep must be the folder of a --multirun"
        )
    failed = {
        _name(sweep, log.parent): _reason(sweep, log) for log in logs if log.parent not in folders
    }
    runs: list[_Run] = []
    for folder in folders:
        try:
            runs.append(_read(folder, _name(sweep, folder)))
        except (OSError, ValueError) as error:
            failed[_name(sweep, folder)] = escaping.line(str(error))
    told = [f"Failed, {len(failed)} of {len(runs) + len(failed)} runs:"] * bool(failed)
    told += [f"- {run}: {why}" for run, why in failed.items()]
    if not runs:
        raise ValueError("\n".join([f"no run below {sweep} can be reported", *told]))

    lines = with_gains([result for run in runs for result in run.results])
    times_seen = Counter((name, plan.num_steps) for run in runs for name, plan in run.plans)
    named = [
        (name if times_seen[name, plan.num_steps] == 1 else f"{name} (run {run.name})", plan)
        for run in runs
        for name, plan in run.plans
    ]
    written = (
        [told[0], "", *(f"- {escaping.markdown(each[2:])}" for each in told[1:])] if told else []
    )
    teacher = runs[0].teacher
    files: dict[Path, str | bytes] = {
        sweep / "schedules.png": plots.schedules(named, teacher),
        sweep / "table.md": markdown(lines) + "\n".join(["", *written, ""] if written else []),
        sweep / "report.html": _page(
            sweep, f"Sweep of {len(runs)} runs", lines, named, teacher, {}, {}, "\n".join(told)
        ),
    }
    for path, content in files.items():
        write_atomically(path, content)
    console = PlainConsole()
    console.print(terminal(lines, f"{len(runs)} runs in {sweep}"))
    if told:
        console.print("\n".join(told), soft_wrap=True)
    console.print(f"{sweep / 'table.md'}\n{sweep / 'report.html'}", soft_wrap=True)


class _Run(NamedTuple):
    """A run of a sweep. teacher: the nodes of its grid."""

    name: str
    results: list[Result]
    plans: list[tuple[str, StepSchedule]]
    teacher: list[float]


def _read(folder: Path, name: str) -> _Run:
    """Read what a sweep's report takes of a run. ValueError or OSError where it is not whole."""
    run = _Run(name, read_run(folder, name), read_schedules(folder), read_teacher_times(folder))
    if not run.plans:
        raise ValueError(f"{folder / 'schedules'} has no schedules; restore them, or run it again")
    return run


def _name(sweep: Path, folder: Path) -> str:
    return str(folder.relative_to(sweep))


def _reason(sweep: Path, log: Path) -> str:
    """The first line of an error.log."""
    with inside(sweep, str(log.relative_to(sweep))).open(errors="replace") as file:
        return escaping.line(file.read(10_000))


def _times(plans: Sequence[tuple[str, StepSchedule]]) -> list[str]:
    """One line a schedule; those of single samples are only in their files."""
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
    """A line on how far a pipeline's rounding of its clock moves the times of its schedules; empty for other models."""
    moved = [
        value
        for _, plan in plans
        if isinstance(value := plan.about("native").get("rounding"), float)
    ]
    return (
        f"rounding: the pipeline's own rounding of t moves the steps by at most {max(moved):.2g}\n"
        if moved
        else ""
    )


def _title(folder: Path) -> str:
    run = read_metrics(folder)
    teacher = ", ".join(f"{name} {value:.4g}" for name, value in run.teacher_metrics.items())
    return (
        f"{run.model.name}: few-step students against the {run.teacher.num_steps}-step teacher"
        + f" ({teacher})" * bool(teacher)
    )


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
    """The text of report.html. teacher: the nodes of its grid; pictures, ways: of samples.npz and trajectories.npz."""
    kinds = []
    for above, line in zip([None, *lines], lines, strict=False):
        first = above is None or above.result.nfe != line.result.nfe
        kinds.append("best " * (line.rival is line.result) + "first" * first)
    body = [
        web.table(*columns(lines), kinds),
        f'<p class="note">{html.escape(NOTE)} A click on a column sorts.</p>',
    ]
    if failures:
        body.append(f"<pre>{html.escape(failures)}</pre>")
    data: dict[str, Any] = {"curves": {}}
    if measured := web.measured(lines):
        data["curves"]["measured"] = measured
        body.append(CURVES.format("Against the number of steps", "measured", "Dashed: baselines."))
    if plans:
        body.append(SCHEDULES)
        data["schedules"] = web.schedules(plans, teacher)
    if costs := web.costs(plans):
        data["curves"]["costs"] = costs
        body.append(CURVES.format("Cost per round of the search", "costs", COSTS))
    body += certificate.sections(plans)
    results = [line.result for line in lines]
    if pictures:
        shown = data["samples"] = web.samples(pictures, results)
        body.append(SAMPLES.format_map(shown))
    if ways:
        data["trajectories"] = web.trajectories(ways, results)
        body.append(TRAJECTORIES)
    body.append(DETAILS.format("Times (1 noise, 0 data)", html.escape("\n".join(_times(plans)))))
    if (folder / "config.yaml").exists():
        body.append(DETAILS.format("Configuration", html.escape(read_configuration(folder))))
    return web.page(title, body, data)
