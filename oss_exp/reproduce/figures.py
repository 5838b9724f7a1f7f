"""Counterparts of the paper's figures, drawn from the runs of a table."""

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


def figure_1(paper: Paper, plan: Plan, root: Path) -> plt.Figure:
    """Draw pictures from prompts: the teacher's, and those of 10 steps, from the same noises."""
    folder = _runs(paper, plan, "dataset", "oss_ave")["mscoco512"].folder(root)
    pictures = read_pictures(folder)
    rows = {
        "teacher": pictures["teacher"],
        "oss_ave, 10 steps": pictures["oss_ave K=10"],
        "fm, 10 steps": pictures["fm K=10"],
    }

    # One line of pictures for each schedule.
    count = min(8, len(rows["teacher"]))
    size = (1.1 * count + 1, 1.2 * len(rows))
    figure, axes = plt.subplots(len(rows), count, figsize=size, layout="constrained")
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, fontsize=8)
    return figure


def figure_5(paper: Paper, plan: Plan, root: Path) -> plt.Figure:
    """Plot the times of 20 searched steps for several numbers of teacher steps.

    Lines are means over samples, bands 5 to 95 % of them.
    """
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
    """Plot the 10 steps of every strategy, one panel for each model."""
    cells = _runs(paper, plan, "dataset", "oss_ave")
    size = (3.2 * len(cells), 3.4)
    figure, axes = plt.subplots(1, len(cells), figsize=size, sharey=True, layout="constrained")

    for axis, cell in zip(axes, cells.values(), strict=True):
        # Schedules of 10 steps; ours are drawn over the others.
        model = ""
        for name, schedule in read_schedules(cell.folder(root)):
            if schedule.num_steps == 10:
                model = schedule.about("model")["name"]
                width, order = (1.6, 3) if name.startswith("oss") else (0.9, 2)
                times = schedule.times.numpy()
                axis.plot(times, "o-", ms=3, lw=width, label=name, zorder=order)
        axis.set(title=model, xlabel="student step")
        axis.grid(alpha=0.3)

    axes[0].set_ylabel("time t (1: noise)")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _runs(paper: Paper, plan: Plan, key: str, strategy: str) -> dict[str, Cell]:
    """Return the runs that planned a strategy's schedules, by their rows' value of `key`."""
    runs = {}
    for row, source in zip(paper.rows, plan.sources, strict=True):
        if source is not None and row["strategy"] == strategy:
            runs[str(row[key])] = source.cells[0].lineage()[0]
    return runs


DRAWN: dict[str, list[Callable[[Paper, Plan, Path], plt.Figure]]] = {
    "table_3": [figure_5],
    "table_6": [figure_1, figure_10],
}


def draw(paper: Paper, plan: Plan, root: Path) -> dict[str, bytes]:
    """Draw the figures that belong to a table; returns PNGs by name."""
    pictures = {}
    for function in DRAWN.get(paper.name, ()):
        pictures[function.__name__] = png(function(paper, plan, root))
    return pictures
