"""Our numbers, read from the folders of cells, each with what tells it apart from another for certain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from oss_exp.evaluation.psnr import Interval
from oss_exp.geneval.rules import differences, scores
from oss_exp.report.geneval import right
from oss_exp.report.records import read_geneval, read_metrics
from oss_exp.report.results import read_run
from oss_exp.schedule import StepSchedule


@dataclass(frozen=True)
class Value:
    """A number of ours. pairs: {picture: its own number} where a difference can be taken picture by picture."""

    interval: Interval
    pairs: dict[int, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()  # GenEval: the part that each picture belongs to
    part: str = ""

    def minus(self, other: Value) -> Interval:
        """Without pairs it has no interval."""
        common = sorted(self.pairs.keys() & other.pairs.keys())
        if self.part and self.tags == other.tags:
            own, its = ([bool(each.pairs[i]) for i in common] for each in (self, other))
            return differences(self.tags, own, its)[self.part]
        if len(common) > 1:
            return Interval.of(np.array([self.pairs[i] - other.pairs[i] for i in common]))
        return Interval(
            self.interval.mean - other.interval.mean,
            None,
            None,
            min(self.interval.n, other.interval.n),
        )


Reader = Callable[..., Value]  # of the folders of its cells


def psnr(strategy: str, num_steps: int) -> Reader:
    """Of a schedule that a comparison or an evaluation measured."""

    def read(folder: Path) -> Value:
        (row,) = [
            row
            for row in read_run(folder)
            if (row.strategy, row.num_steps) == (strategy, num_steps)
        ]
        return Value(row.psnr, row.values)

    return read


def metric(name: str, strategy: str | None = None, num_steps: int | None = None) -> Reader:
    """FID and the like: one number of all samples. Without a strategy: the teacher's."""

    def read(folder: Path) -> Value:
        rows = read_run(folder)
        n = rows[0].psnr.n
        if strategy is None:
            found = read_metrics(folder).teacher_metrics[name]
        else:
            (found,) = [
                r.metrics[name] for r in rows if (r.strategy, r.num_steps) == (strategy, num_steps)
            ]
        return Value(Interval(found, None, None, n))

    return read


def geneval(label: str, part: str) -> Reader:
    """A score of task=geneval; label: of the schedule, or teacher."""

    def read(folder: Path) -> Value:
        record = read_geneval(folder)
        (row,) = [row for row in record.rows if row.label == label]
        answers = right(row)
        pairs = {i: float(each) for i, each in enumerate(answers)}
        return Value(scores(record.tags, answers)[part], pairs, tuple(record.tags), part)

    return read


def differ(file: str) -> Callable[[Path, Path], Value]:
    """1 where two searches put their steps at other times, else 0; file: of the schedule in both folders."""

    def read(*folders: Path) -> Value:
        first, second = (StepSchedule.load(folder / file).times for folder in folders)
        return Value(Interval(float(not torch.equal(first, second)), None, None, 1))

    return read
