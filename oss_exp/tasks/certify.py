"""Measure where a step schedule holds, and write the range into its file: `task=certify`.

A cell is the user's model with one thing changed: its dtype, guidance, shift, size, LoRA, teacher
or solver. In every cell the schedule and a baseline run on the same held-out noises, and both are
compared with the teacher of that cell.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from oss_exp.escaping import PlainConsole
from oss_exp.evaluation.psnr import Interval, psnr
from oss_exp.files import (
    Numbers,
    Record,
    load_asset,
    load_record,
    save_asset,
    shipped_schedule,
    write_atomically,
)
from oss_exp.models.base import Model
from oss_exp.models.network import Dtype
from oss_exp.models.stages import Staged
from oss_exp.schedule import FittedSteps, StepSchedule
from oss_exp.schedule_file import Cell, Certificate
from oss_exp.solvers import Solver, nfe
from oss_exp.solvers import sample as sample_steps
from oss_exp.stepsize import ClosedForm, Problem
from oss_exp.tasks import border
from oss_exp.tasks.compatibility import axes_of, check_fits
from oss_exp.tasks.run import Run, build_model, build_setting
from oss_exp.tasks.setting import Setting
from oss_exp.tasks.task import Amount, Positive, Task
from oss_exp.velocity import BoundVelocity, standard_normal_velocity

CONF = Path(__file__).parents[1] / "conf"
SOLVERS = (CONF if CONF.is_dir() else Path(__file__).parents[2] / "conf") / "solver"
WEIGHTS = {"float8_e4m3fn": "float8", "int8": "int8"}  # quantised weights, as conf/model has them
BASE: tuple[str, str] = ("base", "as searched")


def usual_axes() -> dict[str, list[Any]]:
    """Return the default axes, with the values that nearly every model has."""
    axes: dict[str, list[Any]] = {
        "dtype": ["bfloat16", "float16", "float8_e4m3fn", "int8"],
        "guidance": [1, 2, 3, 5],
        "shift": [1, 3, 5],
    }
    for axis in ("resolution", "frames", "lora", "teacher_steps", "solver"):
        axes[axis] = []
    return axes


class Skipped(Exception):
    """An axis does not apply to the model; the message is the reason."""


class OutOfTime(Exception):
    """A cell would take longer than the time that remains."""


class CellRecord(Record):
    """A measured cell, saved as cells/<hash>.json.

    Attributes:
        key: What the cell is, as JSON.
        index: Numbers of the samples.
        psnr: PSNR in dB of every sample, by schedule.
        moved: Mean PSNR in dB between this cell's teacher and the base's; None if shapes differ.
        shape: Event shape of the model.
        calls: Network rows that were computed.
    """

    key: str
    index: list[int]
    psnr: dict[str, Numbers]
    moved: float | None
    shape: list[int]
    calls: int


@dataclass(frozen=True, kw_only=True)
class Certify(Task):
    """Measure where a step schedule holds.

    Writes the schedule, with its `range`, into the run folder.

    Attributes:
        schedule: Path of the step schedule.
        axes: The values of every axis, each changed alone; the report names those skipped.
        tolerance: Loss in dB up to which a setting is inside the range.
        max_minutes: Stop before a cell that would exceed this time; the same command resumes.
        in_place: Also write the range into the schedule's own file.
        allow_other_model: Accept a schedule that was searched on other weights.
    """

    schedule: str
    axes: Mapping[str, Sequence[Any]] = field(default_factory=usual_axes)
    tolerance: Amount = 1.0
    max_minutes: Positive | None = None
    in_place: bool = False
    allow_other_model: bool = False

    def __call__(self, cfg: DictConfig) -> None:
        path = shipped_schedule(self.schedule)
        steps = StepSchedule.load(path)
        cfg.num_steps = [steps.num_steps]
        run = Run(cfg, "axes", "tolerance", "max_minutes", "in_place")
        baselines = _check_run(run, path, steps)
        check_fits(run.setting, cfg, path, steps, self.allow_other_model)

        # Values that no axis takes are refused before hours of measuring.
        base = axes_of(cfg, run.setting.model)
        cells = list(self._cells(base))
        for axis, value in cells:
            with suppress(Skipped):
                CHANGES[axis](cfg.copy(), value)

        # Cells.
        measuring = _Measuring(run, steps, _digest(path), baselines, self.max_minutes)
        unmeasured: list[str] = []
        skipped: dict[str, str] = {}
        records: dict[tuple[str, Any], CellRecord] = {BASE: measuring.cell(*BASE)}
        for axis, value in cells:
            try:
                records[axis, _plain(value)] = measuring.cell(axis, value)
            except OutOfTime:
                unmeasured.append(f"{axis}={value}")
            except Skipped as reason:
                skipped[f"{axis}={value}"] = str(reason)

        # Files; Lightning sets the rank.
        certificate = certificate_of(records, base, self.tolerance, skipped)
        if rank_zero_only.rank == 0:  # pyright: ignore[reportFunctionMemberAccess]
            certified = replace(steps, range=certificate)
            for file in [run.folder / "schedules" / path.name, *[path] * self.in_place]:
                certified.save(file)
            self._print(certificate, unmeasured)

    def _cells(self, base: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield (axis, value) of every cell that differs from the base."""
        if unknown := [axis for axis in self.axes if axis not in CHANGES]:
            raise ValueError(f"task.axes.{unknown[0]} is not one of {', '.join(CHANGES)}")
        for axis, values in self.axes.items():
            for value in values:
                name = _solver_class(value) if axis == "solver" else value
                if value is not None and name != base.get(axis):
                    yield axis, value

    def _print(self, certificate: Certificate, unmeasured: Sequence[str]) -> None:
        lines = [f"{len(certificate.cells)} cells, {certificate.calls} network rows"]

        # Cells without a measurement, by reason.
        labels_of: dict[str, list[str]] = {}
        for label, reason in certificate.skipped.items():
            labels_of.setdefault(reason, []).append(label)
        for reason, labels in labels_of.items():
            lines.append(f"skipped {', '.join(labels)}: {reason}")
        if unmeasured:
            lines.append(
                f"not measured within {self.max_minutes:g} minutes: {', '.join(unmeasured)}; the "
                "same command goes on"
            )
        PlainConsole().print("\n".join(lines), soft_wrap=True)


def _check_run(run: Run, path: Path, steps: StepSchedule) -> dict[str, ClosedForm]:
    """Return the baselines of a run; raise ValueError if it cannot certify the schedule."""
    if steps.per_sample:
        raise ValueError(
            f"step schedule {path} has times of its own for each sample; certify one for all "
            "samples"
        )
    if steps.orders is not None and run.config["run_orders"] == "fixed":
        raise ValueError(
            f"run_orders=fixed: task=certify measures {path} with its own orders, for which its "
            "range holds; set run_orders=searched, and the solver that they were searched with"
        )
    if run.trainer.world_size > 1:
        raise ValueError("task=certify runs on one device; set trainer.devices=1")

    baselines: dict[str, ClosedForm] = {}
    for name, strategy in run.strategies.items():
        if isinstance(strategy, ClosedForm):
            baselines[name] = strategy

    if not baselines or len(baselines) < len(run.strategies):
        raise ValueError(
            "task=certify compares with schedules by hand; set stepsize=[ddim,fm] or others"
        )
    return baselines


def _digest(path: Path) -> str:
    """Return the hash of a schedule's file, its range left out."""
    content = json.loads(path.read_text())
    content.pop("range", None)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class _Measuring:
    """Measures every cell once; the records are in <folder>/cells.

    Args:
        run: The run.
        steps: The schedule.
        digest: Hash of the schedule's file, its range left out.
        baselines: The schedules to compare with.
        max_minutes: The time for all cells; None: as long as it takes.
    """

    def __init__(
        self,
        run: Run,
        steps: StepSchedule,
        digest: str,
        baselines: Mapping[str, ClosedForm],
        max_minutes: float | None,
    ):
        self.run = run
        self.steps = steps
        self.digest = digest
        self.baselines = dict(baselines)
        self.max_minutes = max_minutes
        self.started = time.monotonic()
        self.longest = 0.0  # seconds of the longest cell
        self.device = run.trainer.strategy.root_device
        self.models: dict[str, Model] = {}
        self.images: dict[int, Tensor] = {}  # of the base's teacher, by sample

    @torch.no_grad()
    def cell(self, axis: str, value: Any) -> CellRecord:
        """Return the record of the model with one thing changed.

        Raises:
            Skipped: If the model has no such thing.
            OutOfTime: If it would take too long; the base never does.
        """
        # The configuration, and the solver that runs the schedule.
        cfg: Any = self.run.cfg.copy()
        student_solver = None if (axis, value) == BASE else CHANGES[axis](cfg, value)
        is_fixed = self.steps.orders is not None or isinstance(self.steps.steps, FittedSteps)
        if student_solver is not None and is_fixed:
            owner = dict(self.steps.about("solver")).get("_target_", "a fit")
            raise Skipped(f"its steps fit {owner} only")

        # A record that is on disk.
        data = OmegaConf.to_container(cfg.data, resolve=True)
        key = json.dumps([axis, _plain(value), self.digest, data])
        name = hashlib.sha256(key.encode()).hexdigest()[:16]
        file = self.run.folder / "cells" / f"{name}.json"
        pictures = self.run.folder / "cells" / "teacher.safetensors"
        if file.is_file() and (axis != "base" or pictures.is_file()):
            record = load_record(file, CellRecord, "measured cell", "remove it")
            if axis == "base":
                size = pictures.stat().st_size  # as many as were written, from memory
                tensors, _ = load_asset(pictures, "the teacher's samples", limit=size)
                self.images = dict(zip(record.index, tensors["images"], strict=True))
            return record

        # A new one, if the longest so far would fit into the time.
        begun = time.monotonic()
        end = begun - self.started + self.longest
        if axis != "base" and self.max_minutes is not None and end > 60 * self.max_minutes:
            raise OutOfTime

        setting = build_setting(cfg, self._model(cfg, axis, value))
        record = self._measure(setting, student_solver or setting.solver, axis, key)
        if axis == "base":
            images = torch.stack([self.images[number] for number in record.index])
            save_asset(pictures, {"images": images}, {})

        write_atomically(file, json.dumps(record.model_dump()) + "\n")
        self.longest = max(self.longest, time.monotonic() - begun)
        return record

    def _model(self, cfg: Any, axis: str, value: Any) -> Model:
        """Return the model of a cell: the last one, unless something of it changes."""
        weights = value if axis == "dtype" and value in WEIGHTS else None
        key = json.dumps([OmegaConf.to_container(cfg.model, resolve=True), cfg.stages, weights])
        if key not in self.models:
            self.models.clear()  # first: two may not fit into memory
            model = build_model(cfg)
            if weights is not None and "quantization" not in cfg.model:
                round_weights(model, value)
            self.models[key] = model.to(self.device)
        return self.models[key]

    def _measure(self, setting: Setting, solver: Solver, axis: str, key: str) -> CellRecord:
        data = self.run.noises_for(setting.model)
        values: dict[str, list[Tensor]] = {}
        index: list[int] = []
        moved: list[Tensor] = []
        calls = 0
        model = setting.model
        students = self._students(setting)

        for batch in data.test_dataloader():
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            group = setting.classes(batch)
            condition = batch.get("condition", group)
            noise = setting.first_state(batch["noise"])
            velocity = model.velocity(condition)

            # Teacher, with the stages of a cell that has some, and how far it is from the base's.
            x0 = model.sample(setting.teacher_solver, setting.teacher, noise, condition)
            reference = model.decode(x0)
            calls += nfe(setting.solver, setting.teacher, velocity) * len(noise)

            numbers = batch["index"].tolist()
            if axis == "base":
                self.images |= dict(zip(numbers, reference.half().cpu(), strict=True))
            elif reference.shape[1:] == self.images[numbers[0]].shape:
                base = torch.stack([self.images[number] for number in numbers]).to(reference)
                moved.append(psnr(reference, base))

            # Students.
            for name, steps in students.items():
                student_solver = solver if name == "schedule" else setting.solver
                x0 = run_steps(model, velocity, student_solver, steps, noise, condition, group)
                values.setdefault(name, []).append(psnr(model.decode(x0), reference))
                calls += nfe(student_solver, steps, velocity) * len(noise)

            index += numbers

        return CellRecord(
            key=key,
            index=index,
            psnr={name: torch.cat(parts).tolist() for name, parts in values.items()},
            moved=float(torch.cat(moved).mean()) if moved else None,
            shape=list(model.event_shape),
            calls=calls,
        )

    def _students(self, setting: Setting) -> dict[str, StepSchedule]:
        """Return the schedule, and the baselines' schedules on this cell's grid."""
        count = self.steps.num_steps
        problem = Problem(
            standard_normal_velocity,
            torch.zeros(1, *setting.model.event_shape),
            setting.grid,
            setting.solver,
            setting.distance,
        )
        students = {"schedule": self.steps}
        for name, strategy in self.baselines.items():
            students[name] = strategy.plan(problem, [count])[count]
        return students


def run_steps(
    model: Model,
    velocity: BoundVelocity,
    solver: Solver,
    steps: StepSchedule,
    noise: Tensor,
    condition: Tensor | None,
    group: Tensor | None,
) -> Tensor:
    """Return the sample x0 (B, *E) of a schedule.

    Fitted steps that were fitted to one answer take the mix of a guided call.

    Raises:
        Skipped: If fitted steps weigh two answers, and the velocity has one.
    """
    if isinstance(steps.steps, FittedSteps):
        searched_apart = (steps.about("model").get("guidance") or {}).get("scale", 1) != 1
        if searched_apart and len(velocity.mix) == 1:
            raise Skipped(
                "its steps weigh guided and unguided predictions, and this model gives one"
            )
        if not searched_apart and len(velocity.mix) > 1:
            mixed = BoundVelocity.of(lambda x, t: velocity(x, t))
            return sample_steps(solver, mixed, noise, steps, group)
    return model.sample(solver, steps, noise, condition, group)


def certificate_of(
    records: Mapping[tuple[str, Any], CellRecord],
    base: Mapping[str, Any],
    tolerance: float,
    skipped: Mapping[str, str],
) -> Certificate:
    """Return the certificate of measured cells.

    Args:
        records: The records by (axis, value), the base's among them.
        base: What the base is on every axis.
        tolerance: Loss in dB up to which a setting is inside the range.
        skipped: The reasons of the cells that were skipped.
    """
    # The best baseline of the first cell.
    first = records[BASE]
    names = [name for name in first.psnr if name != "schedule"]
    baseline = max(names, key=lambda name: float(np.mean(first.psnr[name])))
    first_psnr = np.array(first.psnr["schedule"])

    # Loss against the first cell, gain over the baseline.
    cells = []
    for (axis, value), record in records.items():
        schedule_psnr = np.array(record.psnr["schedule"])
        baseline_psnr = np.array(record.psnr[baseline])
        loss = Interval.of(first_psnr - schedule_psnr)
        gain = Interval.of(schedule_psnr - baseline_psnr)
        mean = Interval.of(schedule_psnr)

        cell_axis, cell_value = _axis_in_file(axis, value, record, base)
        cells.append(
            Cell(
                axis=cell_axis,
                value=cell_value,
                n=len(schedule_psnr),
                psnr=mean.mean,
                psnr_interval=_ends(mean),
                baseline=float(baseline_psnr.mean()),
                gain=gain.mean,
                gain_interval=_ends(gain),
                loss=loss.mean,
                loss_interval=_ends(loss),
                moved=record.moved,
            )
        )

    return Certificate(
        baseline=baseline,
        tolerance=tolerance,
        base=dict(base),
        cells=cells,
        skipped=dict(skipped),
        calls=sum(record.calls for record in records.values()),
    )


def _axis_in_file(
    axis: str, value: Any, record: CellRecord, base: Mapping[str, Any]
) -> tuple[str, Any]:
    """Return an axis and its value as a certificate names them."""
    if axis in ("resolution", "frames"):
        return "shape", [*record.shape]
    value = json.loads(json.dumps(value))
    if axis == "solver":
        return axis, _solver_class(value)
    if axis == "guidance" and base.get("embedded_guidance") is not None:
        return "embedded_guidance", value
    return axis, value


def _ends(interval: Interval) -> tuple[float, float]:
    low = interval.low
    high = interval.high
    return (interval.mean, interval.mean) if low is None or high is None else (low, high)


def _plain(value: Any) -> Any:
    """Return a value that can be a key: a list as a tuple."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


# --------------------------------------------------------------------------------------------------
# What the axes change in a configuration; a solver is returned, for the schedule alone
# --------------------------------------------------------------------------------------------------


def _number(axis: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"task.axes.{axis} must have finite numbers, got {value}")
    return float(value)


def _whole(axis: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"task.axes.{axis} must have whole numbers from 1, got {value}")
    return value


def _dtype(cfg: Any, value: str) -> None:
    if "dtype" not in cfg.model:
        raise Skipped("the model is exact and has no dtype")
    if value in WEIGHTS:
        if "quantization" in cfg.model:
            cfg.model.quantization = WEIGHTS[value]
        elif cfg.stages is not None:
            raise Skipped("the network has stages, whose weights come from files, unrounded")
        return
    if value not in get_args(Dtype):
        choices = ", ".join([*get_args(Dtype), *WEIGHTS])
        raise ValueError(f"task.axes.dtype must have {choices}, got {value}")
    cfg.model.dtype = value


def _guidance(cfg: Any, value: float) -> None:
    if "guidance" in cfg.model:
        if value != 1 and cfg.data.get("classes") is None and "prompts" not in cfg.data:
            raise Skipped("the samples have no classes (data.classes)")
        cfg.model.guidance.scale = _number("guidance", value)
        return

    # Of a pipeline.
    call = cfg.model.get("call") or {}
    names = [name for name in ("true_cfg_scale", "guidance_scale") if name in call]
    if not names:
        raise Skipped("the model's call has no guidance_scale")
    cfg.model.call[names[0]] = _number("guidance", value)


def _shift(cfg: Any, value: float) -> None:
    if "shift" not in cfg.noise_schedule:
        raise Skipped(f"its teacher's noise schedule, {cfg.noise_schedule._target_}, has no shift")
    cfg.noise_schedule.shift = _number("shift", value)


def _resolution(cfg: Any, value: Sequence[int]) -> None:
    if "call" not in cfg.model:
        raise Skipped("the model has one size")
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"task.axes.resolution must have pairs [height, width], got {value}")
    height, width = (_whole("resolution", side) for side in value)
    cfg.model.call = {**(cfg.model.call or {}), "height": height, "width": width}


def _frames(cfg: Any, value: int) -> None:
    if "num_frames" not in (cfg.model.get("call") or {}):
        raise Skipped("the model's call has no num_frames")
    cfg.model.call.num_frames = _whole("frames", value)


def _lora(cfg: Any, value: str) -> None:
    if "loras" in cfg.model:
        cfg.model.loras = [*cfg.model.loras, value] if value else []
    elif not value:
        cfg.stages = None
    elif not Path(value).expanduser().is_dir():
        raise Skipped("it is not a folder that task=finetune task.trainable=lora has written")
    else:
        cfg.stages = str(Path(value).expanduser())


def _teacher_steps(cfg: Any, value: int) -> None:
    cfg.num_teacher_steps = _whole("teacher_steps", value)


def _solver(cfg: Any, value: str) -> Solver:
    return border.build(_solver_settings(value), "task.axes.solver", Solver)


def _solver_settings(value: str) -> Any:
    file = SOLVERS / f"{value}.yaml"
    if Path(str(value)).name != value or not file.is_file():
        raise ValueError(f"task.axes.solver={value} is not in conf/solver")
    return OmegaConf.load(file)


def _solver_class(value: str) -> str:
    """Return the class of a solver of conf/solver, its name in a range."""
    return str(_solver_settings(value)["_target_"]).rpartition(".")[2]


CHANGES: dict[str, Callable[[Any, Any], Solver | None]] = {
    "dtype": _dtype,
    "guidance": _guidance,
    "shift": _shift,
    "resolution": _resolution,
    "frames": _frames,
    "lora": _lora,
    "teacher_steps": _teacher_steps,
    "solver": _solver,
}


def round_weights(model: Model, kind: str) -> None:
    """Round a network's matrices and kernels to what float8 or int8 weights can hold.

    The network computes in its own dtype. int8 is symmetric, with a scale per output channel.
    """
    backbone: Any = (model.base if isinstance(model, Staged) else model).backbone
    for weight in backbone.parameters():
        if weight.ndim < 2:
            continue
        if kind == "int8":
            largest = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
            scale = largest.clamp(min=1e-12) / 127
            weight.copy_((weight / scale).round() * scale)
        else:
            weight.copy_(weight.to(torch.float8_e4m3fn).to(weight.dtype))
