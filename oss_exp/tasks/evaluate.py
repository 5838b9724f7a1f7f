"""task=evaluate: the same held-out noises through the teacher and every schedule, as a Lightning loop."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from oss_exp.checks import require_name
from oss_exp.data.noise import HELD_OUT
from oss_exp.evaluation.comparison import measured, spread
from oss_exp.evaluation.metrics import ImageMetric
from oss_exp.evaluation.pictures import as_bytes, encoded, frames_of, reduced
from oss_exp.evaluation.psnr import psnr
from oss_exp.files import shipped_schedule, write_atomically
from oss_exp.models.base import Model
from oss_exp.models.pipeline import Pipeline
from oss_exp.models.stages import Staged
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Solver, nfe
from oss_exp.tasks import border, preemption
from oss_exp.tasks.collective import DistributedCollective
from oss_exp.tasks.compatibility import check_fits, warn_outside
from oss_exp.tasks.run import Run
from oss_exp.tasks.search import plan
from oss_exp.tasks.setting import Setting
from oss_exp.tasks.task import Task
from oss_exp.tasks.trajectories import Recorder, Trajectories
from oss_exp.velocity import BoundVelocity

SHOWN = 8  # images a row in the picture of samples
TEACHER_STEPS = 8  # of a trajectory
KEPT_EVERY = 30  # seconds
ABSENT = {
    "classes": "the samples have none (data.classes)",
    "prompts": "the model takes none (data=prompts and a model of prompts)",
}


@dataclass(frozen=True, kw_only=True)
class Evaluate(Task):
    """Measure the saved step schedule of the file `schedule`; without one, plan `stepsize` first.

    allow_other_model: run a schedule that was searched on other weights.
    """

    schedule: str | None = None
    allow_other_model: bool = False

    def __call__(self, cfg: DictConfig) -> None:
        run = Run(cfg)
        metrics = metrics_of(run)
        if self.schedule is None:
            plan_and_measure(run, metrics)
            return
        path = shipped_schedule(self.schedule)
        steps = StepSchedule.load(path)
        check_fits(run.setting, run.cfg, path, steps, self.allow_other_model)
        warn_outside(run.setting, run.cfg, path, steps)
        measure(run, metrics, [(steps.about("strategy").get("name", path.stem), path)])
        rank_zero_only(steps.save)(run.folder / "schedules" / path.name)


def metrics_of(run: Run) -> Metrics:
    """Return what the configuration of a run measures with."""
    inputs = {"classes": run.data.classes, "prompts": run.data.prompts}
    is_video = (
        len(run.setting.model.event_shape) == 4
    )  # how many frames there are, only the decoder knows
    images = None if is_video else run.data.eval_samples
    metrics = Metrics(
        run.cfg.metric,
        run.cfg.evaluation,
        [name for name, value in inputs.items() if value],
        images,
    )
    model = run.setting.model
    base = model.base if isinstance(model, Staged) else model
    if metrics.settings and not isinstance(
        base, Pipeline
    ):  # whose decoder may take minutes on a CPU
        metrics.require_images(model.decode(torch.zeros(1, *model.event_shape)))
    return metrics


def plan_and_measure(run: Run, metrics: Metrics) -> None:
    """Plan every strategy for every budget, and measure all."""
    plan(run)
    measure(
        run, metrics, [(name, run.file(name, k)) for name in run.strategies for k in run.num_steps]
    )


def measure(run: Run, metrics: Metrics, files: Sequence[tuple[str, Path]]) -> None:
    """Measure the schedules of these files, each with its strategy's name, on the held-out noises of a run."""
    schedules, rows = {}, {}
    for name, path in files:
        require_name(strategy=name)
        steps = StepSchedule.load(path)
        if run.config["run_orders"] == "fixed":
            steps = steps.with_own_orders()
        label = f"{name} K={steps.num_steps}"
        schedules[label] = steps
        rows[label] = {
            "strategy": name,
            "num_steps": steps.num_steps,
            "baseline": steps.about("strategy").get("baseline", False),
            "start": steps.start.kind,
            "schedule": f"schedules/{path.name}",
            "planning": dict(steps.about("planning")),
        }
    evaluation = run.config["evaluation"]
    trajectories = Trajectories(evaluation["trajectories"])
    shown = evaluation["save_images"], trajectories, run.data.eval_samples, run.data.prompts
    module = EvaluateModule(run.setting, schedules, rows, run.folder, run.about, metrics, *shown)
    run.trainer.test(module, dataloaders=run.data.test_dataloader(), verbose=False)


class EvaluateModule(L.LightningModule):
    """Measures schedules {label: StepSchedule} against the teacher; `rows` holds what the table says of each label.

    Writes `<folder>/metrics.json` (means, intervals, every image's PSNR, the other metrics), `<folder>/samples.npz`
    (the first images) and `<folder>/trajectories.npz` (of a few, the predictions of x0 on the way); with save_images
    also all images.
    """

    def __init__(
        self,
        setting: Setting,
        schedules: Mapping[str, StepSchedule],
        rows: Mapping[str, Mapping[str, Any]],
        folder: Path,
        about: Mapping[str, Any],
        metrics: Metrics,
        save_images: str | None,
        trajectories: Trajectories,
        eval_samples: int,
        prompts: Sequence[str] | None,
    ):
        super().__init__()
        self.model = setting.model  # registered, so that Lightning moves it to the device
        self.setting, self.schedules, self.rows, self.folder, self.about = (
            setting,
            schedules,
            rows,
            folder,
            about,
        )
        # A schedule for each sample has too few of them for a distribution.
        shared = [label for label, steps in schedules.items() if not steps.per_sample]
        self.metrics = {label: metrics() for label in ("teacher", *shared)}
        self.registered = nn.ModuleList(
            self.metrics.values()
        )  # a ModuleDict does not take every label
        self.has_metrics, self.failed = len(metrics.settings) > 0, dict[str, Exception]()
        # What the sums of batches depend on, beside what a run folder has but once.
        self.origin = json.dumps([metrics.origin, save_images, trajectories.count])
        self.save_images = save_images
        self.seen, self.batches, self.kept_at = 0, 0, time.monotonic()
        self.velocity: BoundVelocity | None = None
        self.values: dict[str, list[Tensor]] = {label: [] for label in schedules}
        self.pictures: dict[str, list[tuple[Tensor, Tensor]]] = {
            label: [] for label in ("teacher", *schedules)
        }
        self.trajectories, self.eval_samples, self.prompts = trajectories, eval_samples, prompts

    def on_test_start(self) -> None:
        for _, metrics in self._sets():
            metrics.reset()  # spawned processes begin with one memory: its sums would be everybody's
        self._go_on()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        done = batch_idx < self.batches  # by a run that was ended
        if not done or self.velocity is None:
            self.velocity = self.setting.velocity(batch)
        if done:
            return
        with preemption.unbroken():
            self._measure(batch)
            self.batches += 1
            if preemption.received() or time.monotonic() - self.kept_at > KEPT_EVERY:
                self._keep_progress()

    def _measure(self, batch: dict[str, Tensor]) -> None:
        index, classes = batch["index"], self.setting.classes(batch)
        condition = batch.get("condition", classes)
        noise = self.setting.first_state(batch["noise"])
        solver = self.setting.solver
        plain = replace(solver, calibration=None)
        original, grid = self.model.original, self.setting.teacher
        recorder = self.trajectories.recorder("teacher", original, grid, index, TEACHER_STEPS)
        reference, teacher = run(original, plain, grid, noise, condition, None, recorder)
        width = spread(reference)
        # A distributed sampler repeats samples to even out the ranks; a metric takes each once.
        number = (
            self.seen + torch.arange(len(index), device=index.device)
        ) * self.trainer.world_size
        fresh = index - HELD_OUT == number + self.global_rank
        self.seen += len(index)
        self._keep("teacher", batch, teacher, teacher, fresh)
        for label, steps in self.schedules.items():
            known = torch.arange(len(index), device=index.device)
            if steps.per_sample:
                known = torch.isin(
                    index, torch.tensor(steps.samples, device=index.device)
                ).nonzero()[:, 0]
                if len(known) == 0:
                    continue
                steps = steps.rows(index[known].tolist())
            own, group = (None if each is None else each[known] for each in (condition, classes))
            recorder = self.trajectories.recorder(label, self.model, steps, index[known])
            x0, images = run(self.model, solver, steps, noise[known], own, group, recorder)
            values = (
                index[known].double(),
                psnr(images, teacher[known]).double(),
                spread(x0) / width[known],
            )
            self.values[label].append(torch.stack(values, dim=1))
            part = {key: value[known] for key, value in batch.items()}
            self._keep(label, part, images, teacher[known], fresh[known])

    def _sets(self) -> list[tuple[str, MetricSet]]:
        return [
            (label, each) for label, each in self.metrics.items() if isinstance(each, MetricSet)
        ]

    @property
    def progress(self) -> Path:
        """Where this rank keeps what it has measured so far."""
        return self.folder / "evaluation" / f"{self.global_rank}_of_{self.trainer.world_size}.pt"

    def _keep_progress(self) -> None:
        states = {
            label: {name: dict(metric.metric_state) for name, metric in each.named()}
            for label, each in self._sets()
        }
        kept = {
            "origin": self.origin,
            "seen": self.seen,
            "batches": self.batches,
            "metrics": states,
        }
        kept |= {
            "values": self.values,
            "pictures": self.pictures,
            "trajectories": self.trajectories.parts,
        }
        buffer = io.BytesIO()
        torch.save(kept, buffer)
        write_atomically(self.progress, buffer.getvalue())
        self.kept_at = time.monotonic()

    def _go_on(self) -> None:
        """Take up what was kept, where it was measured as it is to be now."""
        if not self.progress.is_file():
            return
        try:
            kept = torch.load(self.progress, map_location=self.device, weights_only=True)
        except Exception:  # damage: then from the beginning
            return
        if not isinstance(kept, dict) or kept.get("origin") != self.origin:
            return
        for label, metrics in self._sets():
            for name, metric in metrics.named():
                for part in metric.metric_state:
                    setattr(metric, part, kept["metrics"][label][name][part])
                metric._update_count = kept["batches"]  # else torchmetrics takes it for unused
        self.seen, self.batches = kept["seen"], kept["batches"]
        self.values, self.pictures = kept["values"], kept["pictures"]
        self.trajectories.parts = kept["trajectories"]

    def _keep(
        self, label: str, batch: dict[str, Tensor], images: Tensor, teacher: Tensor, fresh: Tensor
    ) -> None:
        """Feed the metrics; remember the first held-out samples for the picture, whichever batch and rank they are in.

        images, the teacher's, and which samples come for the first time, of the batch's (b,) samples.
        """
        if label in self.metrics:
            frames = images.shape[2] if images.ndim == 5 else 1
            labels = batch["label"][fresh].repeat_interleave(frames)
            prompts = None
            if self.prompts is not None:
                prompts = [
                    self.prompts[i]
                    for i in batch["condition"][fresh].tolist()
                    for _ in range(frames)
                ]
            self.metrics[label].update(
                frames_of(images[fresh]), frames_of(teacher[fresh]), labels, prompts
            )
        everything = self.save_images == "npz"
        shown = batch["index"] < HELD_OUT + (self.eval_samples if everything else SHOWN)
        pictures = images[shown] if everything or images.ndim == 4 else reduced(images[shown])
        self.pictures[label].append((batch["index"][shown], as_bytes(pictures)))
        if self.save_images == "png":
            kind = "gif" if images.ndim == 5 else "png"
            for index, picture in zip(
                (batch["index"] - HELD_OUT).tolist(), as_bytes(images).cpu(), strict=True
            ):
                file = self.folder / "images" / slug(label) / f"{index:06d}.{kind}"
                write_atomically(file, encoded(picture.numpy()))

    def on_test_epoch_end(self) -> None:
        if self.has_metrics:  # which may fail, or be long about it
            self._keep_progress()
        collective = DistributedCollective()
        records = []
        for label, steps in self.schedules.items():
            table = collective.gather(
                torch.cat(
                    self.values[label]
                    or [torch.zeros(0, 3, dtype=torch.float64, device=self.device)]
                )
            )
            # A distributed sampler may repeat samples to even out the ranks.
            index, first = np.unique(table[:, 0].cpu().numpy().astype(int), return_index=True)
            if len(index) == 0:
                raise ValueError(
                    f"{label} has per-sample schedules for none of the held-out samples; plan it again"
                )
            value, ratio = table[:, 1:].cpu().numpy()[first].T
            records.append(
                {
                    **self.rows[label],
                    "nfe": nfe(self.setting.solver, steps, self.velocity),
                    **measured(index, value, ratio),
                    "metrics": self._measured(label),
                }
            )
        pictures = {}
        for label, parts in self.pictures.items():
            template = self.pictures["teacher"][0]
            index = collective.gather(torch.cat([index for index, _ in parts] or [template[0][:0]]))
            images = collective.gather(
                torch.cat([image for _, image in parts] or [template[1][:0]])
            )
            first = np.unique(index.cpu().numpy(), return_index=True)[1]
            images = images.cpu().numpy()[first]
            if self.save_images == "npz":
                self._write_images(label, images)
            if len(images) >= min(SHOWN, self.eval_samples):
                pictures[label] = images[:SHOWN]
        ways = self.trajectories.gathered(self.pictures, self.eval_samples, collective)
        self._write(records, self._measured("teacher"), pictures, ways)
        self.trainer.strategy.barrier("metrics are on disk")
        for name, error in self.failed.items():
            raise ValueError(
                f"metric.{name}: {error}; the rest is in {self.folder / 'metrics.json'}, and the same command with "
                f"other values of metric.{name}, or without it, measures no image again"
            ) from error
        self.progress.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # absent, or another rank's is still there
            self.progress.parent.rmdir()

    def _measured(self, label: str) -> dict[str, float]:
        """What the metrics say of a schedule; those that fail are remembered."""
        for name, metrics in self._sets():
            if name == label:
                found, failed = metrics.compute()
                self.failed = {**failed, **self.failed}
                return found
        return {}

    @rank_zero_only
    def _write_images(self, label: str, images: np.ndarray) -> None:
        """(n, H, W, C) bytes, as ADM's sample batches; (n, F, H, W, C) of videos."""
        buffer = io.BytesIO()
        np.savez(buffer, arr_0=images)
        write_atomically(self.folder / "images" / f"{slug(label)}.npz", buffer.getvalue())

    @rank_zero_only
    def _write(
        self,
        records: list[dict[str, Any]],
        teacher: dict[str, float],
        pictures: dict[str, np.ndarray],
        trajectories: dict[str, np.ndarray],
    ) -> None:
        for name, arrays in (("samples", pictures), ("trajectories", trajectories)):
            if arrays:
                buffer = io.BytesIO()
                np.savez_compressed(buffer, **arrays)
                write_atomically(self.folder / f"{name}.npz", buffer.getvalue())
        found = {**self.about, "teacher_metrics": teacher, "rows": records}
        write_atomically(self.folder / "metrics.json", json.dumps(found, indent=1) + "\n")


PARTS = (
    "extractor",
    "reference",
    "classifier",
)  # what constructors of metrics may take of conf/evaluation


class Metrics:
    """The metrics of conf/metric: a call makes a set of them anew, around one extractor and one reference.

    inputs: of `classes` and `prompts`, those that the run's images are made for.
    images: how many there will be; None: not known yet.
    Raises ValueError where a metric needs what this run does not have.
    """

    def __init__(
        self,
        metric: DictConfig,
        evaluation: DictConfig,
        inputs: Collection[str],
        images: int | None = None,
    ):
        self.settings = metric
        kinds: dict[str, Any] = {
            name: border.class_of(each, f"metric.{name}") for name, each in metric.items()
        }
        self.parts_of = {
            name: [part for part in PARTS if part in inspect.signature(kind).parameters]
            for name, kind in kinds.items()
        }
        for name, kind in kinds.items():
            if missing := [need for need in kind.needs if need not in inputs]:
                raise ValueError(
                    f"metric={name} needs {missing[0]}, and {ABSENT[missing[0]]}; leave it out"
                )

        wanted = {part for parts in self.parts_of.values() for part in parts}
        extractor = (
            border.build(evaluation.extractor, "evaluation.extractor", nn.Module)
            if wanted
            else None
        )
        reference = (
            border.build(evaluation.reference, "evaluation.reference")
            if "reference" in wanted
            else None
        )
        if "classifier" in wanted and not hasattr(extractor, "logits"):
            name = next(name for name, parts in self.parts_of.items() if "classifier" in parts)
            raise ValueError(
                f"metric={name} needs a classifier, and evaluation.extractor={type(extractor).__name__} knows no "
                "classes; choose evaluation=fashion, or leave it out"
            )
        self.parts = {"extractor": extractor, "reference": reference, "classifier": extractor}
        self.extractor: Any = (
            OmegaConf.to_container(evaluation.extractor, resolve=True) if wanted else None
        )
        metrics = self()  # what is wrong shows before any work
        for name, each in metrics.named():
            if images is None:
                continue
            try:
                each.require(images)
            except ValueError as error:
                raise ValueError(f"metric.{name}: {error}") from None

    @torch.no_grad()
    def require_images(self, images: Tensor) -> None:
        """Raise ValueError where a metric does not take images, or videos, like these."""
        frames = frames_of(images)
        for name, each in self().named():
            try:
                each.update(
                    frames, frames, torch.zeros(len(frames), dtype=torch.long), [""] * len(frames)
                )
            except ValueError as error:
                raise ValueError(f"metric.{name}: {error}") from None

    @property
    def origin(self) -> dict[str, Any]:
        """All settings that a metric's sums of images depend on."""
        values: Any = OmegaConf.to_container(self.settings, resolve=True)
        for name, settings in values.items():
            for late in border.class_of(settings, f"metric.{name}").at_the_end:
                settings.pop(late, None)
        return {"metric": values, "extractor": self.extractor}

    def __call__(self) -> MetricSet:
        metrics, once = [], Once(self.parts["extractor"])
        for name, settings in self.settings.items():
            parts = {part: self.parts[part] for part in self.parts_of[name]}
            metric: ImageMetric = border.build(settings, f"metric.{name}", ImageMetric, **parts)
            if "extractor" in self.parts_of[name]:
                metric.extractor = once
            metrics.append(metric)
        return MetricSet([str(name) for name in self.settings], metrics)


class Once(nn.Module):
    """A network that does not run again on the images it has just seen (torchmetrics' FeatureShare does not pickle)."""

    def __init__(self, network: nn.Module | None):
        super().__init__()
        self.network, self.seen, self.said = network, None, None

    def forward(self, images: Tensor) -> Tensor:
        if images is not self.seen:
            self.seen, self.said = images, self.network(images)
        return self.said


class MetricSet(nn.ModuleList):
    """Metrics fed together, each with its name."""

    def __init__(self, names: list[str], metrics: list[ImageMetric]):
        super().__init__(metrics)
        self.names = names

    def named(self) -> list[tuple[str, ImageMetric]]:
        return [
            (name, each)
            for name, each in zip(self.names, self, strict=True)
            if isinstance(each, ImageMetric)
        ]

    def reset(self) -> None:
        for _, metric in self.named():
            metric.reset()

    def update(
        self, images: Tensor, teacher: Tensor, labels: Tensor, prompts: Sequence[str] | None
    ) -> None:
        for _, metric in self.named():
            metric.update(images, teacher, labels, prompts)

    def compute(self) -> tuple[dict[str, float], dict[str, Exception]]:
        """Return all values, and by their names what went wrong with metrics that have none."""
        values, failed = {}, {}
        for name, metric in self.named():
            try:
                values |= metric.compute()
            except Exception as error:
                failed[name] = error
        return values, failed


def run(
    model: Model,
    solver: Solver,
    steps: StepSchedule,
    noise: Tensor,
    condition: Tensor | None,
    group: Tensor | None,
    recorder: Recorder | None,
) -> tuple[Tensor, Tensor]:
    """Return x0 (B, *E) and its pixels for noise (B, *E) at steps.start_time."""
    x0 = model.sample(solver, steps, noise, condition, group, recorder)
    images = model.decode(x0)
    if recorder is not None:
        recorder.finish(images)
    return x0, images


def slug(label: str) -> str:
    """A schedule's label as a file's name."""
    return label.replace(" K=", "_")
