"""Evaluation as a Lightning loop: the same held-out noises through the teacher and every schedule.

PSNR per image, and the spread: the 5 to 95 % amplitude of a sample relative to the teacher's (below 1: it blurs).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from oss_exp.calibration import amplitude
from oss_exp.evaluation.psnr import Interval, psnr
from oss_exp.files import write_atomically
from oss_exp.solvers import nfe, sample
from oss_exp.steps import StepSchedule
from oss_exp.tasks.collective import DistributedCollective
from oss_exp.tasks.data import HELD_OUT
from oss_exp.tasks.search import Setting

SHOWN = 8  # images a row in the picture of samples


class EvaluateModule(L.LightningModule):
    """Measures schedules {label: StepSchedule} against the teacher; `rows` holds what the table says of each label.

    Writes `<folder>/metrics.json` (means, intervals, every image's PSNR) and `<folder>/samples.npz` (the first images).
    """

    def __init__(
        self,
        setting: Setting,
        schedules: Mapping[str, StepSchedule],
        rows: Mapping[str, Mapping[str, Any]],
        folder: Path,
        about: Mapping[str, Any],
    ):
        super().__init__()
        self.model = setting.model  # registered, so that Lightning moves it to the device
        self.setting, self.schedules, self.rows, self.folder, self.about = setting, schedules, rows, folder, about
        self.values: dict[str, list[Tensor]] = {label: [] for label in schedules}
        self.pictures: dict[str, list[tuple[Tensor, Tensor]]] = {label: [] for label in ("teacher", *schedules)}

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        index, condition = batch["index"], self.setting.condition(batch["label"])
        velocity = self.velocity = self.setting.velocity(batch["label"])
        noise = self.setting.first_state(batch["noise"])
        solver = self.setting.solver
        reference = sample(replace(solver, calibration=None), velocity, noise, self.setting.teacher)
        teacher, width = self.model.decode(reference), spread(reference)
        self._keep("teacher", index, teacher)
        for label, steps in self.schedules.items():
            known = torch.arange(len(index), device=index.device)
            if steps.samples is not None:
                known = torch.isin(index, torch.tensor(steps.samples, device=index.device)).nonzero()[:, 0]
                if len(known) == 0:
                    continue
                steps = steps.rows(index[known].tolist())
            group = None if condition is None else condition[known]
            x0 = sample(solver, velocity.subset(known), noise[known], steps, group=group)
            images = self.model.decode(x0)
            values = index[known].double(), psnr(images, teacher[known]).double(), spread(x0) / width[known]
            self.values[label].append(torch.stack(values, dim=1))
            self._keep(label, index[known], images)

    def _keep(self, label: str, index: Tensor, images: Tensor) -> None:
        """Remember the first held-out samples for the picture, whichever batch and rank they are in."""
        shown = index < HELD_OUT + SHOWN
        self.pictures[label].append((index[shown], as_bytes(images[shown])))

    def on_test_epoch_end(self) -> None:
        collective = DistributedCollective()
        records = []
        for label, steps in self.schedules.items():
            table = collective.gather(
                torch.cat(self.values[label] or [torch.zeros(0, 3, dtype=torch.float64, device=self.device)])
            )
            # A distributed sampler may repeat samples to even out the ranks.
            index, first = np.unique(table[:, 0].cpu().numpy().astype(int), return_index=True)
            if len(index) == 0:
                raise ValueError(f"{label} has per-sample schedules for none of the held-out samples; plan it again")
            value, ratio = table[:, 1:].cpu().numpy()[first].T
            records.append(
                {
                    **self.rows[label],
                    "nfe": nfe(self.setting.solver, steps, self.velocity),
                    "psnr": Interval.of(value).to_dict(),
                    "spread": Interval.of(ratio).to_dict(),
                    "per_image": {"index": index.tolist(), "psnr": value.round(4).tolist()},
                }
            )
        pictures = {}
        for label, parts in self.pictures.items():
            template = self.pictures["teacher"][0]
            index = collective.gather(torch.cat([index for index, _ in parts] or [template[0][:0]]))
            images = collective.gather(torch.cat([image for _, image in parts] or [template[1][:0]]))
            first = np.unique(index.cpu().numpy(), return_index=True)[1]
            if len(first) == min(SHOWN, self.trainer.datamodule.eval_samples):
                pictures[label] = images.cpu().numpy()[first]
        self._write(records, pictures)
        self.trainer.strategy.barrier("metrics are on disk")

    @rank_zero_only
    def _write(self, records: list[dict[str, Any]], pictures: dict[str, np.ndarray]) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **pictures)
        write_atomically(self.folder / "samples.npz", buffer.getvalue())
        write_atomically(self.folder / "metrics.json", json.dumps({**self.about, "rows": records}, indent=1) + "\n")


def spread(x: Tensor) -> Tensor:
    """(B, *E) -> (B,) float64, from the 5 to the 95 % quantile of each sample."""
    low, high = amplitude(x, per_channel=False)
    return high - low


def as_bytes(images: Tensor) -> Tensor:
    """(B, C, H, W) in [0, 1] -> uint8 (B, H, W, C); of a video (B, C, F, H, W) the middle frame."""
    if images.ndim == 5:
        images = images[:, :, images.shape[2] // 2]
    return (images * 255).round().byte().movedim(1, -1).contiguous()
