"""Every strategy with the same solver, teacher, search samples and held-out noises.

python -m experiments.leaderboard.run                      # all networks: days of a core
python -m experiments.leaderboard.run unet_fashion         # one of them
python -m experiments.leaderboard.run unet_fashion --steps 5 10 20
python -m experiments.leaderboard.run unet_fashion --steps 5 10 20 --images 10000   # and FID

PSNR is measured on 256 held-out noises, the other metrics on as many as `--images` says, with the
same schedules. The same command continues a run that was stopped, and finished runs are kept: to
measure our strategies anew, remove their folders (..._ours and ..._ours_*). It writes,
beside this file, a table (Markdown, LaTeX) and a picture for each network and its budgets, and
page.html with all tables, sortable by any column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import oss_exp
from experiments.common import OUTPUTS, command_line, configuration, finished, keep, png, table
from oss_exp.data.noise import HELD_OUT, NoiseDataset
from oss_exp.escaping import latex
from oss_exp.evaluation.comparison import Result
from oss_exp.evaluation.psnr import Interval, psnr
from oss_exp.files import write_atomically
from oss_exp.noise import FlowSchedule
from oss_exp.report import web
from oss_exp.report.records import read_metrics
from oss_exp.report.results import read_run
from oss_exp.schedule import FittedSteps, StepSchedule
from oss_exp.solvers.heun import Heun
from oss_exp.tasks.run import build_model

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
SHARED = [  # also those of experiment=leaderboard
    "solver=dpm_solver_pp",
    "solver.order=3",
    "data.search_samples=32",
]
METRICS = ["metric=[fid,kid,precision_recall,class_agreement]", "data.batch_size=200"]
TEACHER = ("teacher", 100)  # strategy and number of steps
COMMON_STEPS = 200  # of the common teacher, Heun: 400 calls
COMMON_NOISES = 64  # the first of the held-out noises
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
OURS = ("oss_ave", "oss_shared", "oss_fit", "oss_fit_polished", "oss_best")


@dataclass(frozen=True)
class Entry:
    """A measured schedule.

    Attributes:
        result: Its measurements.
        common: Its PSNR to the common teacher; None where there is no such teacher.
        parameters: How many numbers were chosen for it.
        metrics: Its other metrics by name.
    """

    result: Result
    common: Interval | None
    parameters: int
    metrics: Mapping[str, float]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "networks", nargs="*", default=list(NETWORKS), metavar="network", help=" | ".join(NETWORKS)
    )
    parser.add_argument("--steps", nargs="+", type=int, default=BUDGETS, metavar="K")
    parser.add_argument("--images", type=int, help="samples of FID; left out: no FID")
    options = parser.parse_args()
    for name in options.networks:
        entries, teacher = entries_of(name, options.steps, options.images)
        file = file_name(name, options.steps)
        header, rows = cells(entries)
        notes = ["", verdict(entries)]
        if teacher:
            notes.append(f"Metrics of {options.images} samples; the teacher's: {listed(teacher)}.")
        keep(__file__, f"{file}.md", table(header, rows) + "\n".join([*notes, ""]))
        keep(__file__, f"{file}.tex", latex_table(header, rows))
        keep(__file__, f"{file}.png", picture(entries, name))
    write_atomically(Path(__file__).with_name("page.html"), page())


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def file_name(network: str, steps: Sequence[int]) -> str:
    """Return the name of a network and of its budgets as one word."""
    return f"{network.replace(', guidance ', '_guidance_')}_at_{'_'.join(map(str, steps))}"


def listed(metrics: Mapping[str, float]) -> str:
    """Return names and values in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def entries_of(
    name: str, steps: Sequence[int], images: int | None
) -> tuple[list[Entry], Mapping[str, float]]:
    """Measure every strategy of experiment=leaderboard on a network.

    Our strategies have a run of their own, so that they can be measured anew without their peers,
    and NeuralSolver, which has published tables for some budgets only.

    Returns:
        The measured schedules, and the teacher's FID and the like, if there are any.
    """
    network = [f"model={name.split(',')[0]}", *SHARED, *NETWORKS[name]]
    settings = [*network, "data.eval_samples=256"]

    # Runs.
    run = f"leaderboard/{file_name(name, steps)}"
    budgets = f"num_steps={[*steps]}".replace(" ", "")
    strategies = configuration("experiment=leaderboard").stepsize
    no_ours = [f"~stepsize.{strategy}" for strategy in OURS]
    no_peers = [f"~stepsize.{strategy}" for strategy in strategies if strategy not in OURS]
    folders = [
        finished(f"{run}_peers", "experiment=leaderboard", *settings, budgets, *no_ours),
        finished(f"{run}_ours", "experiment=leaderboard", *settings, budgets, *no_peers),
    ]
    if tabulated := [k for k in steps if k in TABULATED]:
        budgets = f"num_steps={tabulated}".replace(" ", "")
        folders.append(finished(f"{run}_tables", *settings, budgets, "stepsize=neural_solver"))

    # Results and schedules.
    results = {}
    schedules = {}
    for folder in folders:
        for result in read_run(folder):
            key = (result.strategy, result.num_steps)
            results[key] = result
            file = folder / "schedules" / f"{result.strategy}_{result.num_steps}.json"
            schedules[key] = StepSchedule.load(file)

    # Entries.
    common = to_common_teacher(settings, schedules)
    metrics = quality(run, network, schedules, images)
    entries = []
    for key, result in results.items():
        count = parameters(schedules[key])
        entries.append(Entry(result, common.get(key), count, metrics.get(key, {})))
    return entries, metrics.get(TEACHER, {})


def quality(
    run: str,
    network: Sequence[str],
    schedules: dict[tuple[str, int], StepSchedule],
    images: int | None,
) -> dict[tuple[str, int], Mapping[str, float]]:
    """Return the other metrics of each schedule, and of the teacher under TEACHER."""
    if images is None:
        return {}
    for (strategy, k), steps in schedules.items():
        part = "ours" if strategy in OURS else "peers"
        steps.save(OUTPUTS / f"{run}_{part}_all" / f"{strategy}_{k}.json")

    # Of students, and of the teacher.
    metrics: dict[tuple[str, int], Mapping[str, float]] = {}
    for part in ("peers", "ours"):
        saved = f"task.schedule={OUTPUTS / f'{run}_{part}_all'}"
        settings = ["task=evaluate", saved, f"data.eval_samples={images}", *METRICS]
        folder = finished(f"{run}_{part}_{images}_images", *network, *settings)
        metrics[TEACHER] = read_metrics(folder).teacher_metrics
        for result in read_run(folder):
            metrics[result.strategy, result.num_steps] = result.metrics
    return metrics


@torch.no_grad()
def to_common_teacher(
    settings: Sequence[str], schedules: dict[tuple[str, int], StepSchedule]
) -> dict[tuple[str, int], Interval]:
    """Return the PSNR of each schedule to many steps of Heun, which no student uses.

    It is empty for MAR, whose diffusion is of single tokens.
    """
    model = build_model(configuration(*settings))
    if "mar" in model.name:
        return {}
    condition = torch.arange(model.num_conditions) if model.num_conditions else None

    # Teacher.
    data = NoiseDataset(0, HELD_OUT, COMMON_NOISES, model.event_shape, None)
    noise = torch.stack([data[i]["noise"] for i in range(COMMON_NOISES)])
    teacher = StepSchedule(FlowSchedule().nodes(COMMON_STEPS))
    truth = model.decode(oss_exp.sample(model, noise, teacher, solver=Heun(), condition=condition))

    # Students.
    intervals = {}
    for key, steps in schedules.items():
        images = model.decode(oss_exp.sample(model, noise, steps, condition=condition))
        intervals[key] = Interval.of(psnr(images, truth).numpy())
    return intervals


def parameters(steps: StepSchedule) -> int:
    """Count the numbers that were chosen: times between the ends, orders, weights."""
    count = steps.num_steps - (steps.start.kind == "pinned")
    if isinstance(steps.steps, FittedSteps):
        return count + int((steps.steps.weights != 0).sum())
    return count + (0 if steps.orders is None else steps.num_steps)


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def cells(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows, sorted by calls and then best first."""
    metrics = list(dict.fromkeys(name for entry in entries for name in entry.metrics))
    rows = []
    for entry in sorted(entries, key=lambda entry: (entry.result.nfe, -entry.result.psnr.mean)):
        result = entry.result
        row = [result.strategy, str(result.num_steps), str(result.nfe), str(result.psnr)]
        row.append(gain(result, best_baseline(entries, result.nfe)))
        row.append(f"{result.worst:.2f}")
        row.append("-" if entry.common is None else str(entry.common))
        row.append(str(entry.parameters))
        for name in metrics:
            row.append(f"{entry.metrics[name]:.4g}" if name in entry.metrics else "-")

        calls = result.planning.get("network_calls_per_sample", 0)
        seconds = result.planning.get("seconds", 0)
        rows.append([*row, f"{calls:.0f} calls, {seconds:.0f} s"])
    return [*HEADER, *metrics, "planning for all K"], rows


def best_baseline(entries: Sequence[Entry], nfe: int) -> Result:
    """Return the best baseline of so many calls."""
    results = [entry.result for entry in entries]
    baselines = [result for result in results if result.baseline and result.nfe == nfe]
    return max(baselines, key=lambda result: result.psnr.mean)


def gain(result: Result, baseline: Result) -> str:
    """Return the mean paired difference to the baseline, or a star for the baseline itself."""
    if result is baseline:
        return "*"
    interval = difference(result, baseline)
    return f"{'+' * (interval.mean >= 0)}{interval}"


def difference(result: Result, baseline: Result) -> Interval:
    """Return the mean paired difference in dB."""
    pairs = [value - baseline.values[index] for index, value in result.values.items()]
    return Interval.of(np.array(pairs))


def verdict(entries: Sequence[Entry]) -> str:
    """Say in how many pairs ours is significantly below a baseline of as many calls."""
    results = [entry.result for entry in entries]
    sentences = []
    for name in OURS:
        count = 0
        below = []
        for ours, other in product(results, results):
            if ours.strategy != name or not other.baseline or other.nfe != ours.nfe:
                continue
            count += 1
            if (difference(ours, other).high or 0) < 0:
                below.append(f"{other.strategy} at {ours.num_steps}")
        text = f"`{name}` is significantly below a baseline in {len(below)} of {count} pairs"
        sentences.append(f"{text} ({', '.join(below)})." if below else f"{text}.")
    return " ".join(sentences)


def latex_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for row in (header, *rows):
        texts = [latex(cell).replace("±", r"$\pm$") for cell in row]
        lines.append(" & ".join(texts) + r" \\")
    begin = rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"
    parts = [begin, r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", r"\end{tabular}", ""]
    return "\n".join(parts)


def page() -> str:
    """Return a page with the tables of all Markdown files beside this one."""
    body: list[str] = []
    for file in sorted(Path(__file__).parent.glob("*.md")):
        lines = [line for line in file.read_text().splitlines() if line.startswith("|")]
        if file.name != "README.md" and lines:
            rows = [line.strip("| ").split(" | ") for line in lines]
            body += [f"<h2>{file.stem}</h2>", web.table(rows[0], rows[2:])]
    return web.page("Leaderboard", body, {})


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------


def picture(entries: Sequence[Entry], title: str) -> bytes:
    """Draw PSNR against the seconds of planning, and PSNR or FID against calls."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    figure.suptitle(title)
    draw_planning(axes[0], [entry.result for entry in entries])
    draw_calls(axes[1], entries)
    for axis in axes:
        axis.grid(alpha=0.3)
    return png(figure)


def draw_planning(axis: plt.Axes, results: Sequence[Result]) -> None:
    """Draw a dot for every strategy, at a middle budget, and the names apart from each other."""
    middle = min({result.num_steps for result in results}, key=lambda k: abs(k - 10))
    results = [result for result in results if result.num_steps == middle]
    means = [result.psnr.mean for result in results]
    gap = (max(means) - min(means)) / 35  # dB that a name takes

    named: list[tuple[float, float]] = []
    for result in sorted(results, key=lambda result: result.psnr.mean):
        color = "tab:gray" if result.baseline else "tab:red"
        seconds = max(float(result.planning.get("seconds", 0)), 0.1)
        axis.plot(seconds, result.psnr.mean, "o", ms=5, color=color)

        # A name stands above those of about as many seconds.
        near = [height + gap for x, height in named if 1 / 5 < x / seconds < 5]
        height = max([result.psnr.mean, *near])
        axis.text(1.2 * seconds, height, result.strategy, fontsize=7, va="center")
        named.append((seconds, height))
    axis.margins(x=0.3)  # for the names
    axis.set(xscale="log", xlabel="seconds of planning, all K together")
    axis.set(ylabel=f"PSNR, dB, K = {middle}")


def draw_calls(axis: plt.Axes, entries: Sequence[Entry]) -> None:
    """Draw a line for each of the ten best strategies, by FID if it was measured."""
    by_fid = all("fid" in entry.metrics for entry in entries)

    # Lines.
    curves: dict[str, dict[int, float]] = {}
    for entry in sorted(entries, key=lambda entry: entry.result.nfe):
        height = entry.metrics["fid"] if by_fid else entry.result.psnr.mean
        curves.setdefault(entry.result.strategy, {})[entry.result.nfe] = height

    def rank(name: str) -> float:
        mean = float(np.mean(list(curves[name].values())))
        return mean if by_fid else -mean

    for name in sorted(curves, key=rank)[:10]:
        axis.plot(*zip(*curves[name].items(), strict=True), marker="o", ms=3, label=name)
    axis.set(xlabel="network calls of an image", ylabel="FID" if by_fid else "PSNR, dB")
    if by_fid:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    axis.legend(fontsize=7, title="the ten best")


if __name__ == "__main__":
    main()
