"""Plans of the paper's tables: which runs give our numbers, and how claims are checked.

Each `table_N` returns a plan at one of two scales. The scale `small` has our own
networks in place of the public ones, and fewer pictures; numbers of steps, noise
schedules, solvers and strategies are the paper's. The scale `paper` has the paper's
models; conf/experiment/table_N.yaml is the setting that the runs of table N share
there, and can be run alone as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from oss_exp.evaluation.psnr import Interval
from oss_exp.reproduce.cells import Cell
from oss_exp.reproduce.older_cells import PARENT
from oss_exp.reproduce.paper import Paper
from oss_exp.reproduce.values import Reader, Value, differ, geneval, metric, psnr

COARSE = "band={stride: 8, width: 1}"  # of a search: a tenth of the network calls
SCHEDULES = ("edm", "ddim", "fm")  # noise schedules of table 2
LIMIT = 0.25  # dB, below which a search has converged in table 3

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A number of ours: how it is read, and the runs that it is read from."""

    read: Reader
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Verdict:
    """The result of checking a claim.

    Attributes:
        answer: "holds", "does not hold", "not significant" or "not checked".
        why: The numbers behind it.
    """

    answer: str
    why: str


Values = Sequence[Value | None]
Check = Callable[[Values], Verdict]


@dataclass(frozen=True)
class Plan:
    """The plan of a table.

    Attributes:
        sources: One for each row of the paper's; None where there is no number here.
        place: Returns the line and the column of the printed table for a row.
        checks: Checks of claims that order no rows, by their text.
        standing_for: What differs from the paper.
    """

    sources: list[Source | None]
    place: Callable[[Row], tuple[str, str]]
    checks: dict[str, Check]
    standing_for: str


def verdict(difference: Interval, what: str) -> Verdict:
    """Judge the claim that a difference is positive; `what` names it."""
    text = f"{what} {difference.mean:+.3g}"

    # A single number.
    if difference.high is None:
        answer = "holds" if difference.mean > 0 else "does not hold"
        return Verdict(answer, f"{text}, one number each, no interval")

    # An interval.
    text += f" ± {(difference.high - difference.low) / 2:.2g}"
    if difference.low > 0:
        return Verdict("holds", text)
    return Verdict("does not hold" if difference.high < 0 else "not significant", text)


def values_of(plan: Plan, root: Path) -> list[Value | None]:
    """Read the numbers of a plan whose runs are all done.

    Args:
        plan: The plan of a table.
        root: Folder of the runs.
    """
    values: list[Value | None] = []
    for source in plan.sources:
        if source is None:
            values.append(None)
        else:
            values.append(source.read(*(cell.folder(root) for cell in source.cells)))
    return values


def _indices(paper: Paper, *keys: str) -> dict[tuple[Any, ...], int]:
    """Return the number of each row by its values of `keys`."""
    indices = {}
    for i, row in enumerate(paper.rows):
        indices[tuple(row[key] for key in keys)] = i
    return indices


# --------------------------------------------------------------------------------------------------
# The tables
# --------------------------------------------------------------------------------------------------


def table_1(paper: Paper, small: bool) -> Plan:
    """Return the plan of table 1, properties of strategies."""
    # Searches with two solvers.
    search = [
        "task=search",
        "stepsize=[gits,dm,ld3,oss]",
        "num_steps=[5]",
        "data.per_sample=4",
        "data.search_samples=16",
    ]
    search += ["model=mixture_fashion"] if small else ["model=edm_imagenet64", "noise_schedule=edm"]
    euler = Cell.of(*search, "solver=euler")
    dpm_solver = Cell.of(*search, "solver=dpm_solver_pp")

    def source(row: Row) -> Source | None:
        if row["part"] != "solver-aware" or row["strategy"] == "ays":
            return None
        return Source(differ(f"schedules/{row['strategy']}_5.json"), (euler, dpm_solver))

    properties = Verdict("not checked", "three of them are properties, not numbers")
    return Plan(
        list(map(source, paper.rows)),
        lambda row: (row["part"], row["label"]),
        {paper.claims[0].text: lambda _: properties},
        "Measured is only whether a strategy's steps change with the solver (Euler, "
        "DPM-Solver++ of order 2): 1 if so. The other rows are properties of the methods; "
        "AYS is here as its authors' tables, which cannot change.",
    )


def table_2(paper: Paper, small: bool) -> Plan:
    """Return the plan of table 2, PSNR under three noise schedules."""
    model = [
        "model=unet_fashion",
        "num_teacher_steps=200",
        "data.eval_samples=48",
        "data.per_sample=48",
    ]
    base = model if small else ["experiment=table_2", "trainer=gpu"]

    # Runs.
    def cell(noise_schedule: str, strategy: str) -> Cell:
        steps = ["num_steps=[5,10,20,50]"]
        if strategy == "oss":
            steps = ["num_steps=[5,10,20]"]
            if small:
                steps.append(f"stepsize.oss.{COARSE}")
        names = [f"noise_schedule={noise_schedule}", f"stepsize=[{strategy}]"]
        return Cell.of(*base, *names, *steps)

    def source(row: Row) -> Source:
        reader = psnr(row["strategy"], row["num_steps"])
        return Source(reader, (cell(row["noise_schedule"], row["strategy"]),))

    # Checks. The table has one naive strategy for each noise schedule.
    index = {}
    for i, row in enumerate(paper.rows):
        index[row["strategy"] == "oss", row["num_steps"], row["noise_schedule"]] = i

    return Plan(
        list(map(source, paper.rows)),
        lambda row: (
            f"{row['label'].split(',')[0]}, {row['num_steps']} steps",
            row["noise_schedule"].upper(),
        ),
        {
            paper.claims[0].text: lambda values: _mean_gain(values, index),
            paper.claims[1].text: lambda values: _robustness(values, index),
        },
        "unet_fashion, which has EDM's preconditioning and classes, for ImageNet-64; n = 48; "
        "the search goes from coarse to fine.",
    )


def _mean_gain(values: Values, index: dict[tuple[bool, int, str], int]) -> Verdict:
    """Judge the mean gain of OSS over naive steps, over all budgets and noise schedules."""
    # Pairs of OSS and naive steps.
    pairs = []
    for (oss, k, noise_schedule), i in index.items():
        if oss:
            naive = values[index[False, k, noise_schedule]]
            pairs.append((values[i].pairs, naive.pairs))

    # Gains of the samples that all have.
    samples = map(set, chain.from_iterable(pairs))
    common = sorted(set.intersection(*samples))
    gains = []
    for ours, naive in pairs:
        gains.append([ours[i] - naive[i] for i in common])
    return verdict(Interval.of(np.mean(gains, axis=0)), "mean gain, dB:")


def _robustness(values: Values, index: dict[tuple[bool, int, str], int]) -> Verdict:
    """Judge whether PSNR varies less over noise schedules with OSS than with naive steps."""

    def spread(oss: bool) -> float:
        """Return the mean over budgets of the range over noise schedules, in dB."""
        ranges = []
        for k in (5, 10, 20):
            means = [values[index[oss, k, name]].interval.mean for name in SCHEDULES]
            ranges.append(np.ptp(means))
        return float(np.mean(ranges))

    naive, ours = spread(False), spread(True)
    return Verdict(
        "holds" if ours < naive else "does not hold",
        f"PSNR varies over noise schedules by {naive:.2f} dB with naive steps, "
        f"{ours:.2f} with OSS; no interval",
    )


def table_3(paper: Paper, small: bool) -> Plan:
    """Return the plan of table 3, PSNR against the number of teacher steps in the search."""
    samples = ["data.search_samples=64", "data.eval_samples=64", "data.per_sample=64"]
    shipped = ["model=mixture_fashion", "noise_schedule=ddim", *samples]
    base = shipped if small else ["experiment=table_3", "trainer=gpu"]
    reference = "num_teacher_steps=1000"
    teachers = Cell.of(*base, reference, "stepsize=ddim", "num_steps=[100,200,500,800]")

    def source(row: Row) -> Source | None:
        strategy, k, teacher = row["strategy"], row["num_steps"], row["search_teacher_steps"]
        if teacher is None:
            return None if row["value"] is None else Source(psnr(strategy, k), (teachers,))

        # A search, and its schedule against the reference.
        budget = f"num_steps=[{k}]"
        searched = Cell.of(
            *base, "task=search", "stepsize=[oss,oss_ave]", budget, f"num_teacher_steps={teacher}"
        )
        file = f"task.schedule={PARENT}/schedules/{strategy}_{k}.json"
        measured = Cell.of(*base, "task=evaluate", file, reference, budget, parent=searched)
        return Source(psnr(strategy, k), (measured,))

    index = _indices(paper, "strategy", "search_teacher_steps")
    return Plan(
        list(map(source, paper.rows)),
        lambda row: (
            row["label"],
            f"{row['search_teacher_steps'] or row['num_steps']} teacher steps",
        ),
        {paper.claims[0].text: lambda values: _convergence(values, index)},
        "mixture_fashion, whose answers are exact, for EDM's ImageNet-64 network; 64 samples, "
        "each searched for itself (OSS) or together (OSS-ave), over all edges.",
    )


def _convergence(values: Values, index: dict[tuple[Any, ...], int]) -> Verdict:
    """Judge whether searches with 200 teacher steps lose less than LIMIT to those with 1000."""
    losses = {}
    for name in ("oss", "oss_ave"):
        losses[name] = values[index[name, 1000]].minus(values[index[name, 200]])
    worst = max(losses.values(), key=lambda loss: loss.high)

    # Answer.
    if worst.high < LIMIT:
        answer = "holds"
    else:
        answer = "does not hold" if worst.low > LIMIT else "not significant"

    # Numbers.
    parts = []
    for name, loss in losses.items():
        parts.append(f"{name} {loss.mean:+.3f} ± {loss.high - loss.mean:.3f} dB")
    return Verdict(answer, f"1000 steps minus 200: {', '.join(parts)} (limit: {LIMIT})")


def table_4(paper: Paper, small: bool) -> Plan:
    """Return the plan of table 4, PSNR by the distance of the search."""
    shipped = [
        "model=unet_fashion",
        "noise_schedule=edm",
        "num_teacher_steps=200",
        "num_steps=[5]",
        "stepsize=oss",
        "data.eval_samples=32",
        "data.per_sample=32",
        f"stepsize.oss.{COARSE}",
    ]
    base = shipped if small else ["experiment=table_4", "trainer=gpu"]

    # Our networks have other layers and another extractor.
    replacements = {
        "perceptual": ["distance.layer=backbone.network.mid_block"],
        "inception": ["distance=classifier"],
    }

    def source(row: Row) -> Source:
        distance = row["distance"]
        more = replacements.get(distance, []) if small else []
        return Source(psnr("oss", 5), (Cell.of(*base, f"distance={distance}", *more),))

    return Plan(
        list(map(source, paper.rows)),
        lambda row: ("OSS", row["label"]),
        {},
        "unet_fashion with 5 steps on EDM's noise schedule, n = 32; the shipped classifier's "
        "features for Inception's, the network's middle block as the layer of the perceptual "
        "distance. All searches go from coarse to fine.",
    )


def table_5(paper: Paper, small: bool) -> Plan:
    """Return the plan of table 5, FID with and without finetuning by stages."""
    stages = 5

    # Settings.
    if small:
        base = ["model=dit_fashion"]
        length = ["task.max_steps=100", "task.save_every=50", "task.trajectories=512"]
        images = ["data.eval_samples=2000", "data.batch_size=100"]
    else:
        base = [
            "model=dit_xl_2_256",
            "noise_schedule=ddim",
            "num_teacher_steps=200",
            "trainer=gpu",
        ]
        length = []
        images = [
            "data.eval_samples=50000",
            "metric.fid.num_images=50000",
            "evaluation=inception",
        ]

    # The teacher has as few steps as the student: its images are not used.
    few = ["metric=[fid]", f"num_steps=[{stages}]", f"num_teacher_steps={stages}"]

    def source(row: Row) -> Source:
        strategy = row["strategy"]
        finetune = ["task=finetune", *base, f"stepsize={strategy}", f"task.num_stages={stages}"]
        trained = Cell.of(*finetune, *length)
        parts = [f"stages={PARENT}/stages"] if row["trained"] else []
        file = f"task.schedule={PARENT}/stages/schedule.json"
        measured = Cell.of("task=evaluate", *base, file, *parts, *images, *few, parent=trained)
        return Source(metric("fid", strategy, stages), (measured,))

    progressive = Verdict(
        "not checked", "task.objective=progressive is there, but not in this table"
    )
    return Plan(
        list(map(source, paper.rows)),
        lambda row: (
            row["label"].split(",")[0],
            "with training" if row["trained"] else "without training",
        ),
        {paper.claims[-1].text: lambda _: progressive},
        "dit_fashion for DiT-XL/2, 100 training steps of 64 for each stage, FID of 2,000 images "
        "by the shipped classifier's features: not to be compared with Inception's.",
    )


def table_6(paper: Paper, small: bool) -> Plan:
    """Return the plan of table 6, PSNR of all strategies on four data sets."""
    strategies = "stepsize=[edm,ddim,fm,dm,gits,oss_ave]"
    sizes = ["data.search_samples=24", "data.eval_samples=128"]

    # Settings of the data sets, with our networks and with the public ones.
    shipped = {
        "imagenet64": ["model=unet_fashion", "noise_schedule=edm"],
        "lsun_bedroom256": ["model=mixture_fashion", "noise_schedule=edm"],
        "ffhq64": ["model=dit_fashion"],
        "mscoco512": ["model=flux_fashion", "data=prompts", "data.prompts=coloured_fashion.txt"],
    }
    public = {
        "imagenet64": ["experiment=table_6"],
        "lsun_bedroom256": ["experiment=table_6", "model=edm_bedroom256"],
        "ffhq64": ["experiment=table_6", "model=edm_ffhq64"],
        "mscoco512": ["experiment=table_6_coco"],
    }

    def source(row: Row) -> Source:
        dataset = row["dataset"]
        if small:
            coarse = [f"stepsize.oss_ave.{COARSE}"] if dataset == "mscoco512" else []
            cell = Cell.of(*shipped[dataset], strategies, "num_steps=[5,10]", *sizes, *coarse)
        else:
            cell = Cell.of(*public[dataset], "trainer=gpu")
        return Source(psnr(row["strategy"], row["num_steps"]), (cell,))

    def place(row: Row) -> tuple[str, str]:
        parts = row["label"].split(", ")
        return row["label"].split(",")[0], f"{parts[1]}, {row['num_steps']}"

    return Plan(
        list(map(source, paper.rows)),
        place,
        {},
        "unet_fashion for ImageNet-64, mixture_fashion for LSUN-Bed, dit_fashion for FFHQ, "
        "flux_fashion with its prompts for MSCOCO; a teacher of 100 steps, 24 search samples, "
        "n = 128.",
    )


def table_7(paper: Paper, small: bool) -> Plan:
    """Return the plan of table 7, GenEval's scores."""
    shipped = [
        "task=geneval",
        "model=flux_scenes",
        "model.guidance.scale=8",
        "task.images_per_prompt=1",
        "stepsize=[fm,ddim,gits,dm,oss_ave]",
        f"stepsize.oss_ave.{COARSE}",
    ]
    cell = Cell.of(*shipped) if small else Cell.of("experiment=table_7", "trainer=gpu")

    # Scores of the teacher and of schedules.

    def source(row: Row) -> Source:
        k = row["num_steps"]
        label = "teacher" if k == 100 else f"{row['strategy']}_{k}"
        return Source(geneval(label, row["part"]), (cell,))

    index = _indices(paper, "label", "part")
    return Plan(
        list(map(source, paper.rows)),
        lambda row: (row["label"], row["part"].replace("_", " ")),
        {paper.claims[0].text: lambda values: _retention(values, index)},
        "flux_scenes on scenes of coloured garments, seen by the shipped detector; one picture "
        "of each of 553 prompts (the paper: four), guidance 8, the teacher's times not shifted.",
    )


def _retention(values: Values, index: dict[tuple[Any, ...], int]) -> Verdict:
    """Judge whether ten steps keep the teacher's overall score."""
    teacher = values[index["FM (100)", "overall"]]
    ours = values[index["OSS-ave (10)", "overall"]]
    loss = teacher.minus(ours)
    share = ours.interval.mean / teacher.interval.mean
    half = (loss.high - loss.low) / 2
    return Verdict(
        "holds" if loss.low <= 0 else "does not hold",
        f"{100 * share:.1f} % kept; 100 steps minus 10: {loss.mean:+.3f} ± {half:.3f}",
    )


TABLES: dict[str, Callable[[Paper, bool], Plan]] = {
    "table_1": table_1,
    "table_2": table_2,
    "table_3": table_3,
    "table_4": table_4,
    "table_5": table_5,
    "table_6": table_6,
    "table_7": table_7,
}
