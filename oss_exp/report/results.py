"""Reading run folders, and the comparison that the table shows: paired differences to the best baseline."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oss_exp.evaluation.psnr import Interval
from oss_exp.report.records import read_metrics
from oss_exp.schedule import StepSchedule


@dataclass(frozen=True)
class Result:
    """One measured schedule. values: {sample index: PSNR}; arena: what must agree for a comparison to be fair."""

    run: str
    strategy: str
    num_steps: int
    nfe: int
    baseline: bool
    start: str
    psnr: Interval
    spread: Interval
    values: dict[int, float]
    planning: dict[str, Any]
    metrics: dict[str, float]  # FID and the like, by name
    arena: str


@dataclass(frozen=True)
class Line:
    """A line of the table: a result and its paired difference to the best baseline of its arena (None: it is that)."""

    result: Result
    rival: Result | None
    gain: Interval | None


def read_run(folder: Path, run: str = "") -> list[Result]:
    """Results of <folder>/metrics.json; ValueError where an evaluation did not write it."""
    metrics = read_metrics(folder)
    arena = metrics.model_dump(include={"model", "teacher", "solver", "seed"})
    return [
        Result(
            run=run,
            strategy=row.strategy,
            num_steps=row.num_steps,
            nfe=row.nfe,
            baseline=row.baseline,
            start=row.start,
            psnr=row.psnr,
            spread=row.spread,
            values=dict(zip(row.per_image.index, row.per_image.psnr, strict=True)),
            planning=dict(row.planning),
            metrics=row.metrics,
            arena=json.dumps([*arena.values(), row.nfe]),
        )
        for row in metrics.rows
    ]


def compare(results: Sequence[Result]) -> list[Line]:
    """Lines by budget, then best first; differences on the samples that both have."""
    lines = []
    for result in sorted(results, key=lambda r: (r.nfe, r.arena, -r.psnr.mean)):
        baselines = [r for r in results if r.baseline and r.arena == result.arena]
        rival = max(baselines, key=lambda r: r.psnr.mean, default=None)
        gain = None
        if rival is not None and rival is not result:
            common = sorted(result.values.keys() & rival.values.keys())
            if common:
                gain = Interval.of(np.array([result.values[i] - rival.values[i] for i in common]))
        lines.append(Line(result, rival, gain))
    return lines


def read_schedules(folder: Path) -> list[tuple[str, StepSchedule]]:
    """(strategy, schedule) of <folder>/schedules, tensors' provenance files aside."""
    files = sorted(p for p in (folder / "schedules").glob("*.json") if not p.name.endswith(".mean.json"))
    plans = [(path, StepSchedule.load(path)) for path in files]
    return [(plan.about("strategy").get("name", path.stem), plan) for path, plan in plans]


def metric_lines(lines: Sequence[Line]) -> dict[str, dict[str, dict[int, float]]]:
    """{metric: {strategy: {K: value}}}, PSNR first, no standard deviations; a strategy that several runs have with
    the same K goes by its run, too.
    """
    results = sorted((line.result for line in lines), key=lambda result: result.num_steps)
    times_seen = Counter((result.strategy, result.num_steps) for result in results)
    several = {strategy for (strategy, _), times in times_seen.items() if times > 1}
    found: dict[str, dict[str, dict[int, float]]] = {"psnr": {}}
    for result in results:
        name = f"{result.strategy} (run {result.run})" if result.strategy in several else result.strategy
        for metric, value in {"psnr": result.psnr.mean, **result.metrics}.items():
            if not metric.endswith("_std"):
                found.setdefault(metric, {}).setdefault(name, {})[result.num_steps] = value
    return found


def cost_lines(plans: Sequence[tuple[str, StepSchedule]]) -> dict[tuple[str, int], dict[int, float]]:
    """{(strategy, K): {round: cost}} of those that a dynamic program made: mean distance to the teacher on its way."""
    costs = {(name, plan.num_steps): plan.about("planning").get("cost_per_round", []) for name, plan in plans}
    return {key: dict(enumerate(each, start=1)) for key, each in sorted(costs.items()) if each}


def mean_psnr(folder: Path) -> float | None:
    """Over all rows of a run; None where nothing was measured."""
    if not (folder / "metrics.json").is_file():
        return None
    return float(np.mean([result.psnr.mean for result in read_run(folder)]))
