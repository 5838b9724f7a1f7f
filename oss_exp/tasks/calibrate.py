"""Tabulate the teacher's amplitudes for `solver.calibration`: `task=calibrate`.

The task also measures what that table does to few-step students.
Legend: b samples of a batch, P points of a path in time, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Ge, Le
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import Tensor

from oss_exp.calibration import Calibration, amplitude
from oss_exp.call_counter import CallCounter
from oss_exp.data.noise import HELD_OUT
from oss_exp.files import write_atomically
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import sample, walk
from oss_exp.tasks.collective import DistributedCollective, require_noises
from oss_exp.tasks.run import Run
from oss_exp.tasks.search import plan
from oss_exp.tasks.setting import Setting
from oss_exp.tasks.task import Task
from oss_exp.velocity import BoundVelocity

Batch = dict[str, Tensor]
Points = Iterable[tuple[float, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Calibrate(Task):
    """Plan `stepsize`, and run the teacher on `samples` noises.

    Writes calibration.json, the table, and amplitude.json, the curves to draw.

    Attributes:
        samples: Number of noises.
        per_channel: Make a table for every channel.
        last_step_only: Calibrate before the last network call and before no other.
    """

    samples: Annotated[int, Ge(1), Le(HELD_OUT)] = 512
    per_channel: bool = False
    last_step_only: bool = False

    def __call__(self, cfg: DictConfig) -> None:
        run = Run(cfg)
        if run.setting.solver.calibration is not None:
            raise ValueError("task=calibrate runs the solver as it is; set solver.calibration=null")
        if run.per_sample:
            raise ValueError(
                f"stepsize {', '.join(run.per_sample)} plans one schedule per sample, which has no "
                "mean amplitude in time; choose strategies that plan one for all, such as "
                "stepsize=[ddim,oss_shared]"
            )
        require_noises(run.trainer, self.samples, "task.samples")

        # Schedules.
        plan(run)
        students: dict[tuple[str, int], StepSchedule] = {}
        for k in run.num_steps:
            for name in run.strategies:
                students[name, k] = StepSchedule.load(run.file(name, k))

        # Amplitudes.
        module = CalibrateModule(
            run.setting,
            students,
            run.folder,
            run.about,
            per_channel=self.per_channel,
            last_step_only=self.last_step_only,
        )
        loader = run.noises(search_samples=self.samples).predict_dataloader()[0]
        run.trainer.predict(module, dataloaders=loader, return_predictions=False)


class CalibrateModule(L.LightningModule):
    """A Lightning loop over noises that measures amplitudes.

    It measures the teacher's at its nodes, then those of the students with and without the table.
    Writes `<folder>/calibration.json` (a `Calibration`) and `<folder>/amplitude.json` (curves).

    Args:
        setting: Model, grid, solver and distance.
        students: Schedules by (strategy, K), each one for all samples.
        folder: The run folder.
        provenance: The provenance of the run.
        per_channel: Make a table for every channel.
        last_step_only: Calibrate before the last network call and before no other.
    """

    def __init__(
        self,
        setting: Setting,
        students: Mapping[tuple[str, int], StepSchedule],
        folder: Path,
        provenance: Mapping[str, Any],
        per_channel: bool,
        last_step_only: bool,
    ):
        super().__init__()
        self.model = setting.model  # registered, so that Lightning moves it to the device
        self.setting = setting
        self.students = students
        self.folder = folder
        self.provenance = provenance
        self.per_channel = per_channel
        self.last_step_only = last_step_only
        self.batches: list[Batch] = []

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return batch["index"]

    def on_predict_epoch_end(self) -> None:
        # Samples of this rank, and of all.
        samples = sum(len(batch["index"]) for batch in self.batches)
        self.samples = int(DistributedCollective().sum(torch.tensor(samples, device=self.device)))

        counter = CallCounter(show=rank_zero_only.rank == 0)
        calls = self.setting.solver.evals_per_step
        with counter.progress:
            # Teacher.
            num_nodes = len(self.setting.grid)
            with counter.measure("teacher", calls * (num_nodes - 1), samples):
                times, low, high = self._mean(self._teacher, counter)
            provenance = {**self.provenance, "samples": self.samples}
            calibration = Calibration(self.setting.grid, low, high, self.last_step_only, provenance)
            curves = [curve("teacher", len(times) - 1, False, times, low, high)]

            # Students, without the table and with it.
            for (name, k), steps in self.students.items():
                for table in (None, calibration):
                    with counter.measure(f"{name} K={k}", calls * k, samples):
                        measured = self._mean(self._student(steps, table), counter)
                    curves.append(curve(name, k, table is not None, *measured))
        self._write(calibration, curves)
        self.trainer.strategy.barrier("the calibration is on disk")

    def _mean(
        self, follow: Callable[[BoundVelocity, Batch], Points], counter: CallCounter
    ) -> tuple[list[float], Tensor, Tensor]:
        """Return the mean amplitudes of paths over the samples of all ranks.

        Args:
            follow: Yields (t, x (b, *E)) at the P points of a batch's paths.
            counter: The counter of network calls.

        Returns:
            The P times, and the mean low and high amplitudes, (P,) or (P, C) float64.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in self.batches:
            times = []
            sums = []
            for t, x in follow(counter.counted(self.setting.velocity(batch)), batch):
                times.append(t)
                sums.append(torch.stack(amplitude(x, self.per_channel)).sum(1))
            total = total + torch.stack(sums, dim=1)
        low, high = (DistributedCollective().sum(total) / self.samples).cpu()
        return times, low, high

    def _teacher(self, velocity: BoundVelocity, batch: Batch) -> Points:
        for state in walk(self.setting.solver, velocity, self._noise(batch), self.setting.grid):
            yield float(state.t[0]), state.x

    def _student(
        self, steps: StepSchedule, table: Calibration | None
    ) -> Callable[[BoundVelocity, Batch], Points]:
        """Return the function that follows a student.

        Its points are those before every network call, with a table also the calibrated ones,
        and the final one.
        """

        def follow(velocity: BoundVelocity, batch: Batch) -> Points:
            points = []

            def watch(x: Tensor, t: Tensor, is_last: bool) -> Tensor:
                time = float(t.flatten()[0])
                points.append((time, x))
                if table is not None:
                    x = table(x, t, is_last)
                    points.append((time, x))
                return x

            solver = replace(self.setting.solver, calibration=watch)
            group = self.setting.classes(batch)
            final = sample(solver, velocity, self._noise(batch), steps, group=group)
            return [*points, (0.0, final)]

        return follow

    def _noise(self, batch: Batch) -> Tensor:
        return self.setting.first_state(batch["noise"])

    @rank_zero_only
    def _write(self, calibration: Calibration, curves: list[dict[str, Any]]) -> None:
        calibration.save(self.folder / "calibration.json")
        content = {
            "model": calibration.provenance["model"],
            "samples": self.samples,
            "curves": curves,
        }
        write_atomically(self.folder / "amplitude.json", json.dumps(content, indent=1) + "\n")


def curve(
    strategy: str, num_steps: int, calibrated: bool, times: list[float], low: Tensor, high: Tensor
) -> dict[str, Any]:
    """Return a curve of amplitude.json: low and high, (P,) or (P, C), from noise to data."""
    return {
        "strategy": strategy,
        "num_steps": num_steps,
        "calibrated": calibrated,
        "times": times,
        "low": low.tolist(),
        "high": high.tolist(),
    }
