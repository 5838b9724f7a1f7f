"""The count of network calls, shown as a progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from oss_exp.velocity import BoundVelocity


class Meter:
    """Counts the network calls of a piece of planning and shows them as a bar with the time left (rank 0)."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description:14}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} network calls a sample"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=rank_zero_only.rank != 0,
        )
        self.rows, self.samples, self.seconds = 0, 1, 0.0
        self.bar = TaskID(0)

    def counted(self, velocity: BoundVelocity) -> BoundVelocity:
        """The same velocity, its rows counted here."""

        def fn(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            answer = velocity.fn(x, t, condition)
            self.rows += len(x)
            self.progress.update(self.bar, advance=len(x) / self.samples)
            return answer

        return replace(velocity, fn=fn)

    @contextmanager
    def measure(self, name: str, calls: int, samples: int) -> Iterator[None]:
        """Count from zero; calls: how many are expected for each of this rank's samples."""
        self.rows, self.samples = 0, samples
        self.bar = self.progress.add_task(name, total=max(calls, 1))
        started = time.perf_counter()
        yield
        self.seconds = time.perf_counter() - started
        total = max(self.rows / samples, 1)  # a refinement may have needed fewer or more than announced
        self.progress.update(self.bar, total=total, completed=total)
