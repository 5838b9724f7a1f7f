"""The jumps that a stage learns: the teacher's path, and where a student is before a step.

Legend: B samples, K steps, *E event dims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from oss_exp.data.noise import TRAINING
from oss_exp.files import write_atomically
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, walk
from oss_exp.tasks.collective import agreed, for_every_rank
from oss_exp.tasks.setting import Setting
from oss_exp.tasks.training import shuffled
from oss_exp.tensors import rowwise
from oss_exp.velocity import BoundVelocity

Compute = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def jump_loss(
    setting: Setting,
    steps: StepSchedule,
    span: range,
    progressive: bool,
    batch: Mapping[str, Tensor],
) -> Tensor:
    """Return the mean squared error of the states that jumps reach, () float32.

    Args:
        setting: Model, grid, solver and distance.
        steps: The schedule.
        span: The steps of the stage.
        progressive: Let a state go through the span up to its step, by the same network, first.
        batch: `x` (B, *E), the states before their step, or before the span if progressive;
            `step` (B,), the steps; `target` (B, *E), the teacher's states after them.
    """
    velocity = setting.velocity(batch)
    x = batch["x"]
    step = batch["step"]

    # Steps of the span before this one, without gradients.
    if progressive:
        with torch.no_grad():
            for earlier in range(span.start, int(step.max())):
                rows = (step > earlier).nonzero()[:, 0]
                earlier_steps = torch.full_like(rows, earlier)
                x_next = jump(velocity.subset(rows), x[rows], steps, earlier_steps)
                x = x.index_copy(0, rows, x_next)
    return F.mse_loss(jump(velocity, x, steps, step), batch["target"])


def jump(velocity: BoundVelocity, x: Tensor, steps: StepSchedule, step: Tensor) -> Tensor:
    """Return the states (B, *E) after one Euler jump.

    Args:
        velocity: The velocity.
        x: The states before, (B, *E).
        steps: The schedule.
        step: The step of every state, (B,): from times[step] to times[step + 1].
    """
    times = steps.times.to(x.device)
    t = times[step]
    t_next = times[step + 1]
    return x + rowwise(t_next - t, x) * velocity(x, t)


# --------------------------------------------------------------------------------------------------
# States
# --------------------------------------------------------------------------------------------------


class States:
    """Tensors of training noises, computed once, by any rank or job.

    A batch of noises is one safetensors file.

    Args:
        folder: The folder of the files.
        noises: The training noises.
        size: Noises of a batch.
    """

    def __init__(self, folder: Path, noises: Dataset, size: int):
        self.folder = folder
        self.noises = noises
        self.size = size

    def file(self, name: str, i: int) -> Path:
        """Return the path of the file that contains training noise i."""
        return self.folder / name / f"{i // self.size:06d}.safetensors"

    def row(self, name: str, i: int) -> dict[str, Tensor]:
        """Return all tensors of training noise i."""
        tensors = {}
        with safe_open(self.file(name, i), "pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensors[key] = file.get_slice(key)[i % self.size :][0]
        return tensors

    def missing(self, name: str) -> list[list[int]]:
        """Return the batches of noises that have no file."""
        missing = []
        for batch in torch.arange(len(self.noises)).split(self.size):
            if not self.file(name, int(batch[0])).is_file():
                missing.append(batch.tolist())
        return missing

    def make(self, name: str, model: nn.Module, compute: Compute, trainer: L.Trainer) -> None:
        """Compute the batches that are missing.

        Args:
            name: Name of the states.
            model: The model that `compute` runs.
            compute: Maps a batch of noises with their conditions to tensors with a row for each.
            trainer: The trainer, whose ranks share the work.
        """
        missing = agreed(trainer, partial(self.missing, name))
        if missing:
            batches = Batches(self.noises, for_every_rank(missing, trainer))
            loader = DataLoader(batches, batch_size=None)
            maker = StateMaker(self, name, model, compute)
            trainer.predict(maker, loader, return_predictions=False)


class Batches(Dataset):
    """Chosen batches of a dataset, collated."""

    def __init__(self, items: Dataset, batches: Sequence[Sequence[int]]):
        self.items = items
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return default_collate([self.items[i] for i in self.batches[position]])


class StateMaker(L.LightningModule):
    """A Lightning loop that writes the states of every batch of noises."""

    def __init__(self, states: States, name: str, model: nn.Module, compute: Compute):
        super().__init__()
        self.model = model  # registered, so that Lightning moves it to the device
        self.states = states
        self.name = name
        self.compute = compute

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        tensors = self.compute(batch)
        for key, tensor in tensors.items():
            tensors[key] = tensor.cpu().contiguous()
        file = self.states.file(self.name, noise_numbers(batch)[0])
        write_atomically(file, safetensors.torch.save(tensors))

    def on_predict_end(self) -> None:
        self.trainer.strategy.barrier("states are on disk")


def noise_numbers(batch: Mapping[str, Tensor]) -> list[int]:
    """Return the numbers of a batch's training noises."""
    return (batch["index"] - TRAINING).tolist()


@torch.no_grad()
def teacher_states(
    setting: Setting, steps: StepSchedule, batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the teacher's states at the times of a schedule.

    Times that are not nodes of the teacher's grid become further steps of it.

    Args:
        setting: Model, grid, solver and distance.
        steps: The schedule.
        batch: A batch of noises with their conditions.

    Returns:
        `states` (B, K + 1, *E), the first of which is the student's, and the conditions.
    """
    noise = setting.first_state(batch["noise"])
    times = torch.cat([setting.grid, steps.times]).unique().flip(0)
    path = walk(replace(setting.solver, calibration=None), setting.velocity(batch), noise, times)

    # States at the times of the schedule.
    schedule_times = steps.times.tolist()
    states = []
    for state, t in zip(path, times.tolist(), strict=True):
        if t in schedule_times:
            states.append(state.x)
    states[0] = steps.initial_state(noise, setting.classes(batch))

    conditions = {key: batch[key] for key in ("label", "condition") if key in batch}
    return {"states": torch.stack(states, dim=1), **conditions}


@torch.no_grad()
def student_states(
    setting: Setting, states: States, start: str | None, times: Tensor, batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the states `x` (B, *E) after Euler steps.

    Args:
        setting: The setting, with the student as its model.
        states: The states that exist.
        start: Name of the states to start from; None: the schedule's first.
        times: The times of the steps.
        batch: A batch of noises with their conditions.
    """
    rows = []
    for i in noise_numbers(batch):
        if start is None:
            rows.append(states.row("teacher", i)["states"][0])
        else:
            rows.append(states.row(start, i)["x"])
    x = torch.stack(rows).to(batch["noise"])
    path = walk(Euler(), setting.velocity(batch), x, times)
    return {"x": list(path)[-1].x}


class Jumps(Dataset):
    """An endless stream of jumps {x, target, step, label, condition} of the steps in a span.

    `x` and `target` are (*E); `condition` is there if the noises have one.

    Args:
        states: The states that exist.
        span: The steps of the stage.
        seed: Seed of the stream.
        progressive: x is the state before the span; else the teacher's before the step.
        start: Name of the states before the span; None: the teacher's.
    """

    def __init__(
        self, states: States, span: range, seed: int, progressive: bool, start: str | None
    ):
        self.states = states
        self.span = span
        self.seed = seed
        self.progressive = progressive
        self.start = start

    def __getitem__(self, i: int) -> dict[str, Tensor | int]:
        # Noise and step.
        noise = shuffled(i, len(self.states.noises), self.seed, 0)
        draw = np.random.default_rng((self.seed, 1, i))
        step = int(draw.integers(self.span.start, self.span.stop))

        # States before and after.
        conditions = self.states.row("teacher", noise)
        path = conditions.pop("states")
        x = path[self.span.start if self.progressive else step]
        if self.start is not None:
            x = self.states.row(self.start, noise)["x"]
        return {"x": x, "target": path[step + 1], "step": step, **conditions}
