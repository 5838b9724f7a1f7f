"""A counter of network calls with a progress bar."""

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
    """A counter of the network calls of a piece of work, with a bar and the time left on stderr.

    The bar is drawn inside `with counter.progress`.

    Args:
        show: Whether to draw the bar.

    Attributes:
        rows: Network rows counted since `measure` began.
        samples: Samples that the rows are for.
        seconds: Time that the last `measure` took.
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
        self.rows = 0
        self.samples = 1
        self.seconds = 0.0
        self.bar = TaskID(0)

    def counted(self, velocity: BoundVelocity) -> BoundVelocity:
        """Return the velocity with its rows counted here."""

        def fn(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            output = velocity.fn(x, t, condition)
            self.add(len(x))
            return output

        return replace(velocity, fn=fn)

    def add(self, rows: int) -> None:
        """Count rows of network calls."""
        self.rows += rows
        self.progress.update(self.bar, advance=rows / self.samples)

    @contextmanager
    def measure(self, name: str, calls: int, samples: int) -> Iterator[None]:
        """Count from zero within this context.

        Args:
            name: Name of the work, shown beside the bar.
            calls: Expected network calls for each of this rank's samples.
            samples: Number of this rank's samples.
        """
        self.rows = 0
        self.samples = samples
        self.bar = self.progress.add_task(visible(name), total=max(calls, 1))
        start = time.perf_counter()
        yield
        self.seconds = time.perf_counter() - start

        # A refinement may have needed fewer or more calls than expected.
        total = max(self.rows / samples, 1)
        self.progress.update(self.bar, total=total, completed=total)

    def cost(self, num_steps: list[int], samples: int, rows: int) -> dict[str, Any]:
        """Return the `planning` section of a schedule's provenance.

        Args:
            num_steps: Budgets that were planned.
            samples: Number of search samples.
            rows: Network rows over all of them.
        """
        return {
            "for_num_steps": num_steps,
            "search_samples": samples,
            "network_calls_per_sample": round(rows / samples, 1),
            "seconds": round(self.seconds, 2),
        }
