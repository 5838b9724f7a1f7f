"""GenEval as two Lightning loops: every schedule's pictures of every prompt, then a detector's verdicts on them.

Each picture and each batch of verdicts is a file of its own in the run folder, so a run that was killed goes on with
what is missing, and any number of ranks leaves the same results. Legend: P prompts, I pictures of each; picture n is
the (n % I)-th of prompt n // I.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from oss_exp.data.noise import HELD_OUT, NoiseDataset
from oss_exp.evaluation.pictures import as_bytes, encoded
from oss_exp.files import find_asset, load_records, write_atomically
from oss_exp.geneval.detectors import Detector, look
from oss_exp.geneval.rules import VerdictRecord, Wish, read_metadata
from oss_exp.models.base import Model
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import nfe
from oss_exp.tasks.run import Run
from oss_exp.tasks.search import plan
from oss_exp.tasks.setting import Setting
from oss_exp.tasks.task import Count, Task

FIRST = 2 * HELD_OUT  # index of the first picture's noise: none that a search or an evaluation sees


@dataclass(frozen=True, kw_only=True)
class GenEval(Task):
    """Plan `stepsize` on some prompts, make and judge `images_per_prompt` pictures of each, write geneval.json.

    In a folder that an earlier run of the same configuration left (hydra.run.dir), it goes on from there.
    """

    images_per_prompt: Count = 4
    detector: Detector

    def __call__(self, cfg: DictConfig) -> None:
        if "prompts" not in cfg.data:
            raise ValueError(
                "GenEval needs a model of prompts: set data=prompts data.prompts=FILE.jsonl"
            )
        wanted = read_metadata(find_asset(cfg.data.prompts, "prompts"))
        run, count = Run(cfg), self.images_per_prompt
        if alone := [name for name, strategy in run.strategies.items() if strategy.per_sample]:
            raise ValueError(
                f"{alone[0]} has a schedule for each sample, and these are others; leave it out of stepsize"
            )
        plan(run)
        files = [run.file(name, k) for name in run.strategies for k in run.num_steps]
        schedules = {"teacher": run.setting.teacher} | {
            file.stem: StepSchedule.load(file) for file in files
        }

        batches = torch.arange(len(wanted) * count).split(cfg.data.batch_size)
        maker = Maker(
            run.setting,
            schedules,
            run.folder,
            [batch.tolist() for batch in batches],
            cfg.data.seed,
            count,
        )
        judge = Judge(self.detector, list(schedules), run.folder, maker.batches, wanted, count)
        for module in (maker, judge):  # what is missing is known when the one before has ended
            loaders = [DataLoader(missing, batch_size=None) for missing in module.missing()]
            if any(len(loader) for loader in loaders):
                run.trainer.predict(module, loaders, return_predictions=False)

        velocity = run.setting.model.velocity(torch.zeros(1, dtype=torch.long))
        rows = [
            {
                "label": label,
                "num_steps": steps.num_steps,
                "nfe": nfe(run.setting.solver, steps, velocity),
                "verdicts": judge.verdicts(label),
            }
            for label, steps in schedules.items()
        ]
        about = {
            "detector": self.detector.fingerprint,
            "prompts": wanted,
            "images_per_prompt": count,
        }
        record = {**run.about, **about, "rows": rows}
        rank_zero_only(write_atomically)(run.folder / "geneval.json", json.dumps(record) + "\n")


# --------------------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------------------


class Maker(L.LightningModule):
    """Loader l brings noises of pictures that schedule l has still to make; each is written as soon as it is there.

    batches: of pictures' numbers, which are made together by whatever rank, for a sum's rounding may depend on that.
    """

    def __init__(
        self,
        setting: Setting,
        schedules: Mapping[str, StepSchedule],
        folder: Path,
        batches: Sequence[Sequence[int]],
        seed: int,
        count: int,
    ):
        super().__init__()
        self.model = setting.model  # registered, so that Lightning moves it to the device
        self.setting, self.schedules, self.folder = setting, schedules, folder
        self.batches, self.seed, self.count = batches, seed, count

    def missing(self) -> list[Noises]:
        return [
            Noises(
                [batch for batch in self.batches if self._wanted(label, batch)],
                self.seed,
                self.count,
                self.model,
            )
            for label in self.schedules
        ]

    def predict_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        label, steps = list(self.schedules.items())[dataloader_idx]
        numbers, noise = batch["numbers"].tolist(), self.setting.first_state(batch["noise"])
        images = (
            as_bytes(self.model.generate(self.setting.solver, steps, noise, batch["prompts"]))
            .cpu()
            .numpy()
        )
        wanted = self._wanted(label, numbers)
        for number, image in zip(numbers, images, strict=True):
            if number in wanted:
                write_atomically(picture(self.folder, label, number), encoded(image))

    def on_predict_end(self) -> None:
        self.trainer.strategy.barrier("pictures are on disk")

    def _wanted(self, label: str, numbers: Sequence[int]) -> list[int]:
        return [number for number in numbers if not picture(self.folder, label, number).is_file()]


class Noises(Dataset):
    """Items {numbers (b,), prompts (b,), noise (b, *E)}, each noise a function of (seed, number) alone."""

    def __init__(self, batches: Sequence[Sequence[int]], seed: int, count: int, model: Model):
        self.batches, self.count = batches, count
        self.noise = NoiseDataset(
            seed, FIRST, 1 + max(map(max, batches), default=0), model.event_shape, None
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        numbers = torch.tensor(self.batches[position])
        noise = torch.stack([self.noise[number]["noise"] for number in self.batches[position]])
        return {"numbers": numbers, "prompts": numbers // self.count, "noise": noise}


def picture(folder: Path, label: str, number: int) -> Path:
    return folder / "images" / label / f"{number:06d}.png"


# --------------------------------------------------------------------------------------------------------------
# Verdicts
# --------------------------------------------------------------------------------------------------------------


class Judge(L.LightningModule):
    """Loader l brings batches of pictures of schedule l that have no verdicts yet; a batch's are one file of lines."""

    def __init__(
        self,
        detector: Detector,
        labels: Sequence[str],
        folder: Path,
        batches: Sequence[Sequence[int]],
        wanted: Sequence[Wish],
        count: int,
    ):
        super().__init__()
        self.detector, self.labels, self.folder = detector, labels, folder
        self.batches, self.wanted, self.count = batches, wanted, count

    def missing(self) -> list[Pictures]:
        return [
            Pictures(
                [batch for batch in self.batches if not self._file(label, batch).is_file()],
                self.folder,
                label,
            )
            for label in self.labels
        ]

    def predict_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        numbers, images, lines = batch["numbers"].tolist(), batch["images"], []
        for number, image, seen in zip(numbers, images, self.detector.detect(images), strict=True):
            verdict = look(self.detector, image, seen, self.wanted[number // self.count])
            objects = {
                name: [[round(each, 4) for each in box] for box in own]
                for name, own in verdict.objects.items()
            }
            lines.append({"number": number, "reasons": list(verdict.reasons), "objects": objects})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(self._file(self.labels[dataloader_idx], numbers), text)

    def on_predict_end(self) -> None:
        self.trainer.strategy.barrier("verdicts are on disk")

    def verdicts(self, label: str) -> list[dict[str, Any]]:
        """Of all pictures of a schedule, in order."""
        files = [self._file(label, batch) for batch in self.batches]
        remedy = "remove it, and it is made again"
        lines = [
            line for file in files for line in load_records(file, VerdictRecord, "verdicts", remedy)
        ]
        return [line.model_dump() for line in lines]

    def _file(self, label: str, numbers: Sequence[int]) -> Path:
        return self.folder / "verdicts" / label / f"{numbers[0]:06d}.jsonl"


class Pictures(Dataset):
    """Items {numbers (b,), images (b, 3, H, W) in [0, 1]}, read from their files."""

    def __init__(self, batches: Sequence[Sequence[int]], folder: Path, label: str):
        self.batches, self.folder, self.label = batches, folder, label

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        files = [picture(self.folder, self.label, number) for number in self.batches[position]]
        pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        images = torch.from_numpy(pixels).movedim(-1, 1) / 255
        return {"numbers": torch.tensor(self.batches[position]), "images": images}
