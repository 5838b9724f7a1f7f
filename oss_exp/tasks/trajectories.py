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
from oss_exp.solvers import Solver
from oss_exp.stepsize import Collective


class Trajectories:
    """Of the first `count` held-out samples, whichever batch and rank they are in; of a video the middle frame.

    A model that samples in a loop of its own, as MAR does, has none. Legend: b of these samples, P pictures of each.
    parts: {label: [(index (b,), times (b, P), pictures (b, P, H, W, C) bytes)]}: the predictions, and the sample at 0.
    """

    def __init__(self, count: int):
        self.count = count
        self.parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def sample(
        self,
        label: str,
        model: Model,
        solver: Solver,
        steps: StepSchedule,
        noise: Tensor,
        condition: Tensor | None,
        group: Tensor | None,
        index: Tensor,
        most: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """noise (B, *E) of the samples index (B,) -> x0 (B, *E) and its pixels.

        Keeps the way of those among the first: every step, or `most` of them, evenly chosen.
        """
        places = np.linspace(0, steps.num_steps - 1, min(steps.num_steps, most or steps.num_steps)).round().astype(int)
        rows = (index < HELD_OUT + self.count).nonzero()[:, 0]
        seen: list[Tensor] = []

        def watch(step: int, x0: Tensor) -> None:
            if step in places:
                seen.append(shown(model.decode(x0[rows])))

        x0 = model.sample(solver, steps, noise, condition, group, watch if len(rows) else None)
        images = model.decode(x0)
        if seen:
            pictures = torch.stack([*seen, shown(images[rows])], dim=1)
            times = steps.times[..., [*places, -1]].expand(len(index), -1)[rows.cpu()]
            self.parts.setdefault(label, []).append((index[rows], times.to(index.device), pictures))
        return x0, images

    def gathered(self, labels: Iterable[str], num_samples: int, collective: Collective) -> dict[str, np.ndarray]:
        """times/<label> (n, P) and x0/<label> (n, P, H, W, C) of the labels that have all of the first samples."""
        found = {}
        for label in labels:
            parts = self.parts.get(label, [])
            shapes = collective.gather(torch.tensor([part[2].shape[1:] for part in parts]).long().reshape(-1, 4))
            if len(shapes) == 0:
                continue
            size = shapes[0].tolist()
            nothing = torch.zeros(0).long(), torch.zeros(0, size[0]).double(), torch.zeros(0, *size).byte()
            index, times, pictures = (
                collective.gather(torch.cat([part[place].cpu() for part in parts] or [nothing[place]])).numpy()
                for place in range(3)
            )
            first = np.unique(index, return_index=True)[1]  # a distributed sampler may repeat samples
            if len(first) == min(self.count, num_samples):
                found[f"times/{label}"], found[f"x0/{label}"] = times[first], pictures[first]
        return found


def shown(images: Tensor) -> Tensor:
    """(b, C, H, W) or (b, C, F, H, W) in [0, 1] -> bytes (b, H, W, C) of at most 256 pixels a side."""
    return as_bytes(reduced(images if images.ndim == 4 else images[:, :, images.shape[2] // 2]))
