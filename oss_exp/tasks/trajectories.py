"""Record the predictions of x0 at the steps of every schedule, as pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from oss_exp.data.noise import HELD_OUT
from oss_exp.evaluation.pictures import as_bytes, reduced
from oss_exp.models.base import Model
from oss_exp.models.pipeline import Pipeline
from oss_exp.schedule import StepSchedule
from oss_exp.stepsize import Collective


class Trajectories:
    """The trajectories of the first `count` held-out samples, over all batches and ranks.

    Of a video the middle frame is recorded. A model that samples in a loop of its own, as MAR
    does, has no trajectories. Legend: b of these samples, P pictures of each.

    Attributes:
        parts: By label, the records (index (b,), times (b, P), pictures (b, P, H, W, C) bytes):
            the predictions, and the sample at t = 0.
    """

    def __init__(self, count: int):
        self.count = count
        self.parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def recorder(
        self,
        label: str,
        model: Model,
        steps: StepSchedule,
        index: Tensor,
        condition: Tensor | None,
        most: int | None = None,
    ) -> Recorder | None:
        """Return a recorder of one run; None if no sample of it is recorded.

        Args:
            label: Label of the schedule.
            model: The model.
            steps: The schedule.
            index: The samples of the run, (B,).
            condition: Their conditions, (B,), or None.
            most: Number of steps to record, evenly chosen; None: every step.
        """
        rows = (index < HELD_OUT + self.count).nonzero()[:, 0]
        if len(rows) == 0:
            return None
        parts = self.parts.setdefault(label, [])
        count = min(steps.num_steps, most or steps.num_steps)
        decode = model.decode
        if isinstance(model, Pipeline) and condition is not None:
            decode = partial(model.decode, condition=condition[rows])
        return Recorder(parts, decode, steps, index, rows, count)

    def gather(
        self, labels: Iterable[str], num_samples: int, collective: Collective
    ) -> dict[str, np.ndarray]:
        """Gather the trajectories of all ranks.

        Args:
            labels: The labels.
            num_samples: Number of held-out samples.
            collective: Gathers tensors over ranks.

        Returns:
            `times/<label>` (n, P) and `x0/<label>` (n, P, H, W, C) of the labels that have all
            of the first samples.
        """
        trajectories: dict[str, np.ndarray] = {}
        for label in labels:
            # The shape (P, H, W, C), which a rank without samples does not know.
            parts = self.parts.get(label, [])
            shapes = torch.tensor([part[2].shape[1:] for part in parts]).long().reshape(-1, 4)
            shapes = collective.gather(shapes)
            if len(shapes) == 0:
                continue
            shape = shapes[0].tolist()

            # All parts, which begin with one of no samples.
            index = [torch.zeros(0).long()]
            times = [torch.zeros(0, shape[0]).double()]
            pictures = [torch.zeros(0, *shape).byte()]
            for part in parts:
                index.append(part[0].cpu())
                times.append(part[1].cpu())
                pictures.append(part[2].cpu())
            all_index = collective.gather(torch.cat(index)).numpy()
            all_times = collective.gather(torch.cat(times)).numpy()
            all_pictures = collective.gather(torch.cat(pictures)).numpy()

            # A distributed sampler may repeat samples.
            first = np.unique(all_index, return_index=True)[1]
            if len(first) == min(self.count, num_samples):
                trajectories[f"times/{label}"] = all_times[first]
                trajectories[f"x0/{label}"] = all_pictures[first]
        return trajectories


class Recorder:
    """A `Watch` that records the predictions of one run.

    Args:
        parts: The list to which the record is appended.
        decode: Decodes predictions (b, *E) of the recorded samples.
        steps: The schedule.
        index: The samples of the run, (B,).
        rows: Positions of the recorded samples among them, (b,).
        count: Number of steps to record.
    """

    def __init__(
        self,
        parts: list[tuple[Tensor, Tensor, Tensor]],
        decode: Callable[[Tensor], Tensor],
        steps: StepSchedule,
        index: Tensor,
        rows: Tensor,
        count: int,
    ):
        self.parts = parts
        self.decode = decode
        self.steps = steps
        self.index = index
        self.rows = rows
        self.places = np.linspace(0, steps.num_steps - 1, count).round().astype(int)
        self.pictures: list[Tensor] = []

    def __call__(self, step: int, x0: Tensor) -> None:
        if step in self.places:
            self.pictures.append(as_pictures(self.decode(x0[self.rows])))

    def finish(self, images: Tensor) -> None:
        """Append the record, with the images (B, ...) at the end.

        Without predictions, as of a model that samples in a loop of its own, there is no record.
        """
        if not self.pictures:
            return
        index = self.index[self.rows]
        pictures = torch.stack([*self.pictures, as_pictures(images[self.rows])], dim=1)
        times = self.steps.times[..., [*self.places, -1]].expand(len(self.index), -1)
        times = times[self.rows.cpu()].to(self.index.device)
        self.parts.append((index, times, pictures))


def as_pictures(images: Tensor) -> Tensor:
    """Return images as bytes (b, H, W, C) of at most 256 pixels a side.

    Args:
        images: Images (b, C, H, W) or videos (b, C, F, H, W) in [0, 1].
    """
    if images.ndim == 5:
        images = images[:, :, images.shape[2] // 2]
    return as_bytes(reduced(images))
