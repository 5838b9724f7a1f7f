"""What a table of the paper is: a function for each says which runs give our numbers in the place of the paper's.

`small` has our own networks in the place of the public ones, and fewer pictures; numbers of steps, noise schedules,
solvers and strategies are the paper's. `paper` has its models; conf/experiment/table_N.yaml is the setting that the
runs of table N have in common there, to be run alone as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oss_exp.evaluation.psnr import Interval
from oss_exp.reproduce.cells import Cell
from oss_exp.reproduce.older_cells import PARENT
from oss_exp.reproduce.paper import Paper
from oss_exp.reproduce.values import Reader, Value, differ, geneval, metric, psnr

COARSE = "band={stride: 8, width: 1}"  # of a search: a tenth of the network calls
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a number is read from."""

    read: Reader
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Verdict:
    """answer: holds | does not hold | not significant | not checked."""

    answer: str
    why: str


Values = Sequence[Value | None]
Check = Callable[[Values], Verdict]


@dataclass(frozen=True)
class Plan:
    """sources: one for each row of the paper's, None where there is no such number here.

    place: the line and the column of the printed table where a row's number stands. checks: of claims that order no
    rows, by their text. standing_for: what is not as in the paper.
    """

    sources: list[Source | None]
    place: Callable[[Row], tuple[str, str]]
    checks: dict[str, Check]
    standing_for: str


def verdict(difference: Interval, what: str) -> Verdict:
    """Of a difference that a claim says to be positive."""
    text = f"{what} {difference.mean:+.3g}"
    if difference.high is None:
        answer = "holds" if difference.mean > 0 else "does not hold"
        return Verdict(answer, f"{text}, one number each, no interval")
    text += f" ± {(difference.high - difference.low) / 2:.2g}"
    if difference.low > 0:
        return Verdict("holds", text)
    return Verdict("does not hold" if difference.high < 0 else "not significant", text)


# --------------------------------------------------------------------------------------------------------------
# The tables
# --------------------------------------------------------------------------------------------------------------


def table_1(paper: Paper, small: bool) -> Plan:
    search = [
        "task=search",
        "stepsize=[gits,dm,ld3,oss]",
        "num_steps=[5]",
        "data.per_sample=4",
        "data.search_samples=16",
    ]
    search += ["model=mixture_fashion"] if small else ["model=edm_imagenet64", "noise_schedule=edm"]
    cells = tuple(Cell.of(*search, f"solver={name}") for name in ("euler", "dpm_solver_pp"))
    sources = [
        Source(differ(f"schedules/{row['strategy']}_5.json"), cells)
        if row["part"] == "solver-aware" and row["strategy"] != "ays"
        else None
        for row in paper.rows
    ]
    return Plan(
        sources,
        lambda row: (row["part"], row["label"]),
        {
            paper.claims[0].text: lambda _: Verdict(
                "not checked", "three of them are properties, not numbers"
            )
        },
        "Measured is only whether a strategy's steps change with the solver (Euler, DPM-Solver++ of order 2): 1 if so. "
        "The other rows are properties of the methods; AYS is here as its authors' tables, which cannot change.",
    )


def table_2(paper: Paper, small: bool) -> Plan:
    model = [
        "model=unet_fashion",
        "num_teacher_steps=200",
        "data.eval_samples=48",
        "data.per_sample=48",
    ]
    search = f"stepsize.oss.{COARSE}"

    def cell(noise_schedule: str, strategy: str) -> Cell:
        base = model if small else ["experiment=table_2", "trainer=gpu"]
        oss = (
            ["num_steps=[5,10,20]", *([search] if small else [])]
            if strategy == "oss"
            else ["num_steps=[5,10,20,50]"]
        )
        return Cell.of(*base, f"noise_schedule={noise_schedule}", f"stepsize=[{strategy}]", *oss)

    sources = [
        Source(
            psnr(row["strategy"], row["num_steps"]), (cell(row["noise_schedule"], row["strategy"]),)
        )
        for row in paper.rows
    ]
    at = {
        (row["strategy"] == "oss", row["num_steps"], row["noise_schedule"]): i
        for i, row in enumerate(paper.rows)
    }

    def mean_gain(values: Values) -> Verdict:
        pairs = [(values[i], values[at[(False, *cell)]]) for (oss, *cell), i in at.items() if oss]
        common = sorted(set.intersection(*(set(each.pairs) for pair in pairs for each in pair)))
        gains = np.mean(
            [[ours.pairs[i] - naive.pairs[i] for i in common] for ours, naive in pairs], axis=0
        )
        return verdict(Interval.of(gains), "mean gain, dB:")

    def robust(values: Values) -> Verdict:
        ranges = {
            oss: np.mean(
                [
                    np.ptp([values[at[oss, k, s]].interval.mean for s in SCHEDULES])
                    for k in (5, 10, 20)
                ]
            )
            for oss in (False, True)
        }
        found = f"PSNR varies over noise schedules by {ranges[False]:.2f} dB with naive steps, {ranges[True]:.2f} with OSS"
        return Verdict(
            "holds" if ranges[True] < ranges[False] else "does not hold", f"{found}; no interval"
        )

    return Plan(
        sources,
        lambda row: (
            f"{row['label'].split(',')[0]}, {row['num_steps']} steps",
            row["noise_schedule"].upper(),
        ),
        {paper.claims[0].text: mean_gain, paper.claims[1].text: robust},
        "unet_fashion, which has EDM's preconditioning and classes, for ImageNet-64; n = 48; the search goes from "
        "coarse to fine.",
    )


SCHEDULES = ("edm", "ddim", "fm")


LIMIT = 0.25  # dB, below which a search has converged


def table_3(paper: Paper, small: bool) -> Plan:
    samples = ["data.search_samples=64", "data.eval_samples=64", "data.per_sample=64"]
    base = (
        ["model=mixture_fashion", "noise_schedule=ddim", *samples]
        if small
        else ["experiment=table_3", "trainer=gpu"]
    )
    reference = "num_teacher_steps=1000"

    def source(row: Row) -> Source | None:
        strategy, k, teacher = row["strategy"], row["num_steps"], row["search_teacher_steps"]
        if teacher is None and row["value"] is None:
            return None
        if teacher is None:
            return Source(
                psnr(strategy, k),
                (Cell.of(*base, reference, "stepsize=ddim", "num_steps=[100,200,500,800]"),),
            )
        searched = [
            "task=search",
            "stepsize=[oss,oss_ave]",
            f"num_steps=[{k}]",
            f"num_teacher_steps={teacher}",
        ]
        file = f"task.schedule={PARENT}/schedules/{strategy}_{k}.json"
        measured = ["task=evaluate", file, reference, f"num_steps=[{k}]"]
        return Source(
            psnr(strategy, k), (Cell.of(*base, *measured, parent=Cell.of(*base, *searched)),)
        )

    at = {(row["strategy"], row["search_teacher_steps"]): i for i, row in enumerate(paper.rows)}

    def converged(values: Values) -> Verdict:
        lost = {
            name: values[at[name, 1000]].minus(values[at[name, 200]]) for name in ("oss", "oss_ave")
        }
        text = ", ".join(
            f"{name} {each.mean:+.3f} ± {each.high - each.mean:.3f} dB"
            for name, each in lost.items()
        )
        worst = max(lost.values(), key=lambda each: each.high)
        unsure = "does not hold" if worst.low > LIMIT else "not significant"
        return Verdict(
            "holds" if worst.high < LIMIT else unsure,
            f"1000 steps minus 200: {text} (limit: {LIMIT})",
        )

    return Plan(
        [source(row) for row in paper.rows],
        lambda row: (
            row["label"],
            f"{row['search_teacher_steps'] or row['num_steps']} teacher steps",
        ),
        {paper.claims[0].text: converged},
        "mixture_fashion, whose answers are exact, for EDM's ImageNet-64 network; 64 samples, each searched for itself "
        "(OSS) or together (OSS-ave), over all edges.",
    )


def table_4(paper: Paper, small: bool) -> Plan:
    layer = "distance.layer=backbone.network.mid_block"
    own = {"perceptual": [layer], "inception": ["distance=classifier"]} if small else {}
    base = [
        "model=unet_fashion",
        "noise_schedule=edm",
        "num_teacher_steps=200",
        "num_steps=[5]",
        "stepsize=oss",
    ]
    base += ["data.eval_samples=32", "data.per_sample=32", f"stepsize.oss.{COARSE}"]
    base = base if small else ["experiment=table_4", "trainer=gpu"]
    cells = {
        row["distance"]: Cell.of(
            *base, f"distance={row['distance']}", *own.get(row["distance"], ())
        )
        for row in paper.rows
    }
    return Plan(
        [Source(psnr("oss", 5), (cells[row["distance"]],)) for row in paper.rows],
        lambda row: ("OSS", row["label"]),
        {},
        "unet_fashion with 5 steps on EDM's noise schedule, n = 32; the shipped classifier's features for Inception's, "
        "the network's middle block as the layer of the perceptual distance. All searches go from coarse to fine.",
    )


def table_5(paper: Paper, small: bool) -> Plan:
    def source(row: Row) -> Source:
        strategy, stages = row["strategy"], 5
        base = (
            ["model=dit_fashion"]
            if small
            else [
                "model=dit_xl_2_256",
                "noise_schedule=ddim",
                "num_teacher_steps=200",
                "trainer=gpu",
            ]
        )
        length = (
            ["task.max_steps=100", "task.save_every=50", "task.trajectories=512"] if small else []
        )
        trained = Cell.of(
            "task=finetune", *base, f"stepsize={strategy}", f"task.num_stages={stages}", *length
        )
        images = ["data.eval_samples=2000", "data.batch_size=100"]
        images = (
            images
            if small
            else ["data.eval_samples=50000", "metric.fid.num_images=50000", "evaluation=inception"]
        )
        few = [
            "metric=[fid]",
            f"num_steps=[{stages}]",
            f"num_teacher_steps={stages}",
        ]  # nobody looks at it
        parts = [f"stages={PARENT}/stages"] if row["trained"] else []
        file = f"task.schedule={PARENT}/stages/schedule.json"
        measured = Cell.of("task=evaluate", *base, file, *parts, *images, *few, parent=trained)
        return Source(metric("fid", strategy, stages), (measured,))

    progressive = Verdict(
        "not checked", "task.objective=progressive is there, but not in this table"
    )
    return Plan(
        [source(row) for row in paper.rows],
        lambda row: (
            row["label"].split(",")[0],
            "with training" if row["trained"] else "without training",
        ),
        {paper.claims[-1].text: lambda _: progressive},
        "dit_fashion for DiT-XL/2, 100 training steps of 64 for each stage, FID of 2,000 images by the shipped "
        "classifier's features: not to be compared with Inception's.",
    )


def table_6(paper: Paper, small: bool) -> Plan:
    strategies, sizes = (
        "stepsize=[edm,ddim,fm,dm,gits,oss_ave]",
        ["data.search_samples=24", "data.eval_samples=128"],
    )
    own = {
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

    def cell(row: Row) -> Cell:
        if not small:
            return Cell.of(*public[row["dataset"]], "trainer=gpu")
        coarse = [f"stepsize.oss_ave.{COARSE}"] if row["dataset"] == "mscoco512" else []
        return Cell.of(*own[row["dataset"]], strategies, "num_steps=[5,10]", *sizes, *coarse)

    return Plan(
        [Source(psnr(row["strategy"], row["num_steps"]), (cell(row),)) for row in paper.rows],
        lambda row: (
            row["label"].split(",")[0],
            f"{row['label'].split(', ')[1]}, {row['num_steps']}",
        ),
        {},
        "unet_fashion for ImageNet-64, mixture_fashion for LSUN-Bed, dit_fashion for FFHQ, flux_fashion with its "
        "prompts for MSCOCO; a teacher of 100 steps, 24 search samples, n = 128.",
    )


def table_7(paper: Paper, small: bool) -> Plan:
    own = ["task=geneval", "model=flux_scenes", "model.guidance.scale=3", "noise_schedule.shift=6"]
    own += [
        "task.images_per_prompt=1",
        "stepsize=[fm,ddim,gits,dm,oss_ave]",
        f"stepsize.oss_ave.{COARSE}",
    ]
    cell = Cell.of(*own) if small else Cell.of("experiment=table_7", "trainer=gpu")

    def label(row: Row) -> str:
        return "teacher" if row["num_steps"] == 100 else f"{row['strategy']}_{row['num_steps']}"

    at = {(row["label"], row["part"]): i for i, row in enumerate(paper.rows)}

    def kept(values: Values) -> Verdict:
        teacher, ours = (values[at[name, "overall"]] for name in ("FM (100)", "OSS-ave (10)"))
        loss, share = teacher.minus(ours), ours.interval.mean / teacher.interval.mean
        text = f"{100 * share:.1f} % kept; 100 steps minus 10: {loss.mean:+.3f} ± {(loss.high - loss.low) / 2:.3f}"
        return Verdict("holds" if loss.low <= 0 else "does not hold", text)

    return Plan(
        [Source(geneval(label(row), row["part"]), (cell,)) for row in paper.rows],
        lambda row: (row["label"], row["part"].replace("_", " ")),
        {paper.claims[0].text: kept},
        "flux_scenes on scenes of coloured garments, seen by the shipped detector; one picture of each of 553 prompts "
        "(the paper: four), guidance 3, the teacher's times shifted by 6 as FLUX shifts its own.",
    )


TABLES: dict[str, Callable[[Paper, bool], Plan]] = {
    function.__name__: function
    for function in (table_1, table_2, table_3, table_4, table_5, table_6, table_7)
}


def values_of(plan: Plan, root: Path) -> list[Value | None]:
    """Of cells that are made."""
    return [
        source and source.read(*(cell.folder(root) for cell in source.cells))
        for source in plan.sources
    ]
