"""The count of network calls, shown as a progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from oss_exp.escaping import PlainConsole, visible
from oss_exp.velocity import BoundVelocity


class CallCounter:
    """Counts the network calls of a piece of work and, with `show`, draws them as a bar with the time left.

    The bar is on stderr, within `with counter.progress`.
    """

    def __init__(self, show: bool) -> None:
        self.progress = Progress(
            TextColumn("{task.description:14}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} network calls a sample"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=PlainConsole(stderr=True),
            disable=not show,
        )
        self.rows, self.samples, self.seconds = 0, 1, 0.0
        self.bar = TaskID(0)

    def counted(self, velocity: BoundVelocity) -> BoundVelocity:
        """Return the same velocity, whose rows are counted here."""

        def fn(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            answer = velocity.fn(x, t, condition)
            self.add(len(x))
            return answer

        return replace(velocity, fn=fn)

    def add(self, rows: int) -> None:
        """Count so many rows of network calls."""
        self.rows += rows
        self.progress.update(self.bar, advance=rows / self.samples)

    @contextmanager
    def measure(self, name: str, calls: int, samples: int) -> Iterator[None]:
        """Count from zero; calls: how many are expected for each of this rank's samples."""
        self.rows, self.samples = 0, samples
        self.bar = self.progress.add_task(visible(name), total=max(calls, 1))
        started = time.perf_counter()
        yield
        self.seconds = time.perf_counter() - started
        total = max(
            self.rows / samples, 1
        )  # a refinement may have needed fewer or more than announced
        self.progress.update(self.bar, total=total, completed=total)

    def cost(self, num_steps: list[int], samples: int, rows: int) -> dict[str, Any]:
        """Return what a schedule's file says of its planning: these rows were counted for so many samples."""
        return {
            "for_num_steps": num_steps,
            "search_samples": samples,
            "network_calls_per_sample": round(rows / samples, 1),
            "seconds": round(self.seconds, 2),
        }
