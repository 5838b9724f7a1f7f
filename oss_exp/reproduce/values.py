"""Readers of our numbers from the folders of runs, with the per-picture values behind intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from oss_exp.evaluation.comparison import Result
from oss_exp.evaluation.psnr import Interval
from oss_exp.geneval.rules import differences, scores
from oss_exp.report.geneval import right
from oss_exp.report.records import read_geneval, read_metrics
from oss_exp.report.results import read_run
from oss_exp.schedule import StepSchedule


@dataclass(frozen=True)
class Value:
    """A number of ours.

    Attributes:
        interval: The number and its interval.
        pairs: Values of single pictures, by picture, where differences can be paired.
        tags: GenEval's task of each picture.
        part: GenEval's task, or "overall", that the number is the score of.
    """

    interval: Interval
    pairs: dict[int, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    part: str = ""

    def minus(self, other: Value) -> Interval:
        """Return the difference to another number; without pairs it has no interval."""
        common = sorted(self.pairs.keys() & other.pairs.keys())
        ours = np.array([self.pairs[i] for i in common])
        theirs = np.array([other.pairs[i] for i in common])

        # Verdicts of GenEval.
        if self.part and self.tags == other.tags:
            verdicts = (ours != 0).tolist()
            other_verdicts = (theirs != 0).tolist()
            return differences(self.tags, verdicts, other_verdicts)[self.part]

        # Pictures.
        if len(common) > 1:
            return Interval.of(ours - theirs)

        # Single numbers.
        mean = self.interval.mean - other.interval.mean
        return Interval(mean, None, None, min(self.interval.n, other.interval.n))


Reader = Callable[..., Value]
"""A function that reads a number from the folders of its runs."""


def psnr(strategy: str, num_steps: int) -> Reader:
    """Return a reader of the PSNR of a schedule."""

    def read(folder: Path) -> Value:
        row = _row(read_run(folder), strategy, num_steps)
        return Value(row.psnr, row.values)

    return read


def metric(name: str, strategy: str | None = None, num_steps: int | None = None) -> Reader:
    """Return a reader of a metric such as FID.

    Args:
        name: The metric.
        strategy: The schedule's strategy; None for the teacher.
        num_steps: The schedule's steps.
    """

    def read(folder: Path) -> Value:
        rows = read_run(folder)
        n = rows[0].psnr.n
        if strategy is None:
            value = read_metrics(folder).teacher_metrics[name]
        else:
            value = _row(rows, strategy, num_steps).metrics[name]
        return Value(Interval(value, None, None, n))

    return read


def _row(rows: list[Result], strategy: str, num_steps: int | None) -> Result:
    """Return the only row of a schedule."""
    (row,) = [row for row in rows if (row.strategy, row.num_steps) == (strategy, num_steps)]
    return row


def geneval(label: str, part: str) -> Reader:
    """Return a reader of a score of task=geneval.

    Args:
        label: The schedule's label, or "teacher".
        part: A task of GenEval, or "overall".
    """

    def read(folder: Path) -> Value:
        record = read_geneval(folder)
        (row,) = [row for row in record.rows if row.label == label]
        verdicts = right(row)
        pairs = dict(enumerate(map(float, verdicts)))
        return Value(scores(record.tags, verdicts)[part], pairs, tuple(record.tags), part)

    return read


def differ(file: str) -> Callable[[Path, Path], Value]:
    """Return a reader of 1 where two searches chose other times, else 0.

    Args:
        file: Path of the schedule in both run folders.
    """

    def read(*folders: Path) -> Value:
        first, second = (StepSchedule.load(folder / file).times for folder in folders)
        return Value(Interval(float(not torch.equal(first, second)), None, None, 1))

    return read
