"""Every strategy beside every other: the same solver, teacher, search samples and held-out noises for all.

python -m experiments.leaderboard.run                      # all networks: days of a core
python -m experiments.leaderboard.run unet_fashion         # one of them
python -m experiments.leaderboard.run unet_fashion --steps 5 10 20
python -m experiments.leaderboard.run unet_fashion --images 10000   # FID and the like of so many samples

A run that was stopped goes on with the same command. Beside this file: a table (Markdown, LaTeX) and pictures for each
network, and page.html with all tables, which sort by any column.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from hydra.utils import instantiate

import oss_exp
from experiments.common import configuration, finished, keep, png, table
from oss_exp.data.noise import HELD_OUT, NoiseDataset
from oss_exp.escaping import latex
from oss_exp.evaluation.comparison import Result
from oss_exp.evaluation.psnr import Interval, psnr
from oss_exp.files import write_atomically
from oss_exp.models.base import Model
from oss_exp.noise import FlowSchedule
from oss_exp.report import web
from oss_exp.report.results import read_run
from oss_exp.schedule import FittedSteps, StepSchedule
from oss_exp.solvers.heun import Heun

BUDGETS = (3, 4, 5, 6, 8, 10, 15, 20)
TABULATED = (5, 6, 8, 10, 15)  # budgets for which NeuralSolver published tables
PROMPTS = ["data=prompts", "data.prompts=coloured_fashion.txt"]
NETWORKS = {
    "unet_fashion": [],
    "unet_fashion, guidance 3": ["model.guidance.scale=3"],
    "dit_fashion": [],
    "dit_fashion, guidance 3": ["model.guidance.scale=3"],
    "flux_fashion": PROMPTS,
    "flux_fashion, guidance 3": [*PROMPTS, "model.guidance.scale=3"],
    "mar_fashion": ["noise_schedule=cosine"],
}
SHARED = [
    "solver=dpm_solver_pp",
    "solver.order=3",
    "data.search_samples=32",
]  # as experiment=leaderboard has them
METRICS = "metric=[fid,kid,precision_recall,class_agreement]"
COMMON_STEPS, COMMON_NOISES = 200, 64  # of Heun, 400 calls; it judges the first held-out noises
HEADER = [
    "strategy",
    "K",
    "NFE",
    "PSNR, dB",
    "gain, dB",
    "worst 1 %",
    "PSNR to Heun's 400 calls",
    "parameters",
]
OURS = ("oss_shared", "oss_fit", "oss_fit_polished", "oss_best")


@dataclass(frozen=True)
class Entry:
    """A measured schedule, its error to the common teacher (None: not sampled), and its fitted parameters."""

    result: Result
    common: Interval | None
    parameters: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "networks", nargs="*", default=list(NETWORKS), metavar="network", help=" | ".join(NETWORKS)
    )
    parser.add_argument("--steps", nargs="+", type=int, default=BUDGETS, metavar="K")
    parser.add_argument("--images", type=int, default=256, help="held-out samples; 10000 for FID")
    options = parser.parse_args()
    for name in options.networks:
        entries = entries_of(name, options.steps, options.images)
        file = name.replace(", guidance ", "_")
        header, rows = cells(entries)
        keep(__file__, f"{file}.md", table(header, rows))
        keep(__file__, f"{file}.tex", latex_table(header, rows))
        keep(__file__, f"{file}.png", picture(entries, name))
    write_atomically(Path(__file__).with_name("page.html"), page())


# --------------------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------------------


def entries_of(name: str, steps: Sequence[int], images: int) -> list[Entry]:
    """Every strategy of experiment=leaderboard; NeuralSolver, published for some budgets, in a run of its own."""
    settings = [
        f"model={name.split(',')[0]}",
        *SHARED,
        *NETWORKS[name],
        f"data.eval_samples={images}",
    ]
    settings += [METRICS] * (images >= 10_000)
    of_run = f"leaderboard/{name.replace(', guidance ', '_')}_{'_'.join(map(str, steps))}_{images}"
    folders = [
        finished(
            of_run, "experiment=leaderboard", *settings, f"num_steps={[*steps]}".replace(" ", "")
        )
    ]
    if known := [k for k in steps if k in TABULATED]:
        only = [f"num_steps={known}".replace(" ", ""), "stepsize=neural_solver"]
        folders.append(finished(f"{of_run}_tables", *settings, *only))
    results, plans = {}, {}
    for folder in folders:
        for result in read_run(folder):
            key = result.strategy, result.num_steps
            results[key] = result
            plans[key] = StepSchedule.load(
                folder / "schedules" / f"{result.strategy}_{result.num_steps}.json"
            )
    common = to_common_teacher(settings, plans)
    return [
        Entry(result, common.get(key), parameters(plans[key])) for key, result in results.items()
    ]


@torch.no_grad()
def to_common_teacher(settings: Sequence[str], plans: dict[tuple[str, int], StepSchedule]) -> dict:
    """{run: PSNR to Heun's many calls}: a teacher that is no student's own. Of MAR and of prompts there is none."""
    cfg = configuration(*settings)
    model: Model = instantiate(cfg.model)
    if "mar" in model.name or "prompts" in cfg.data:
        return {}
    data = NoiseDataset(0, HELD_OUT, COMMON_NOISES, model.event_shape, None)
    noise = torch.stack([data[i]["noise"] for i in range(COMMON_NOISES)])
    teacher = StepSchedule(FlowSchedule().nodes(COMMON_STEPS))
    truth = model.decode(oss_exp.sample(model, noise, teacher, solver=Heun()))
    return {
        run: Interval.of(psnr(model.decode(oss_exp.sample(model, noise, steps)), truth).numpy())
        for run, steps in plans.items()
    }


def parameters(steps: StepSchedule) -> int:
    """Numbers that were chosen: times between the ends, orders, weights."""
    count = steps.num_steps - (steps.start.kind == "pinned")
    if isinstance(steps.steps, FittedSteps):
        return count + int((steps.steps.weights != 0).sum())
    return count + (0 if steps.orders is None else steps.num_steps)


# --------------------------------------------------------------------------------------------------------------
# Showing
# --------------------------------------------------------------------------------------------------------------


def cells(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """By calls, then best first; gains are paired differences to the best baseline."""
    more = list(dict.fromkeys(name for entry in entries for name in entry.result.metrics))
    rows = []
    for entry in sorted(entries, key=lambda each: (each.result.nfe, -each.result.psnr.mean)):
        result = entry.result
        rivals = [e.result for e in entries if e.result.baseline and e.result.nfe == result.nfe]
        rival = max(rivals, key=lambda each: each.psnr.mean)
        gain = Interval.of(
            np.array([value - rival.values[i] for i, value in result.values.items()])
        )
        calls, seconds = (
            result.planning.get(key, 0) for key in ("network_calls_per_sample", "seconds")
        )
        rows.append(
            [
                result.strategy,
                str(result.num_steps),
                str(result.nfe),
                str(result.psnr),
                "*" if result is rival else f"{'+' * (gain.mean >= 0)}{gain}",
                f"{result.worst:.2f}",
                "-" if entry.common is None else str(entry.common),
                str(entry.parameters),
                *(
                    f"{result.metrics[name]:.4g}" if name in result.metrics else "-"
                    for name in more
                ),
                f"{calls:.0f} calls, {seconds:.0f} s",
            ]
        )
    return [*HEADER, *more, "planning for all K"], rows


def latex_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        " & ".join(latex(cell).replace("±", r"$\pm$") for cell in row) + r" \\"
        for row in (header, *rows)
    ]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"
    return "\n".join(
        [begin, r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", r"\end{tabular}", ""]
    )


def picture(entries: Sequence[Entry], title: str) -> bytes:
    """What planning buys (PSNR against its seconds, at a middle budget), and PSNR or FID against calls."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    figure.suptitle(title)

    # Planning.
    results = [entry.result for entry in entries]
    middle = min({result.num_steps for result in results}, key=lambda k: abs(k - 10))
    for result in results:
        if result.num_steps == middle:
            at = max(float(result.planning.get("seconds", 0)), 0.1), result.psnr.mean
            color = (
                "tab:red"
                if result.strategy in OURS
                else "tab:gray"
                if result.baseline
                else "tab:blue"
            )
            left.plot(*at, "o", color=color)
            left.annotate(
                result.strategy, at, xytext=(4, 2), textcoords="offset points", fontsize=7
            )
    left.margins(x=0.2)  # for the names
    left.set(
        xscale="log", xlabel="seconds of planning, all K together", ylabel=f"PSNR, dB, K = {middle}"
    )

    # Calls.
    curves: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda each: each.nfe):
        curves.setdefault(result.strategy, []).append(result)
    by_fid = all("fid" in result.metrics for result in results)
    best = sorted(curves, key=lambda name: -np.mean([result.psnr.mean for result in curves[name]]))[
        :10
    ]
    for strategy in best:
        heights = [
            result.metrics["fid"] if by_fid else result.psnr.mean for result in curves[strategy]
        ]
        right.plot(
            [result.nfe for result in curves[strategy]], heights, marker="o", ms=3, label=strategy
        )
    right.set(xlabel="network calls of an image", ylabel="FID" if by_fid else "PSNR, dB")
    right.set_yscale("log" if by_fid else "linear")
    right.legend(fontsize=7, title="the ten best")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return png(figure)


def page() -> str:
    """All tables that were made, as the Markdown files beside this one have them."""
    body: list[str] = []
    for file in sorted(Path(__file__).parent.glob("*.md")):
        lines = [
            line.strip("| ").split(" | ")
            for line in file.read_text().splitlines()
            if line.startswith("|")
        ]
        if file.name != "README.md" and lines:
            body += [f"<h2>{file.stem}</h2>", web.table(lines[0], lines[2:])]
    return web.page("Leaderboard", body, {})


if __name__ == "__main__":
    main()
