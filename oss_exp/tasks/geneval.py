"""Judge the pictures of prompts by GenEval's rules: `task=geneval`, as two Lightning loops.

The first makes the pictures of every prompt with every schedule, the second has a detector judge
them. Every picture and every batch of verdicts is a file in the run folder, so a run that was
killed resumes with what is missing, and any number of ranks gives the same results.
Legend: P prompts, I pictures of each; picture n is the (n % I)-th of prompt n // I.
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
from pydantic import TypeAdapter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from oss_exp.data.noise import HELD_OUT, NoiseDataset
from oss_exp.evaluation.pictures import as_bytes, encoded
from oss_exp.files import find_asset, load_record, load_records, write_atomically
from oss_exp.geneval.detectors import Detector, look
from oss_exp.geneval.rules import VerdictRecord, Wish, read_metadata
from oss_exp.models.base import Model
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import nfe
from oss_exp.tasks.collective import agreed, for_every_rank
from oss_exp.tasks.run import Run
from oss_exp.tasks.search import plan
from oss_exp.tasks.setting import Setting
from oss_exp.tasks.task import Count, Task

TEACHER = "teacher"  # label of the teacher's pictures
ROW_COSTS = TypeAdapter(list[tuple[float, float]])  # (time, network rows that a row of x costs)
Batch = Sequence[int]  # the numbers of its pictures
FIRST = 2 * HELD_OUT  # index of the first noise, beyond those of searches and evaluations


@dataclass(frozen=True, kw_only=True)
class GenEval(Task):
    """Plan `stepsize` on some prompts, then make and judge pictures of all.

    Writes geneval.json. In the folder of an earlier run of the same configuration
    (hydra.run.dir), it resumes.

    Attributes:
        images_per_prompt: Pictures of every prompt.
        detector: The detector that judges them.
    """

    images_per_prompt: Count = 4
    detector: Detector

    def __call__(self, cfg: DictConfig) -> None:
        if "prompts" not in cfg.data:
            raise ValueError(
                "GenEval needs a model of prompts: set data=prompts data.prompts=FILE.jsonl"
            )
        wishes = read_metadata(find_asset(cfg.data.prompts, "prompts"))

        # Schedules.
        run = Run(cfg)
        if run.per_sample:
            raise ValueError(
                f"{run.per_sample[0]} has a schedule for each sample, and GenEval draws others; "
                "leave it out of stepsize"
            )
        plan(run)
        schedules = {TEACHER: run.setting.teacher}
        for name in run.strategies:
            for k in run.num_steps:
                file = run.file(name, k)
                schedules[file.stem] = StepSchedule.load(file)

        # Pictures, then verdicts: what is missing of one is known when the other has ended.
        count = self.images_per_prompt
        numbers = torch.arange(len(wishes) * count)
        batches = [batch.tolist() for batch in numbers.split(cfg.data.batch_size)]
        maker = Maker(run.setting, schedules, run.folder, batches, cfg.data.seed, count)
        judge = Judge(self.detector, list(schedules), run.folder, batches, wishes, count)
        for module in (maker, judge):
            missing = agreed(run.trainer, module.missing)
            loaders = []
            for label, lacking in missing.items():
                dataset = module.dataset(label, for_every_rank(lacking, run.trainer))
                loaders.append(DataLoader(dataset, batch_size=None))
            if any(missing.values()):
                run.trainer.predict(module, loaders, return_predictions=False)

        self._write(run, schedules, judge, wishes)

    def _write(
        self,
        run: Run,
        schedules: Mapping[str, StepSchedule],
        judge: Judge,
        wishes: Sequence[Wish],
    ) -> None:
        """Write geneval.json."""
        velocity = run.setting.model.velocity(torch.zeros(1, dtype=torch.long))
        rows = []
        for label, steps in schedules.items():
            row = {
                "label": label,
                "num_steps": steps.num_steps,
                "nfe": nfe(run.setting.solver, steps, velocity),
                "verdicts": judge.verdicts(label),
            }
            rows.append(row)

        record = {
            **run.about,
            "detector": self.detector.fingerprint,
            "prompts": wishes,
            "images_per_prompt": self.images_per_prompt,
            "rows": rows,
        }
        rank_zero_only(write_atomically)(run.folder / "geneval.json", json.dumps(record) + "\n")


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------


class Maker(L.LightningModule):
    """A Lightning loop that makes the missing pictures, and writes each at once.

    Loader i brings the noises for schedule i. Pictures of a batch are always made together,
    because the rounding of a sum may depend on the batch.

    Args:
        setting: Model, grid, solver and distance.
        schedules: The schedules by label.
        folder: The run folder.
        batches: The numbers of the pictures, in batches.
        seed: Seed of the noises.
        count: Pictures of every prompt.
    """

    def __init__(
        self,
        setting: Setting,
        schedules: Mapping[str, StepSchedule],
        folder: Path,
        batches: Sequence[Batch],
        seed: int,
        count: int,
    ):
        super().__init__()
        self.model = setting.model  # registered, so that Lightning moves it to the device
        self.setting = setting
        self.schedules = schedules
        self.folder = folder
        self.batches = batches
        self.seed = seed
        self.count = count
        self._load_row_costs()

    def missing(self) -> dict[str, list[Batch]]:
        """Return the batches that lack pictures, for every schedule."""
        missing = {}
        for label in self.schedules:
            missing[label] = [batch for batch in self.batches if self._lacking(label, batch)]
        return missing

    def dataset(self, label: str, batches: Sequence[Batch]) -> Noises:
        """Return the noises of batches for a schedule."""
        return Noises(batches, self.seed, self.count, self.model)

    def predict_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        label, steps = list(self.schedules.items())[dataloader_idx]
        numbers = batch["numbers"].tolist()

        # All pictures of the batch, of which the missing ones are written.
        model = self.model
        solver = self.setting.solver
        if label == TEACHER:
            model = model.original
            solver = self.setting.teacher_solver
        noise = self.setting.first_state(batch["noise"])
        images = model.generate(solver, steps, noise, batch["prompts"])
        pictures = as_bytes(images).cpu().numpy()
        self._save_row_costs()
        lacking = self._lacking(label, numbers)
        for number, image in zip(numbers, pictures, strict=True):
            if number in lacking:
                write_atomically(picture(self.folder, label, number), encoded(image))

    def on_predict_end(self) -> None:
        self.trainer.strategy.barrier("pictures are on disk")

    @property
    def _row_costs(self) -> Path:
        """The file of the costs that calls tell; a resumed run may call the network no more."""
        return self.folder / "images" / "row_costs.json"

    @rank_zero_only
    def _save_row_costs(self) -> None:
        if self.model.row_costs:
            costs = sorted(self.model.row_costs.items())
            write_atomically(self._row_costs, json.dumps(costs) + "\n")

    def _load_row_costs(self) -> None:
        if self._row_costs.is_file():
            remedy = "choose another folder"
            costs = load_record(self._row_costs, ROW_COSTS, "costs of network calls", remedy)
            self.model.row_costs.update(costs)

    def _lacking(self, label: str, numbers: Sequence[int]) -> list[int]:
        return [number for number in numbers if not picture(self.folder, label, number).is_file()]


class Noises(Dataset):
    """Batches {numbers (b,), prompts (b,), noise (b, *E)}.

    A noise is a function of (seed, number) alone.

    Args:
        batches: The numbers of the pictures, in batches.
        seed: Seed of the noises.
        count: Pictures of every prompt.
        model: The model, for the shape of the noises.
    """

    def __init__(self, batches: Sequence[Batch], seed: int, count: int, model: Model):
        self.batches = batches
        self.count = count
        last = max(map(max, batches), default=0)
        self.noise = NoiseDataset(seed, FIRST, 1 + last, model.event_shape, None)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        numbers = torch.tensor(self.batches[position])
        noise = torch.stack([self.noise[number]["noise"] for number in self.batches[position]])
        return {"numbers": numbers, "prompts": numbers // self.count, "noise": noise}


def picture(folder: Path, label: str, number: int) -> Path:
    """Return the path of a picture."""
    return folder / "images" / label / f"{number:06d}.png"


# --------------------------------------------------------------------------------------------------
# Verdicts
# --------------------------------------------------------------------------------------------------


class Judge(L.LightningModule):
    """A Lightning loop that judges the pictures that have no verdicts yet.

    Loader i brings the pictures of schedule i. The verdicts of a batch are one file of lines.

    Args:
        detector: The detector.
        labels: The labels of the schedules.
        folder: The run folder.
        batches: The numbers of the pictures, in batches.
        wishes: What every prompt asks for.
        count: Pictures of every prompt.
    """

    def __init__(
        self,
        detector: Detector,
        labels: Sequence[str],
        folder: Path,
        batches: Sequence[Batch],
        wishes: Sequence[Wish],
        count: int,
    ):
        super().__init__()
        self.detector = detector
        self.labels = labels
        self.folder = folder
        self.batches = batches
        self.wishes = wishes
        self.count = count

    def missing(self) -> dict[str, list[Batch]]:
        """Return the batches that lack verdicts, for every schedule."""
        missing = {}
        for label in self.labels:
            lacking = [batch for batch in self.batches if not self._file(label, batch).is_file()]
            missing[label] = lacking
        return missing

    def dataset(self, label: str, batches: Sequence[Batch]) -> Pictures:
        """Return the pictures of batches of a schedule."""
        return Pictures(batches, self.folder, label)

    def predict_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        numbers = batch["numbers"].tolist()
        images = batch["images"]

        # A line for every picture.
        lines = []
        for number, image, detected in zip(
            numbers, images, self.detector.detect(images), strict=True
        ):
            wish = self.wishes[number // self.count]
            verdict = look(self.detector, image, detected, wish)
            objects: dict[str, list[list[float]]] = {}
            for name, boxes in verdict.objects.items():
                objects[name] = [[round(edge, 4) for edge in box] for box in boxes]
            line = {"number": number, "reasons": list(verdict.reasons), "objects": objects}
            lines.append(json.dumps(line) + "\n")

        file = self._file(self.labels[dataloader_idx], numbers)
        write_atomically(file, "".join(lines))

    def on_predict_end(self) -> None:
        self.trainer.strategy.barrier("verdicts are on disk")

    def verdicts(self, label: str) -> list[dict[str, Any]]:
        """Return the verdicts on all pictures of a schedule, in order."""
        remedy = "remove it, and it is made again"
        verdicts = []
        for batch in self.batches:
            file = self._file(label, batch)
            for record in load_records(file, VerdictRecord, "verdicts", remedy):
                verdicts.append(record.model_dump())
        return verdicts

    def _file(self, label: str, numbers: Sequence[int]) -> Path:
        return self.folder / "verdicts" / label / f"{numbers[0]:06d}.jsonl"


class Pictures(Dataset):
    """Batches {numbers (b,), images (b, 3, H, W) in [0, 1]}, read from files.

    Args:
        batches: The numbers of the pictures, in batches.
        folder: The run folder.
        label: The label of the schedule.
    """

    def __init__(self, batches: Sequence[Batch], folder: Path, label: str):
        self.batches = batches
        self.folder = folder
        self.label = label

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        numbers = self.batches[position]
        arrays = []
        for number in numbers:
            image = Image.open(picture(self.folder, self.label, number))
            arrays.append(np.asarray(image.convert("RGB")))
        images = torch.from_numpy(np.stack(arrays)).movedim(-1, 1) / 255
        return {"numbers": torch.tensor(numbers), "images": images}
