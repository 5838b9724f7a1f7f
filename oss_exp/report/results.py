"""Reading run folders: what was measured there, and the schedules."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from oss_exp.checks import require_name
from oss_exp.evaluation.comparison import Line, Result
from oss_exp.files import inside
from oss_exp.report.records import MOST, read_metrics
from oss_exp.schedule import StepSchedule


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


def read_schedules(folder: Path) -> list[tuple[str, StepSchedule]]:
    """(strategy, schedule) of <folder>/schedules, tensors' provenance files aside."""
    files = sorted(
        p for p in (folder / "schedules").glob("*.json") if not p.name.endswith(".mean.json")
    )
    if len(files) > MOST:
        raise ValueError(
            f"{folder / 'schedules'} has {len(files)} schedules, more than {MOST}; give a run folder"
        )
    plans = [(path, StepSchedule.load(inside(folder, "schedules", path.name))) for path in files]
    for path, _ in plans:
        require_name(schedule=path.stem)
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
        name = (
            f"{result.strategy} (run {result.run})"
            if result.strategy in several
            else result.strategy
        )
        for metric, value in {"psnr": result.psnr.mean, **result.metrics}.items():
            if not metric.endswith("_std"):
                found.setdefault(metric, {}).setdefault(name, {})[result.num_steps] = value
    return found


def cost_lines(
    plans: Sequence[tuple[str, StepSchedule]],
) -> dict[tuple[str, int], dict[int, float]]:
    """{(strategy, K): {round: cost}} of those that a dynamic program made: mean distance to the teacher on its way."""
    costs = {
        (name, plan.num_steps): plan.about("planning").get("cost_per_round", [])
        for name, plan in plans
    }
    return {key: dict(enumerate(each, start=1)) for key, each in sorted(costs.items()) if each}


def mean_psnr(folder: Path) -> float | None:
    """Over all rows of a run; None where nothing was measured."""
    if not (folder / "metrics.json").is_file():
        return None
    return float(np.mean([result.psnr.mean for result in read_run(folder)]))
