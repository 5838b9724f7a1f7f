"""Readers of run folders: measured results and schedules, and the curves drawn from them."""

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
    """Read the results in <folder>/metrics.json.

    Args:
        folder: A run folder.
        run: Name of the run in the results.

    Raises:
        ValueError: If the file does not hold the metrics of an evaluation.
    """
    metrics = read_metrics(folder)
    group = metrics.model_dump(include={"model", "teacher", "solver", "seed"})
    results = []

    # The rows of the file.
    for row in metrics.rows:
        result = Result(
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
            group=json.dumps([*group.values(), row.nfe]),
        )
        results.append(result)
    return results


def read_schedules(folder: Path) -> list[tuple[str, StepSchedule]]:
    """Read the schedules of a run folder, with the names of their strategies.

    Raises:
        ValueError: If a schedule is damaged, or there are more than a run can have.
    """
    # Files, without the records of tensors beside them.
    files = sorted((folder / "schedules").glob("*.json"))
    files = [path for path in files if not path.name.endswith(".mean.json")]
    if len(files) > MOST:
        raise ValueError(
            f"{folder / 'schedules'} has {len(files)} schedules, more than {MOST}; "
            "give a run folder"
        )

    # Schedules.
    plans = []
    for path in files:
        plan = StepSchedule.load(inside(folder, "schedules", path.name))
        require_name(schedule=path.stem)
        plans.append((plan.about("strategy").get("name", path.stem), plan))
    return plans


def metric_lines(lines: Sequence[Line]) -> dict[str, dict[str, dict[int, float]]]:
    """Return the curve of every metric against K for every strategy.

    Where several runs have the same strategy and K, the run is part of the strategy's
    name.

    Returns:
        {metric: {strategy: {K: value}}}, PSNR first, without standard deviations.
    """
    results = sorted((line.result for line in lines), key=lambda result: result.num_steps)
    counts = Counter((result.strategy, result.num_steps) for result in results)
    repeated = {strategy for (strategy, _), count in counts.items() if count > 1}

    curves: dict[str, dict[str, dict[int, float]]] = {"psnr": {}}
    for result in results:
        name = result.strategy
        if name in repeated:
            name = f"{name} (run {result.run})"
        for metric, value in {"psnr": result.psnr.mean, **result.metrics}.items():
            if not metric.endswith("_std"):
                curves.setdefault(metric, {}).setdefault(name, {})[result.num_steps] = value
    return curves


def cost_lines(
    plans: Sequence[tuple[str, StepSchedule]],
) -> dict[tuple[str, int], dict[int, float]]:
    """Return the cost after each round of the dynamic programs that made schedules.

    Returns:
        {(strategy, K): {round: mean distance to the teacher}}.
    """
    costs = {}
    for name, plan in plans:
        rounds = plan.about("planning").get("cost_per_round", [])
        if rounds:
            costs[name, plan.num_steps] = dict(enumerate(rounds, start=1))
    return dict(sorted(costs.items()))


def mean_psnr(folder: Path) -> float | None:
    """Return the mean PSNR over all rows of a run; None where nothing was measured."""
    if not (folder / "metrics.json").is_file():
        return None
    return float(np.mean([result.psnr.mean for result in read_run(folder)]))
