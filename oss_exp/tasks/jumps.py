"""The jumps that a stage learns: what the teacher does in a step of a schedule, and where a student stands before it.

Legend: B samples, K steps, *E event dims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
    """Mean squared error of the states that jumps of `step` (B,) come to, against target (B, *E), () float32.

    x (B, *E): the state before the jump; progressive: before the span, through which it first goes by the same network.
    """
    velocity, x, step = setting.velocity(batch), batch["x"], batch["step"]
    if progressive:
        with torch.no_grad():
            for earlier in range(span.start, int(step.max())):
                rows = (step > earlier).nonzero()[:, 0]
                x = x.index_copy(
                    0,
                    rows,
                    jump(velocity.subset(rows), x[rows], steps, torch.full_like(rows, earlier)),
                )
    return F.mse_loss(jump(velocity, x, steps, step), batch["target"])


def jump(velocity: BoundVelocity, x: Tensor, steps: StepSchedule, step: Tensor) -> Tensor:
    """Euler's jump from times[step] to times[step + 1]: x (B, *E), step (B,) -> (B, *E)."""
    times = steps.times.to(x.device)
    t, t_next = times[step], times[step + 1]
    return x + rowwise(t_next - t, x) * velocity(x, t)


# --------------------------------------------------------------------------------------------------------------
# States
# --------------------------------------------------------------------------------------------------------------


class States:
    """Tensors of training noises, a file of safetensors for each batch: made once, by whatever rank or job."""

    def __init__(self, folder: Path, noises: Dataset, size: int):
        self.folder, self.noises, self.size = folder, noises, size

    def file(self, name: str, i: int) -> Path:
        """The one that training noise i is in."""
        return self.folder / name / f"{i // self.size:06d}.safetensors"

    def row(self, name: str, i: int) -> dict[str, Tensor]:
        """All that is kept of training noise i."""
        with safe_open(self.file(name, i), "pt") as file:
            return {key: file.get_slice(key)[i % self.size :][0] for key in file.keys()}  # noqa: SIM118

    def make(self, name: str, model: nn.Module, compute: Compute, trainer: L.Trainer) -> None:
        """What is missing of `compute`, of batches of noises with their conditions -> rows of each, with this model."""
        batches = torch.arange(len(self.noises)).split(self.size)
        missing = [
            batch.tolist() for batch in batches if not self.file(name, int(batch[0])).is_file()
        ]
        if missing:
            loader = DataLoader(Batches(self.noises, missing), batch_size=None)
            trainer.predict(
                StateMaker(self, name, model, compute), loader, return_predictions=False
            )


class Batches(Dataset):
    """Item n: the n-th of these batches of items, collated."""

    def __init__(self, items: Dataset, batches: Sequence[Sequence[int]]):
        self.items, self.batches = items, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return default_collate([self.items[i] for i in self.batches[position]])


class StateMaker(L.LightningModule):
    """Writes what is computed of each batch of noises."""

    def __init__(self, states: States, name: str, model: nn.Module, compute: Compute):
        super().__init__()
        self.model = model  # registered, so that Lightning moves it to the device
        self.states, self.name, self.compute = states, name, compute

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        made = {key: value.cpu().contiguous() for key, value in self.compute(batch).items()}
        write_atomically(self.states.file(self.name, place(batch)[0]), safetensors.torch.save(made))

    def on_predict_end(self) -> None:
        self.trainer.strategy.barrier("states are on disk")


def place(batch: Mapping[str, Tensor]) -> list[int]:
    """Which training noises these are."""
    return (batch["index"] - TRAINING).tolist()


@torch.no_grad()
def teacher_states(
    setting: Setting, steps: StepSchedule, batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """states (B, K + 1, *E), the student's first and the teacher's at the later times of its schedule; and conditions.

    Times that are no nodes of the teacher's grid are further steps of it.
    """
    noise = setting.first_state(batch["noise"])
    times = torch.cat([setting.grid, steps.times]).unique().flip(0)
    path = walk(replace(setting.solver, calibration=None), setting.velocity(batch), noise, times)
    states = [
        state.x for state, t in zip(path, times.tolist(), strict=True) if t in steps.times.tolist()
    ]
    states[0] = steps.initial_state(noise, setting.classes(batch))
    conditions = {key: batch[key] for key in ("label", "condition") if key in batch}
    return {"states": torch.stack(states, dim=1), **conditions}


@torch.no_grad()
def student_states(
    setting: Setting, states: States, start: str | None, times: Tensor, batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """x (B, *E): where Euler steps through `times` lead from states `start`, None: from a schedule's first."""
    rows = [
        states.row("teacher", i)["states"][0] if start is None else states.row(start, i)["x"]
        for i in place(batch)
    ]
    path = walk(Euler(), setting.velocity(batch), torch.stack(rows).to(batch["noise"]), times)
    return {"x": list(path)[-1].x}


class Jumps(Dataset):
    """An endless stream of jumps {x, target (*E), step, label, condition where there is one} of the steps in a span.

    x: the teacher's before the step; progressive: before the span, from states `start` or the schedule's first.
    """

    def __init__(
        self, states: States, span: range, seed: int, progressive: bool, start: str | None
    ):
        self.states, self.span, self.seed, self.progressive, self.start = (
            states,
            span,
            seed,
            progressive,
            start,
        )

    def __getitem__(self, i: int) -> dict[str, Tensor | int]:
        noise = shuffled(i, len(self.states.noises), self.seed, 0)
        step = int(
            np.random.default_rng((self.seed, 1, i)).integers(self.span.start, self.span.stop)
        )
        found = self.states.row("teacher", noise)
        path = found.pop("states")
        x = path[self.span.start if self.progressive else step]
        x = x if self.start is None else self.states.row(self.start, noise)["x"]
        return {"x": x, "target": path[step + 1], "step": step, **found}
