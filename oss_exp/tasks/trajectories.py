"""What the network takes for a sample on its way: the predictions of x0 at the steps of every schedule, as pictures."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from oss_exp.data.noise import HELD_OUT
from oss_exp.evaluation.pictures import as_bytes, reduced
from oss_exp.models.base import Model
from oss_exp.schedule import StepSchedule
from oss_exp.stepsize import Collective


class Trajectories:
    """Of the first `count` held-out samples, whichever batch and rank they are in; of a video the middle frame.

    A model that samples in a loop of its own, as MAR does, has none. Legend: b of these samples, P pictures of each.
    parts: {label: [(index (b,), times (b, P), pictures (b, P, H, W, C) bytes)]}: the predictions, and the sample at 0.
    """

    def __init__(self, count: int):
        self.count = count
        self.parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def recorder(
        self, label: str, model: Model, steps: StepSchedule, index: Tensor, most: int | None = None
    ) -> Recorder | None:
        """Return what records a run of `steps` from the samples index (B,); None where none of them is shown.

        most: the number of steps recorded, evenly chosen; None: every step.
        """
        rows = (index < HELD_OUT + self.count).nonzero()[:, 0]
        if len(rows) == 0:
            return None
        parts = self.parts.setdefault(label, [])
        return Recorder(
            parts, model, steps, index, rows, min(steps.num_steps, most or steps.num_steps)
        )

    def gathered(
        self, labels: Iterable[str], num_samples: int, collective: Collective
    ) -> dict[str, np.ndarray]:
        """times/<label> (n, P) and x0/<label> (n, P, H, W, C) of the labels that have all of the first samples."""
        found = {}
        for label in labels:
            parts = self.parts.get(label, [])
            shapes = collective.gather(
                torch.tensor([part[2].shape[1:] for part in parts]).long().reshape(-1, 4)
            )
            if len(shapes) == 0:
                continue
            size = shapes[0].tolist()
            nothing = (
                torch.zeros(0).long(),
                torch.zeros(0, size[0]).double(),
                torch.zeros(0, *size).byte(),
            )
            index, times, pictures = (
                collective.gather(
                    torch.cat([part[place].cpu() for part in parts] or [nothing[place]])
                ).numpy()
                for place in range(3)
            )
            first = np.unique(index, return_index=True)[
                1
            ]  # a distributed sampler may repeat samples
            if len(first) == min(self.count, num_samples):
                found[f"times/{label}"], found[f"x0/{label}"] = times[first], pictures[first]
        return found


class Recorder:
    """Records one run: told of its predictions (it is a `Watch`), and of the images at its end.

    parts: where the record goes. rows (b,): the positions of the shown samples among those of the run.
    """

    def __init__(
        self,
        parts: list[tuple[Tensor, Tensor, Tensor]],
        model: Model,
        steps: StepSchedule,
        index: Tensor,
        rows: Tensor,
        count: int,
    ):
        self.parts, self.model, self.steps, self.index, self.rows = parts, model, steps, index, rows
        self.places = np.linspace(0, steps.num_steps - 1, count).round().astype(int)
        self.pictures: list[Tensor] = []

    def __call__(self, step: int, x0: Tensor) -> None:
        if step in self.places:
            self.pictures.append(shown(self.model.decode(x0[self.rows])))

    def finish(self, images: Tensor) -> None:
        """Add the images (B, ...) at the end. A model that samples in a loop of its own tells of no predictions."""
        if not self.pictures:
            return
        pictures = torch.stack([*self.pictures, shown(images[self.rows])], dim=1)
        times = self.steps.times[..., [*self.places, -1]].expand(len(self.index), -1)[
            self.rows.cpu()
        ]
        self.parts.append((self.index[self.rows], times.to(self.index.device), pictures))


def shown(images: Tensor) -> Tensor:
    """(b, C, H, W) or (b, C, F, H, W) in [0, 1] -> bytes (b, H, W, C) of at most 256 pixels a side."""
    return as_bytes(reduced(images if images.ndim == 4 else images[:, :, images.shape[2] // 2]))
