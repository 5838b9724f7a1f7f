"""Turn a run folder, or a sweep of them, into table.md, pictures and one self-contained report.html."""

from __future__ import annotations

import base64
import html
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from oss_exp.files import read_json, write_atomically
from oss_exp.report import geneval, plots
from oss_exp.report.results import Line, compare, read_run, read_schedules
from oss_exp.report.table import NOTE, columns, markdown, stages, terminal
from oss_exp.steps import StepSchedule

STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}tr.best{font-weight:600}tr.first td{border-top:2px solid #888}
img{max-width:100%}pre{background:#f6f6f6;padding:1em;overflow:auto}"""


def write(folder: Path) -> None:
    """Everything that <folder> has the data for; prints the table and where the files are."""
    console = _console()
    plans = read_schedules(folder)
    made = []
    if plans:
        made.append(write_atomically(folder / "schedules.png", plots.schedules(plans, _teacher_nodes(folder))))
    if (folder / "metrics.json").exists():
        results = read_run(folder)
        lines = compare(results)
        with np.load(folder / "samples.npz") as file:
            pictures = dict(file)
        made.append(write_atomically(folder / "samples.png", plots.samples(pictures, results)))
        if (moving := plots.animation(pictures, results)) is not None:
            made.append(write_atomically(folder / "samples.gif", moving))
        made.append(write_atomically(folder / "table.md", markdown(lines)))
        shown = "samples.png" if moving is None else "samples.gif"
        made.append(_page(folder, _title(folder), lines, plans, ["schedules.png", shown]))
        console.print(terminal(lines, _title(folder)))
    elif plans:
        console.print("\n".join(_times(plans)), soft_wrap=True)
    if (folder / "amplitude.json").exists():
        curves = read_json(folder / "amplitude.json", "amplitudes of a run")["curves"]
        made.append(write_atomically(folder / "amplitude.png", plots.amplitude(curves)))
        console.print(f"calibration: {folder / 'calibration.json'}  (use it: solver.calibration=FILE)", soft_wrap=True)
    if (folder / "training.json").exists():
        made.append(write_atomically(folder / "training.png", plots.training(_training(folder))))
        made += sorted((folder / "samples").glob("step_*.png"))[-1:]
    if (folder / "finetune.json").exists():
        finetuned = read_json(folder / "finetune.json", "stages of a finetuning")
        made.append(write_atomically(folder / "stages.png", plots.stages(finetuned["stages"])))
        console.print(stages(finetuned))
    if (folder / "geneval.json").exists():
        made += geneval.write(folder)
        console.print((folder / "geneval.md").read_text(), soft_wrap=True)
    if plans:
        console.print(f"schedules ({len(plans)}): {folder / 'schedules'}", soft_wrap=True)
    for path in made:
        console.print(f"{path}", soft_wrap=True)


def gather(cfg: DictConfig) -> None:
    """task=report: one table over all runs below `sweep`."""
    if OmegaConf.is_missing(cfg, "sweep"):
        raise ValueError("sweep is not set; add sweep=FOLDER, the folder of a --multirun")
    sweep = Path(cfg.sweep).expanduser()
    runs = sorted(path.parent for path in sweep.rglob("metrics.json"))
    if not runs:
        raise FileNotFoundError(f"no metrics.json below {sweep.resolve()}; sweep must be the folder of a --multirun")
    lines = compare([result for run in runs for result in read_run(run, str(run.relative_to(sweep)))])
    plans = [(run, name, plan) for run in runs for name, plan in read_schedules(run)]
    times_seen = Counter((name, plan.num_steps) for _, name, plan in plans)
    named = [
        (name if times_seen[name, plan.num_steps] == 1 else f"{name} (run {run.relative_to(sweep)})", plan)
        for run, name, plan in plans
    ]
    write_atomically(sweep / "table.md", markdown(lines))
    write_atomically(sweep / "schedules.png", plots.schedules(named, _teacher_nodes(runs[0])))
    page = _page(sweep, f"Sweep of {len(runs)} runs", lines, named, ["schedules.png"])
    console = _console()
    console.print(terminal(lines, f"{len(runs)} runs in {sweep}"))
    console.print(f"{sweep / 'table.md'}\n{page}", soft_wrap=True)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120)  # in a file or a pipe, wide enough for the table


def _teacher_nodes(folder: Path) -> Sequence[float]:
    cfg = OmegaConf.load(folder / "config.yaml")
    return instantiate(cfg.noise_schedule).nodes(cfg.num_teacher_steps).tolist()


def _training(folder: Path) -> list[float]:
    return read_json(folder / "training.json", "losses of a training run")["losses"]


def _times(plans: Sequence[tuple[str, StepSchedule]]) -> list[str]:
    """One line a schedule; those of single samples are only in their files."""
    shared = [(name, plan) for name, plan in plans if plan.samples is None]
    lines = []
    for name, plan in sorted(shared, key=lambda pair: pair[1].num_steps):
        steps = "" if plan.orders is None else f", orders {'-'.join(map(str, plan.orders.tolist()))}"
        steps = steps if plan.weights is None else ", fitted steps"
        lines.append(
            f"{name} K={plan.num_steps} {plan.start}{steps}: " + ", ".join(f"{t:.4g}" for t in plan.times.tolist())
        )
    return lines


def _title(folder: Path) -> str:
    run = read_json(folder / "metrics.json", "metrics of a run")
    teacher = ", ".join(f"{name} {value:.4g}" for name, value in run["teacher_metrics"].items())
    return (
        f"{run['model']['name']}: few-step students against the {run['teacher']['num_steps']}-step teacher"
        + f" ({teacher})" * bool(teacher)
    )


def _page(
    folder: Path,
    title: str,
    lines: Sequence[Line],
    plans: Sequence[tuple[str, StepSchedule]],
    pictures: Sequence[str],
) -> Path:
    header, cells = columns(lines)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        "<table><tr>",
        *(f"<th>{html.escape(name)}</th>" for name in header),
        "</tr>",
    ]
    previous = None
    for line, row in zip(lines, cells, strict=True):
        kind = "best " * (line.rival is line.result) + "first" * (line.result.nfe != previous)
        previous = line.result.nfe
        body.append(f'<tr class="{kind}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    body.append(f"</table><p>{html.escape(NOTE)}</p>")
    for name in pictures:
        data = base64.b64encode((folder / name).read_bytes()).decode()
        body.append(
            f'<h2>{html.escape(Path(name).stem)}</h2><img alt="{name}" src="data:image/{name[-3:]};base64,{data}">'
        )
    body.append(f"<h2>times (1 noise, 0 data)</h2><pre>{html.escape(chr(10).join(_times(plans)))}</pre>")
    if (folder / "config.yaml").exists():
        body.append(f"<h2>configuration</h2><pre>{html.escape((folder / 'config.yaml').read_text())}</pre>")
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>\n"
    return write_atomically(folder / "report.html", page + "\n".join(body) + "\n")
