"""Pictures that stand for figures of the paper, drawn from the runs of a table, without numbers of the paper's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from oss_exp.report.plots import png
from oss_exp.report.records import read_pictures
from oss_exp.report.results import read_schedules
from oss_exp.reproduce.cells import Cell
from oss_exp.reproduce.paper import Paper
from oss_exp.reproduce.plans import Plan


def _runs(paper: Paper, plan: Plan, key: str, strategy: str) -> dict[str, Cell]:
    """What the rows of a strategy say under `key` -> the run that planned it."""
    rows = [(row, source) for row, source in zip(paper.rows, plan.sources, strict=True) if source]
    return {
        str(row[key]): source.cells[0].lineage()[0]
        for row, source in rows
        if row["strategy"] == strategy
    }


def figure_1(paper: Paper, plan: Plan, root: Path) -> plt.Figure:
    """Pictures from prompts: of the teacher, and of 10 steps by OSS-ave and at uniform times, from the same noises."""
    folder = _runs(paper, plan, "dataset", "oss_ave")["mscoco512"].folder(root)
    found = read_pictures(folder)
    rows = {
        "teacher": found["teacher"],
        **{f"{name}, 10 steps": found[f"{name} K=10"] for name in ("oss_ave", "fm")},
    }
    count = min(8, len(rows["teacher"]))
    figure, axes = plt.subplots(
        len(rows), count, figsize=(1.1 * count + 1, 1.2 * len(rows)), layout="constrained"
    )
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, fontsize=8)
    return figure


def figure_5(paper: Paper, plan: Plan, root: Path) -> plt.Figure:
    """Times of 20 searched steps for several numbers of teacher steps; lines: mean of the samples, bands: 5 to 95 %."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for teacher, cell in _runs(paper, plan, "search_teacher_steps", "oss").items():
        (times,) = [
            plan.times.numpy() for name, plan in read_schedules(cell.folder(root)) if name == "oss"
        ]
        (line,) = axis.plot(times.mean(0), label=f"{teacher} teacher steps", lw=1.2)
        low, high = np.quantile(times, (0.05, 0.95), axis=0)
        axis.fill_between(range(times.shape[1]), low, high, alpha=0.12, color=line.get_color())
    axis.set(xlabel="student step", ylabel="time t (1: noise)", xticks=range(0, 21, 5))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return figure


def figure_10(paper: Paper, plan: Plan, root: Path) -> plt.Figure:
    """Where every strategy puts its 10 steps, a panel a model, of 100-step teachers."""
    cells = _runs(paper, plan, "dataset", "oss_ave")
    figure, axes = plt.subplots(
        1, len(cells), figsize=(3.2 * len(cells), 3.4), sharey=True, layout="constrained"
    )
    for axis, cell in zip(axes, cells.values(), strict=True):
        plans = [
            (name, plan) for name, plan in read_schedules(cell.folder(root)) if plan.num_steps == 10
        ]
        for name, each in plans:
            ours = name.startswith("oss")
            axis.plot(
                each.times.numpy(),
                "o-",
                ms=3,
                lw=1.6 if ours else 0.9,
                label=name,
                zorder=3 if ours else 2,
            )
        axis.set(title=plans[0][1].about("model")["name"], xlabel="student step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time t (1: noise)")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


DRAWN: dict[str, list[Callable[[Paper, Plan, Path], plt.Figure]]] = {
    "table_3": [figure_5],
    "table_6": [figure_1, figure_10],
}


def draw(paper: Paper, plan: Plan, root: Path) -> dict[str, bytes]:
    """Name of the figure -> PNG."""
    return {
        function.__name__: png(function(paper, plan, root))
        for function in DRAWN.get(paper.name, ())
    }
