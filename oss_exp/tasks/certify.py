"""task=certify: where a step schedule holds, measured on the user's own model and written into its file.

A cell is the model with one thing changed: another dtype, guidance, shift, size, LoRA, teacher or solver. In every cell
the schedule and a baseline run on the same held-out noises, and are compared with the teacher of that cell.
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
WEIGHTS = {"float8_e4m3fn": "float8", "int8": "int8"}  # quantised weights: as conf/model calls them
BASE: tuple[str, str] = ("base", "as searched")


def usual_axes() -> dict[str, list[Any]]:
    """Return what is measured where nobody chose: what nearly every model has."""
    chosen: dict[str, list[Any]] = {"dtype": ["bfloat16", "float16", "float8_e4m3fn", "int8"]}
    chosen |= {"guidance": [1, 2, 3, 5], "shift": [1, 3, 5]}
    return chosen | {
        axis: [] for axis in ("resolution", "frames", "lora", "teacher_steps", "solver")
    }


class Skipped(Exception):
    """An axis does not apply: the message says why."""


class OutOfTime(Exception):
    """A cell would take longer than is left."""


class CellRecord(Record):
    """cells/<hash>.json: a cell that was measured. index: of the samples; psnr: of each schedule, of each sample."""

    key: str
    index: list[int]
    psnr: dict[str, Numbers]
    moved: float | None
    shape: list[int]
    calls: int


@dataclass(frozen=True, kw_only=True)
class Certify(Task):
    """Measure where the schedule of the file `schedule` holds; write it, with its `range`, into the run's folder.

    axes:        {axis: values}, each changed alone; what the model does not have is skipped, and said.
    tolerance:   the loss, dB, up to which a setting is inside of the range.
    max_minutes: stop before a cell that would exceed them; the same command goes on.
    in_place:    write the range into the file itself, too.
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
        if steps.per_sample:
            raise ValueError(
                f"step schedule {path} has times of its own for each sample; certify one for all samples"
            )
        if run.trainer.world_size > 1:
            raise ValueError("task=certify runs on one device; set trainer.devices=1")
        hand_made = {
            name: each for name, each in run.strategies.items() if isinstance(each, ClosedForm)
        }
        if not hand_made or len(hand_made) < len(run.strategies):
            raise ValueError(
                "task=certify compares with schedules by hand; set stepsize=[ddim,fm], or others of them"
            )
        check_fits(run.setting, cfg, path, steps, self.allow_other_model)

        base = axes_of(cfg, run.setting.model)
        wanted = [*self._wanted(base)]
        for axis, value in wanted:  # what is wrong is said before hours of measuring
            with suppress(Skipped):
                CHANGES[axis](cfg.copy(), value)
        written = {
            name: each for name, each in json.loads(path.read_text()).items() if name != "range"
        }
        digest = hashlib.sha256(json.dumps(written).encode()).hexdigest()
        measuring = _Measuring(run, steps, digest, hand_made, self.max_minutes)
        left, skipped = list[str](), dict[str, str]()
        found: dict[tuple[str, Any], CellRecord] = {BASE: measuring.cell(*BASE)}
        for axis, value in wanted:
            try:
                found[axis, _plain(value)] = measuring.cell(axis, value)
            except OutOfTime:
                left.append(f"{axis}={value}")
            except Skipped as reason:
                skipped[f"{axis}={value}"] = str(reason)
        certificate = certificate_of(found, base, self.tolerance, skipped)
        if rank_zero_only.rank == 0:  # pyright: ignore[reportFunctionMemberAccess]  # Lightning sets it
            certified = replace(steps, range=certificate)
            for file in [run.folder / "schedules" / path.name, *[path] * self.in_place]:
                certified.save(file)
            self._say(certificate, left)

    def _wanted(self, base: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """(axis, value) of every cell but the base."""
        if unknown := [axis for axis in self.axes if axis not in CHANGES]:
            raise ValueError(f"task.axes.{unknown[0]} is none of {', '.join(CHANGES)}")
        for axis, values in self.axes.items():
            for value in values:
                told = _solver_class(value) if axis == "solver" else value
                if value is not None and told != base.get(axis):
                    yield axis, value

    def _say(self, certificate: Certificate, left: Sequence[str]) -> None:
        lines = [f"{len(certificate.cells)} cells, {certificate.calls} network rows"]
        for reason in dict.fromkeys(certificate.skipped.values()):
            cells = [label for label, told in certificate.skipped.items() if told == reason]
            lines.append(f"skipped {', '.join(cells)}: {reason}")
        if left:
            lines.append(
                f"not measured within {self.max_minutes:g} minutes: {', '.join(left)}; the same command goes on"
            )
        PlainConsole().print("\n".join(lines), soft_wrap=True)


class _Measuring:
    """Measures cells, each once; what was measured is in <folder>/cells."""

    def __init__(
        self,
        run: Run,
        steps: StepSchedule,
        digest: str,  # of the schedule's file, whatever its range
        baselines: Mapping[str, ClosedForm],
        max_minutes: float | None,
    ):
        self.run, self.steps, self.digest, self.baselines = run, steps, digest, dict(baselines)
        self.max_minutes = max_minutes
        self.started, self.longest = time.monotonic(), 0.0
        self.device = run.trainer.strategy.root_device
        self.models: dict[str, Model] = {}
        self.images: dict[int, Tensor] = {}  # the base's teacher's, by sample

    @torch.no_grad()
    def cell(self, axis: str, value: Any) -> CellRecord:
        """Return what was measured of the model with this one thing changed.

        Raises Skipped where it has no such thing, OutOfTime where it would take too long; the first cell never does.
        """
        cfg: Any = self.run.cfg.copy()
        student = None if (axis, value) == BASE else CHANGES[axis](cfg, value)
        if student is not None and (
            self.steps.orders is not None or isinstance(self.steps.steps, FittedSteps)
        ):
            raise Skipped(
                f"its steps are those of {dict(self.steps.about('solver')).get('_target_', 'a fit')} alone"
            )
        key = json.dumps(
            [axis, _plain(value), self.digest, OmegaConf.to_container(cfg.data, resolve=True)]
        )
        file = self.run.folder / "cells" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        pictures = self.run.folder / "cells" / "teacher.safetensors"
        if file.is_file() and (axis != "base" or pictures.is_file()):
            record = load_record(file, CellRecord, "measured cell", "remove it")
            if axis == "base":
                kept = load_asset(pictures, "the teacher's samples")[0]["images"]
                self.images = dict(zip(record.index, kept, strict=True))
            return record
        begun = time.monotonic()
        budget = (
            float("inf") if self.max_minutes is None or axis == "base" else 60 * self.max_minutes
        )
        if begun - self.started + self.longest > budget:
            raise OutOfTime
        setting = build_setting(cfg, self._model(cfg, axis, value))
        record = self._measure(setting, student or setting.solver, axis, key)
        if axis == "base":
            save_asset(
                pictures,
                {"images": torch.stack([self.images[number] for number in record.index])},
                {},
            )
        write_atomically(file, json.dumps(record.model_dump()) + "\n")
        self.longest = max(self.longest, time.monotonic() - begun)
        return record

    def _model(self, cfg: Any, axis: str, value: Any) -> Model:
        """The model of a cell; the one before it stays where nothing of it changes."""
        changed = value if axis == "dtype" and value in WEIGHTS else None
        key = json.dumps([OmegaConf.to_container(cfg.model, resolve=True), cfg.stages, changed])
        if key not in self.models:
            self.models.clear()  # first: two may not fit
            model = build_model(cfg)
            if changed is not None and "quantization" not in cfg.model:
                round_weights(model, value)
            self.models[key] = model.to(self.device)
        return self.models[key]

    def _measure(self, setting: Setting, solver: Solver, axis: str, key: str) -> CellRecord:
        data = self.run.noises_for(setting.model)
        values: dict[str, list[Tensor]] = {}
        index, moved, calls, shape = list[int](), list[Tensor](), 0, list(setting.model.event_shape)
        students = self._students(setting)
        for batch in data.test_dataloader():
            batch = {name: each.to(self.device) for name, each in batch.items()}
            condition, group = (
                batch.get("condition", setting.classes(batch)),
                setting.classes(batch),
            )
            noise, model = setting.first_state(batch["noise"]), setting.model
            velocity = model.velocity(condition)
            reference = model.decode(
                model.sample(setting.solver, setting.teacher, noise, condition)
            )
            calls += nfe(setting.solver, setting.teacher, velocity) * len(noise)
            numbers = batch["index"].tolist()
            if axis == "base":
                self.images |= dict(zip(numbers, reference.half().cpu(), strict=True))
            elif reference.shape[1:] == self.images[numbers[0]].shape:
                first = torch.stack([self.images[number] for number in numbers]).to(reference)
                moved.append(psnr(reference, first))
            for name, steps in students.items():
                own = solver if name == "schedule" else setting.solver
                x0 = run_steps(model, velocity, own, steps, noise, condition, group)
                values.setdefault(name, []).append(psnr(model.decode(x0), reference))
                calls += nfe(own, steps, velocity) * len(noise)
            index += numbers
        return CellRecord(
            key=key,
            index=index,
            psnr={name: torch.cat(parts).tolist() for name, parts in values.items()},
            moved=float(torch.cat(moved).mean()) if moved else None,
            shape=shape,
            calls=calls,
        )

    def _students(self, setting: Setting) -> dict[str, StepSchedule]:
        """The schedule, and the baselines' schedules on this cell's grid."""
        noise, count = torch.zeros(1, *setting.model.event_shape), self.steps.num_steps
        problem = Problem(
            standard_normal_velocity, noise, setting.grid, setting.solver, setting.distance
        )
        made = {
            name: strategy.plan(problem, [count])[count]
            for name, strategy in self.baselines.items()
        }
        return {"schedule": self.steps, **made}


def run_steps(
    model: Model,
    velocity: BoundVelocity,
    solver: Solver,
    steps: StepSchedule,
    noise: Tensor,
    condition: Tensor | None,
    group: Tensor | None,
) -> Tensor:
    """Return x0 (B, *E) of a schedule; fitted steps take a guided call's mix where they were fitted to one answer."""
    if isinstance(steps.steps, FittedSteps):
        searched_apart = (steps.about("model").get("guidance") or {}).get("scale", 1) != 1
        if searched_apart and len(velocity.mix) == 1:
            raise Skipped(
                "its steps weigh guided and unguided answers apart, and here there is one"
            )
        if not searched_apart and len(velocity.mix) > 1:
            return sample_steps(
                solver, BoundVelocity.of(lambda x, t: velocity(x, t)), noise, steps, group
            )
    return model.sample(solver, steps, noise, condition, group)


def certificate_of(
    found: Mapping[tuple[str, Any], CellRecord],
    base: Mapping[str, Any],
    tolerance: float,
    skipped: Mapping[str, str],
) -> Certificate:
    """Return the certificate of the cells that were measured; the baseline is the best one in the first cell."""
    first = found[BASE]
    names = [name for name in first.psnr if name != "schedule"]
    baseline = max(names, key=lambda name: float(np.mean(first.psnr[name])))
    losses = np.array(first.psnr["schedule"])
    cells = []
    for (axis, value), record in found.items():
        own, other = np.array(record.psnr["schedule"]), np.array(record.psnr[baseline])
        loss, gain, mean = Interval.of(losses - own), Interval.of(own - other), Interval.of(own)
        sized, told = axis in ("resolution", "frames"), json.loads(json.dumps(value))
        if axis == "guidance" and base.get("embedded_guidance") is not None:
            axis = "embedded_guidance"
        told = _solver_class(told) if axis == "solver" else told
        cells.append(
            Cell(
                axis="shape" if sized else axis,
                value=[*record.shape] if sized else told,
                n=len(own),
                psnr=mean.mean,
                psnr_interval=_ends(mean),
                baseline=float(other.mean()),
                gain=gain.mean,
                gain_interval=_ends(gain),
                loss=loss.mean,
                loss_interval=_ends(loss),
                moved=record.moved,
            )
        )
    calls = sum(record.calls for record in found.values())
    return Certificate(
        baseline=baseline,
        tolerance=tolerance,
        base=dict(base),
        cells=cells,
        skipped=dict(skipped),
        calls=calls,
    )


def _ends(interval: Interval) -> tuple[float, float]:
    low, high = interval.low, interval.high
    return (interval.mean, interval.mean) if low is None or high is None else (low, high)


def _plain(value: Any) -> Any:
    """A value that is a key."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


# --------------------------------------------------------------------------------------------------------------
# What each axis changes of a configuration; a solver is returned, for the schedule alone
# --------------------------------------------------------------------------------------------------------------


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
        return
    if value not in get_args(Dtype):
        raise ValueError(
            f"task.axes.dtype must have {', '.join([*get_args(Dtype), *WEIGHTS])}, got {value}"
        )
    cfg.model.dtype = value


def _guidance(cfg: Any, value: float) -> None:
    if "guidance" in cfg.model:
        if value != 1 and cfg.data.get("classes") is None and "prompts" not in cfg.data:
            raise Skipped("the samples have no classes (data.classes)")
        cfg.model.guidance.scale = _number("guidance", value)
        return
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
    height, width = (_whole("resolution", each) for each in value)
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
        raise Skipped(
            "a network takes the folder of task=finetune task.trainable=lora, and this is none"
        )
    else:
        cfg.stages = str(Path(value).expanduser())


def _teacher_steps(cfg: Any, value: int) -> None:
    cfg.num_teacher_steps = _whole("teacher_steps", value)


def _solver(cfg: Any, value: str) -> Solver:
    return border.build(_solver_settings(value), "task.axes.solver", Solver)


def _solver_settings(value: str) -> Any:
    file = SOLVERS / f"{value}.yaml"
    if Path(str(value)).name != value or not file.is_file():
        raise ValueError(f"task.axes.solver={value} is none of conf/solver")
    return OmegaConf.load(file)


def _solver_class(value: str) -> str:
    """What runs call it, in a range."""
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
    """Round a network's matrices and kernels as float8 or int8 weights hold them; it computes in its own dtype.

    int8: symmetric, with a scale for each output channel.
    """
    backbone: Any = (model.base if isinstance(model, Staged) else model).backbone
    for weight in backbone.parameters():
        if weight.ndim < 2:
            continue
        if kind == "int8":
            scale = (
                weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True).clamp(min=1e-12)
                / 127
            )
            weight.copy_((weight / scale).round() * scale)
        else:
            weight.copy_(weight.to(torch.float8_e4m3fn).to(weight.dtype))
