"""Measure step schedules: `task=evaluate`, as a Lightning loop.

The same held-out noises go through the teacher and through every schedule, and the images of the
two are compared. A run that was killed resumes from the batches that it has measured.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from oss_exp.provenance import configuration
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

SHOWN = 8  # first samples whose images are kept for the report
TEACHER_STEPS = 8  # recorded steps of the teacher's trajectory
KEPT_EVERY = 30  # seconds from one saving of the progress to the next
ABSENT = {
    "classes": "the samples have none (data.classes)",
    "prompts": "the model takes none (data=prompts and a model of prompts)",
}


@dataclass(frozen=True, kw_only=True)
class Evaluate(Task):
    """Measure step schedules against the teacher.

    Attributes:
        schedule: Path of a saved step schedule, or a folder of them, such as a run's. None plans
            the strategies of `stepsize` first, and measures their schedules.
        allow_other_model: Accept schedules that were searched on other weights.
    """

    schedule: str | None = None
    allow_other_model: bool = False

    def __call__(self, cfg: DictConfig) -> None:
        run = Run(cfg)
        metrics = metrics_of(run)
        if self.schedule is None:
            plan_and_measure(run, metrics)
            return

        # Saved schedules.
        saved: dict[tuple[str, int], tuple[Path, StepSchedule]] = {}
        for path in schedules_in(self.schedule):
            steps = StepSchedule.load(path)
            check_fits(run.setting, run.cfg, path, steps, self.allow_other_model)
            warn_outside(run.setting, run.cfg, path, steps)
            key = (steps.about("strategy").get("name", path.stem), steps.num_steps)
            if key in saved:
                raise ValueError(
                    f"{saved[key][0]} and {path} are both schedules of {key[0]} with {key[1]} "
                    "steps; measure one at a time"
                )
            saved[key] = path, steps

        measure(run, metrics, [(name, path) for (name, _), (path, _) in saved.items()])
        for path, steps in saved.values():
            rank_zero_only(steps.save)(run.folder / "schedules" / path.name)


def schedules_in(place: str) -> list[Path]:
    """Return the step schedule at a path, or all of a folder or run folder.

    Raises:
        ValueError: If a folder has none.
    """
    path = shipped_schedule(place)
    if not path.is_dir():
        return [path]
    folder = path / "schedules" if (path / "schedules").is_dir() else path
    files = [file for file in folder.glob("*.json") if not file.name.endswith(".mean.json")]
    if not files:
        raise ValueError(f"task.schedule={place}: no step schedule (.json) in {folder}")
    return sorted(files)


def metrics_of(run: Run) -> Metrics:
    """Return the metrics of a run's configuration, tried on images of its model.

    Raises:
        ValueError: If a metric needs what the run does not have.
    """
    # Metrics that suit the samples. The number of a video's frames, each of which is an image to a
    # metric, is not known before decoding.
    model = run.setting.model
    is_video = len(model.event_shape) == 4
    conditions = {"classes": run.data.classes, "prompts": run.data.prompts}
    inputs = [name for name, value in conditions.items() if value]
    images = None if is_video else run.data.eval_samples
    metrics = Metrics(run.cfg.metric, run.cfg.evaluation, inputs, images)

    # Try them, except on a pipeline, whose decoder may take minutes on a CPU.
    base = model.base if isinstance(model, Staged) else model
    if metrics.settings and not isinstance(base, Pipeline):
        metrics.require_images(model.decode(torch.zeros(1, *model.event_shape)))
    return metrics


def plan_and_measure(run: Run, metrics: Metrics) -> None:
    """Plan every strategy for every budget, and measure all schedules."""
    plan(run)
    files = []
    for name in run.strategies:
        for k in run.num_steps:
            files.append((name, run.file(name, k)))
    measure(run, metrics, files)


def measure(run: Run, metrics: Metrics, files: Sequence[tuple[str, Path]]) -> None:
    """Measure saved schedules on the held-out noises of a run.

    Args:
        run: The run.
        metrics: What is measured besides PSNR.
        files: Pairs of a strategy's name and the path of its schedule.
    """
    # Schedules, and the row that the table has for each.
    schedules: dict[str, StepSchedule] = {}
    rows: dict[str, dict[str, Any]] = {}
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

    # One pass over the held-out noises.
    evaluation = run.config["evaluation"]
    module = EvaluateModule(
        run.setting,
        schedules,
        rows,
        run.folder,
        run.about,
        metrics,
        evaluation["save_images"],
        Trajectories(evaluation["trajectories"]),
        run.data.eval_samples,
        run.data.prompts,
    )
    run.trainer.test(module, dataloaders=run.data.test_dataloader(), verbose=False)


class EvaluateModule(L.LightningModule):
    """A Lightning loop that measures schedules against the teacher.

    Writes `<folder>/metrics.json` (means, intervals, the PSNR of every image, other metrics),
    `<folder>/samples.npz` (the first images) and `<folder>/trajectories.npz` (predictions of x0
    along the way, for a few samples); with `save_images` also all images.

    Args:
        setting: Model, grid, solver and distance.
        schedules: The schedules by label.
        rows: What is known of each schedule before it is measured, by label.
        folder: The run folder.
        about: The provenance of the run.
        metrics: What is measured besides PSNR.
        save_images: "png" or "npz", the format in which all images are saved. None saves only the
            first ones.
        trajectories: Collects the predictions of x0.
        eval_samples: Number of held-out samples, over all ranks.
        prompts: The prompts, of which a sample's condition is an index; None without prompts.
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
        self.setting = setting
        self.schedules = schedules
        self.rows = rows
        self.folder = folder
        self.about = about
        self.save_images = save_images
        self.trajectories = trajectories
        self.eval_samples = eval_samples
        self.prompts = prompts

        # Metrics; a per-sample schedule has too few samples for a distribution.
        self.metrics = {"teacher": metrics()}
        for label, steps in schedules.items():
            if not steps.per_sample:
                self.metrics[label] = metrics()
        # Registered as a list, because a ModuleDict does not take every label.
        self.registered = nn.ModuleList(self.metrics.values())
        self.has_metrics = len(metrics.settings) > 0
        self.failed: dict[str, Exception] = {}

        # Progress. The origin is what the sums depend on, beyond what the run folder fixes.
        # A saved schedule may have been planned anew at its path.
        settings = [metrics.origin, save_images, trajectories.count, configuration(schedules)]
        self.origin = json.dumps(settings)
        self.num_seen = 0
        self.batches = 0
        self.saved_at = time.monotonic()
        self.velocity: BoundVelocity | None = None

        # Results by label, in host memory: rows of (index, PSNR, spread), and pictures with their
        # indices.
        self.values: dict[str, list[Tensor]] = {}
        self.pictures: dict[str, list[tuple[Tensor, Tensor]]] = {"teacher": []}
        for label in schedules:
            self.values[label] = []
            self.pictures[label] = []

    def on_test_start(self) -> None:
        # Spawned processes begin with copies of one memory, sums included.
        for _, metrics in self._metric_sets():
            metrics.reset()
        self._load_progress()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        is_measured = batch_idx < self.batches  # by a run that was killed
        if not is_measured or self.velocity is None:
            self.velocity = self.setting.velocity(batch)
        if is_measured:
            return
        with preemption.unbroken():
            self._measure(batch)
            self.batches += 1
            if preemption.received() or time.monotonic() - self.saved_at > KEPT_EVERY:
                self._save_progress()

    def _measure(self, batch: dict[str, Tensor]) -> None:
        """Run the teacher and every schedule on a batch, and record what they give."""
        index = batch["index"]
        classes = self.setting.classes(batch)
        condition = batch.get("condition", classes)
        noise = self.setting.first_state(batch["noise"])

        # Teacher.
        solver = self.setting.solver
        teacher_solver = self.setting.teacher_solver
        original = self.model.original
        grid = self.setting.teacher
        recorder = self.trajectories.recorder(
            "teacher", original, grid, index, condition, TEACHER_STEPS
        )
        x0, teacher = _sampled(original, teacher_solver, grid, noise, condition, None, recorder)
        width = spread(x0)

        # A distributed sampler repeats samples to even out the ranks; metrics take each once.
        position = self.num_seen + torch.arange(len(index), device=index.device)
        number = position * self.trainer.world_size
        is_new = index - HELD_OUT == number + self.global_rank
        self.num_seen += len(index)
        self._record("teacher", batch, teacher, teacher, is_new)

        # Students; a per-sample schedule covers some of the samples.
        for label, steps in self.schedules.items():
            rows = torch.arange(len(index), device=index.device)
            if steps.per_sample:
                planned = torch.tensor(steps.samples, device=index.device)
                rows = torch.isin(index, planned).nonzero()[:, 0]
                if len(rows) == 0:
                    continue
                steps = steps.rows(index[rows].tolist())
            row_condition = None if condition is None else condition[rows]
            group = None if classes is None else classes[rows]
            recorder = self.trajectories.recorder(
                label, self.model, steps, index[rows], row_condition
            )
            x0, images = _sampled(
                self.model, solver, steps, noise[rows], row_condition, group, recorder
            )

            quality = psnr(images, teacher[rows]).double()
            relative_spread = spread(x0) / width[rows]
            table = torch.stack([index[rows].double(), quality, relative_spread], dim=1)
            self.values[label].append(table.cpu())
            part = {key: value[rows] for key, value in batch.items()}
            self._record(label, part, images, teacher[rows], is_new[rows])

    def _metric_sets(self) -> list[tuple[str, MetricSet]]:
        pairs = self.metrics.items()
        return [(label, metrics) for label, metrics in pairs if isinstance(metrics, MetricSet)]

    @property
    def progress(self) -> Path:
        """The file in which this rank saves what it has measured so far."""
        return self.folder / "evaluation" / f"{self.global_rank}_of_{self.trainer.world_size}.pt"

    def _save_progress(self) -> None:
        states: dict[str, dict[str, Any]] = {}
        for label, metrics in self._metric_sets():
            states[label] = {}
            for name, metric in metrics.named():
                states[label][name] = dict(metric.metric_state)

        progress = {
            "origin": self.origin,
            "seen": self.num_seen,
            "batches": self.batches,
            "metrics": states,
            "values": self.values,
            "pictures": self.pictures,
            "trajectories": self.trajectories.parts,
            "row_costs": self.model.row_costs,
        }

        buffer = io.BytesIO()
        torch.save(progress, buffer)
        write_atomically(self.progress, buffer.getvalue())
        self.saved_at = time.monotonic()

    def _load_progress(self) -> None:
        """Resume from the saved progress, if it was measured with the same settings."""
        if not self.progress.is_file():
            return
        try:
            progress = torch.load(self.progress, map_location="cpu", weights_only=True)
        except Exception:  # a damaged file: start from the beginning
            return
        if not isinstance(progress, dict) or progress.get("origin") != self.origin:
            return

        # Sums of the metrics; without a count torchmetrics would take them for unused.
        for label, metrics in self._metric_sets():
            for name, metric in metrics.named():
                for part in metric.metric_state:
                    setattr(metric, part, progress["metrics"][label][name][part])
                metric._update_count = progress["batches"]
                metric.to(self.device)

        # Counts and samples.
        self.num_seen = progress["seen"]
        self.batches = progress["batches"]
        self.values = progress["values"]
        self.pictures = progress["pictures"]
        self.trajectories.parts = progress["trajectories"]
        self.model.row_costs.update(progress["row_costs"])

    def _record(
        self, label: str, batch: dict[str, Tensor], images: Tensor, teacher: Tensor, is_new: Tensor
    ) -> None:
        """Update the metrics with a batch, and keep or write its pictures.

        Args:
            label: Label of the schedule, or "teacher".
            batch: The batch of b samples.
            images: Images of the schedule, (b, C, H, W), or videos (b, C, F, H, W).
            teacher: Images of the teacher, of the same shape.
            is_new: Which samples come for the first time, (b,) bool.
        """
        if label in self.metrics:
            self._update_metrics(label, batch, images, teacher, is_new)

        # Pictures of the first samples, whichever batch and rank they are in.
        keep_all = self.save_images == "npz"
        is_shown = batch["index"] < HELD_OUT + (self.eval_samples if keep_all else SHOWN)
        pictures = images[is_shown]
        if images.ndim == 5 and not keep_all:
            pictures = reduced(pictures)
        kept = batch["index"][is_shown].cpu(), as_bytes(pictures).cpu()
        self.pictures[label].append(kept)

        # Files of all samples.
        if self.save_images == "png":
            kind = "gif" if images.ndim == 5 else "png"
            numbers = (batch["index"] - HELD_OUT).tolist()
            for number, picture in zip(numbers, as_bytes(images).cpu(), strict=True):
                file = self.folder / "images" / slug(label) / f"{number:06d}.{kind}"
                write_atomically(file, encoded(picture.numpy()))

    def _update_metrics(
        self, label: str, batch: dict[str, Tensor], images: Tensor, teacher: Tensor, is_new: Tensor
    ) -> None:
        num_frames = images.shape[2] if images.ndim == 5 else 1
        labels = batch["label"][is_new].repeat_interleave(num_frames)
        prompts = None
        if self.prompts is not None:
            prompts = []
            for number in batch["condition"][is_new].tolist():
                prompts += [self.prompts[number]] * num_frames
        frames = frames_of(images[is_new])
        self.metrics[label].update(frames, frames_of(teacher[is_new]), labels, prompts)

    def on_test_epoch_end(self) -> None:
        if self.has_metrics:  # computing them may fail, or take long
            self._save_progress()

        # Results over all ranks.
        collective = DistributedCollective()
        records = []
        for label, steps in self.schedules.items():
            record = {
                **self.rows[label],
                "nfe": nfe(self.setting.solver, steps, self.velocity),
                **self._image_values(label, collective),
                "metrics": self._compute_metrics(label),
            }
            records.append(record)
        pictures = self._gather_pictures(collective)
        trajectories = self.trajectories.gather(self.pictures, self.eval_samples, collective)

        # Files, then an error if a metric failed.
        self._write(records, self._compute_metrics("teacher"), pictures, trajectories)
        self.trainer.strategy.barrier("metrics are on disk")
        for name, error in self.failed.items():
            raise ValueError(
                f"metric.{name}: {error}; the rest is in {self.folder / 'metrics.json'}; change "
                f"or leave out metric.{name} and repeat the command, which measures no image again"
            ) from error

        # The progress is not needed any more; another rank's file may still be in the folder.
        self.progress.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.progress.parent.rmdir()

    def _image_values(self, label: str, collective: DistributedCollective) -> dict[str, Any]:
        """Return the PSNR and the spread of a schedule's samples, as `measured` does."""
        empty = torch.zeros(0, 3, dtype=torch.float64)
        table = collective.gather(torch.cat(self.values[label] or [empty])).numpy()

        # A distributed sampler may repeat samples to even out the ranks.
        index, first = np.unique(table[:, 0].astype(int), return_index=True)
        if len(index) == 0:
            raise ValueError(
                f"{label} has per-sample schedules for none of the held-out samples; plan it again"
            )
        quality, relative_spread = table[first, 1:].T
        return measured(index, quality, relative_spread)

    def _gather_pictures(self, collective: DistributedCollective) -> dict[str, np.ndarray]:
        """Return the first pictures by label, and write all of them where they are saved as npz.

        They are images (n, H, W, C) or videos (n, F, H, W, C), in bytes.
        """
        pictures: dict[str, np.ndarray] = {}
        template_index, template_images = self.pictures["teacher"][0]
        for label, parts in self.pictures.items():
            parts = parts or [(template_index[:0], template_images[:0])]
            part_index, part_images = zip(*parts, strict=True)
            index = collective.gather(torch.cat(part_index)).numpy()
            images = collective.gather(torch.cat(part_images)).numpy()

            # A distributed sampler may repeat samples.
            first = np.unique(index, return_index=True)[1]
            images = images[first]
            if self.save_images == "npz":
                self._write_images(label, images)
            if len(images) >= min(SHOWN, self.eval_samples):
                pictures[label] = images[:SHOWN]
        return pictures

    def _compute_metrics(self, label: str) -> dict[str, float]:
        """Return the values of a label's metrics, if it has any; remember those that fail."""
        for name, metrics in self._metric_sets():
            if name == label:
                values, failed = metrics.compute()
                self.failed = {**failed, **self.failed}
                return values
        return {}

    @rank_zero_only
    def _write_images(self, label: str, images: np.ndarray) -> None:
        """Write images (n, H, W, C) or videos (n, F, H, W, C), bytes, as ADM's sample batches."""
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
        content = {**self.about, "teacher_metrics": teacher, "rows": records}
        write_atomically(self.folder / "metrics.json", json.dumps(content, indent=1) + "\n")


# Parts of conf/evaluation that constructors of metrics may take as arguments.
PARTS = ("extractor", "reference", "classifier")


class Metrics:
    """The configured metrics of a run; a call makes a new `MetricSet` of them.

    All sets share one extractor and one reference.

    Args:
        metric: The configurations of the metrics by name.
        evaluation: The configuration of the extractor and the reference.
        inputs: Those of "classes" and "prompts" that the run's samples are conditioned on.
        images: The number of images; None if it is not known yet.

    Raises:
        ValueError: If a metric needs what this run does not have.
    """

    def __init__(
        self,
        metric: DictConfig,
        evaluation: DictConfig,
        inputs: Collection[str],
        images: int | None = None,
    ):
        self.settings = metric

        # The class of every metric, its needs, and the parts that it takes.
        kinds: dict[str, Any] = {}
        for name, node in metric.items():
            kinds[str(name)] = border.class_of(node, f"metric.{name}")
        self.parts_of: dict[str, list[str]] = {}
        for name, kind in kinds.items():
            parameters = inspect.signature(kind).parameters
            self.parts_of[name] = [part for part in PARTS if part in parameters]
            for need in kind.needs:
                if need not in inputs:
                    raise ValueError(
                        f"metric={name} needs {need}, and {ABSENT[need]}; leave it out"
                    )

        # Extractor and reference, if a metric takes them.
        used = set().union(*self.parts_of.values())
        extractor = None
        reference = None
        self.extractor: Any = None
        if used:
            extractor = border.build(evaluation.extractor, "evaluation.extractor", nn.Module)
            self.extractor = OmegaConf.to_container(evaluation.extractor, resolve=True)
        if "reference" in used:
            reference = border.build(evaluation.reference, "evaluation.reference")
        if "classifier" in used and not hasattr(extractor, "logits"):
            name = next(name for name, parts in self.parts_of.items() if "classifier" in parts)
            raise ValueError(
                f"metric={name} needs a classifier, and "
                f"evaluation.extractor={type(extractor).__name__} has no classes; choose "
                "evaluation=fashion, or leave it out"
            )
        self.parts = {"extractor": extractor, "reference": reference, "classifier": extractor}

        # A first set, so that errors show before any work.
        for name, member in self().named():
            if images is not None:
                with _named(name):
                    member.require(images)

    @torch.no_grad()
    def require_images(self, images: Tensor) -> None:
        """Try every metric on images (n, C, H, W) or videos (n, C, F, H, W) of the run's kind.

        Raises:
            ValueError: If a metric does not take them.
        """
        frames = frames_of(images)
        labels = torch.zeros(len(frames), dtype=torch.long)
        for name, metric in self().named():
            with _named(name):
                metric.update(frames, frames, labels, [""] * len(frames))

    @property
    def origin(self) -> dict[str, Any]:
        """All settings that the metrics' sums over images depend on."""
        values: Any = OmegaConf.to_container(self.settings, resolve=True)
        for name, settings in values.items():
            for key in border.class_of(settings, f"metric.{name}").at_the_end:
                settings.pop(key, None)
        return {"metric": values, "extractor": self.extractor}

    def __call__(self) -> MetricSet:
        metrics = []
        extractor = CachedExtractor(self.parts["extractor"])
        for name, part_names in self.parts_of.items():
            node = self.settings[name]
            parts = {part: self.parts[part] for part in part_names}
            metric: ImageMetric = border.build(node, f"metric.{name}", ImageMetric, **parts)
            if "extractor" in parts:
                metric.extractor = extractor
            metrics.append(metric)
        return MetricSet(list(self.parts_of), metrics)


@contextlib.contextmanager
def _named(metric: str) -> Iterator[None]:
    """Put the metric's key in front of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"metric.{metric}: {error}") from None


class CachedExtractor(nn.Module):
    """A network that remembers its last input and output.

    Several metrics ask for the features of the same images. (FeatureShare of torchmetrics does
    the same, but does not pickle.)
    """

    def __init__(self, network: nn.Module | None):
        super().__init__()
        self.network = network
        self.images: Tensor | None = None
        self.features: Any = None

    def forward(self, images: Tensor) -> Tensor:
        if images is not self.images:
            self.images = images
            self.features = self.network(images)
        return self.features


class MetricSet(nn.ModuleList):
    """Named metrics that are updated together."""

    def __init__(self, names: list[str], metrics: list[ImageMetric]):
        super().__init__(metrics)
        self.names = names

    def named(self) -> list[tuple[str, ImageMetric]]:
        """Return the metrics with their names."""
        pairs = zip(self.names, self, strict=True)
        return [(name, metric) for name, metric in pairs if isinstance(metric, ImageMetric)]

    def reset(self) -> None:
        """Set all sums to zero."""
        for _, metric in self.named():
            metric.reset()

    def update(
        self, images: Tensor, teacher: Tensor, labels: Tensor, prompts: Sequence[str] | None
    ) -> None:
        """Add images (n, C, H, W) and the teacher's, with labels (n,) and prompts."""
        for _, metric in self.named():
            metric.update(images, teacher, labels, prompts)

    def compute(self) -> tuple[dict[str, float], dict[str, Exception]]:
        """Return all values, and the errors of the metrics that failed, by name."""
        values: dict[str, float] = {}
        failed: dict[str, Exception] = {}
        for name, metric in self.named():
            try:
                values |= metric.compute()
            except Exception as error:
                failed[name] = error
        return values, failed


def _sampled(
    model: Model,
    solver: Solver,
    steps: StepSchedule,
    noise: Tensor,
    condition: Tensor | None,
    group: Tensor | None,
    recorder: Recorder | None,
) -> tuple[Tensor, Tensor]:
    """Return samples x0 (b, *E) and their images, from noise (b, *E) at `steps.start_time`."""
    x0 = model.sample(solver, steps, noise, condition, group, recorder)
    images = model.decode(x0)
    if recorder is not None:
        recorder.finish(images)
    return x0, images


def slug(label: str) -> str:
    """Return a schedule's label as a file name."""
    return label.replace(" K=", "_")
