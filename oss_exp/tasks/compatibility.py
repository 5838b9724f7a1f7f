"""Refuse what does not go together.

A run folder holds results of one configuration, and a saved schedule fits certain runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from oss_exp.files import inside, load_config
from oss_exp.models.base import Model
from oss_exp.provenance import configuration
from oss_exp.schedule import FittedSteps, StepSchedule
from oss_exp.solvers import Solver, named_solver
from oss_exp.tasks.older_configs import canonical, changed
from oss_exp.tasks.setting import Setting

RESULTS = (
    "schedules",
    "cells",
    "calls",
    "evaluation",
    "metrics.json",
    "images",
    "stages.json",
    "checkpoints",
)
MEASURING = ("metric", "evaluation")  # keys that may change: schedules are measured again


def require_same(cfg: DictConfig, folder: Path, *free: str) -> None:
    """Check that a folder holds no results of another configuration.

    The metrics may differ.

    Args:
        cfg: The composed configuration.
        folder: The run folder.
        free: Keys of `cfg.task` that may differ.

    Raises:
        ValueError: If it does.
    """
    has_results = any((folder / name).exists() for name in RESULTS)
    if not (folder / "config.yaml").is_file() or not has_results:
        return

    # Both in today's spelling, without the free keys.
    new = canonical(OmegaConf.to_container(cfg, resolve=True))
    try:
        old = canonical(load_config(inside(folder, "config.yaml"), "configuration"))
        for values in (old, new):
            task = values.get("task", {})
            values["task"] = {key: value for key, value in task.items() if key not in free}
        keys = [key for key in changed(old, new) if key not in MEASURING]
        if "task" in keys:
            options = [key for key in changed(old["task"], new["task"]) if key != "_target_"]
            names = ", ".join(f"task.{key}" for key in options)
            keys[keys.index("task")] = names or "task"
    except (AttributeError, KeyError, TypeError):
        raise ValueError(
            f"{folder / 'config.yaml'} is not the configuration of a run; choose another folder"
        ) from None

    if keys:
        raise ValueError(
            f"{folder} holds a run with another {', '.join(keys)}; go on with the same values, or "
            "choose another folder"
        )


def check_fits(
    setting: Setting, cfg: DictConfig, path: Path, steps: StepSchedule, allow_other_model: bool
) -> None:
    """Check that a saved schedule fits a run.

    Args:
        setting: Model, grid, solver and distance of the run.
        cfg: The composed configuration.
        path: Path of the schedule, for messages.
        steps: The schedule.
        allow_other_model: Accept a schedule that was searched on other weights.

    Raises:
        ValueError: If it was made for another model, first time, solver, guidance or noises.
    """
    # Model.
    model = setting.model
    searched_model = steps.about("model")
    fingerprints = (model.fingerprint, model.original.fingerprint)
    if searched_model.get("sha256") not in fingerprints and not allow_other_model:
        raise ValueError(
            f"step schedule {path} was searched on model {searched_model.get('name')!r} (weights "
            f"{str(searched_model.get('sha256'))[:12]}), this run has {model.name!r} "
            f"({model.fingerprint[:12]}); choose that model, or set task.allow_other_model=true "
            "to measure how it transfers"
        )

    # First time.
    first = float(setting.grid[0])
    if abs(steps.start_time - first) > 1e-9:
        raise ValueError(
            f"step schedule {path} starts its noise at t = {steps.start_time:.6g}, this run's "
            f"teacher at {first:.6g}; choose the noise_schedule it was searched on"
        )

    # Solver, whose orders were searched.
    solver = setting.teacher_solver
    searched_solver = steps.about("solver")
    uses_orders = steps.orders is not None and cfg.run_orders == "searched"
    if uses_orders and not _is_recorded(solver, searched_solver):
        raise ValueError(
            f"step schedule {path} has the orders searched with {dict(searched_solver)}, this run "
            f"steps with {solver}; choose that solver, or run_orders=fixed"
        )

    # Guidance, at which steps were fitted.
    is_fitted = isinstance(steps.steps, FittedSteps)
    if is_fitted and searched_model.get("guidance") != asdict(model.guidance):
        raise ValueError(
            f"step schedule {path} has steps fitted at "
            f"model.guidance={searched_model.get('guidance')}, this run has "
            f"{asdict(model.guidance)}; choose that guidance, or plan it again"
        )

    # Noises.
    seed = steps.provenance.get("seed")
    if steps.per_sample and seed != cfg.data.seed:
        raise ValueError(
            f"step schedule {path} belongs to the noises of data.seed={seed}, this run has "
            f"data.seed={cfg.data.seed}"
        )


def axes_of(cfg: DictConfig, model: Model) -> dict[str, Any]:
    """Return the value of a run on every axis of a certificate; None: it has no such axis."""
    # Guidance; a distilled transformer embeds its scale, and that is no CFG.
    call = cfg.model.get("call") or {}
    scale = call.get("true_cfg_scale", call.get("guidance_scale"))
    if "guidance" in cfg.model:
        scale = cfg.model.guidance.scale
    transformer = getattr(getattr(model, "pipe", None), "transformer", None)
    embedded_scale = None
    if getattr(getattr(transformer, "config", None), "guidance_embeds", False):
        scale = call.get("true_cfg_scale", 1.0)
        embedded_scale = call.get("guidance_scale")

    # Weights and shift.
    quantization = cfg.model.get("quantization")
    if quantization == "float8":
        quantization = "float8_e4m3fn"
    dtype = quantization or cfg.model.get("dtype")
    shift = cfg.noise_schedule.get("shift")
    loras = ", ".join(cfg.model.get("loras") or [])

    return {
        "dtype": dtype if isinstance(dtype, str) else None,
        "guidance": None if scale is None else float(scale),
        "embedded_guidance": None if embedded_scale is None else float(embedded_scale),
        "shift": None if shift is None else float(shift),
        "shape": list(model.event_shape),
        "lora": loras or cfg.stages or "",
        "teacher_steps": int(cfg.num_teacher_steps),
        "solver": str(cfg.solver.get("_target_", "")).rpartition(".")[2],
    }


def warn_outside(setting: Setting, cfg: DictConfig, path: Path, steps: StepSchedule) -> None:
    """Warn if a run is outside the range in which a schedule was measured to hold."""
    if steps.range is None:
        return
    from oss_exp.export.oss_scheduler import outside

    for text in outside(steps.range.model_dump(), axes_of(cfg, setting.model)):
        warnings.warn(f"step schedule {path}: {text}", stacklevel=2)


def _is_recorded(solver: Solver, record: Mapping[str, Any]) -> bool:
    """Tell whether a schedule's provenance names this solver.

    Its class may be outside this package.
    """
    settings = configuration(solver)
    if not str(settings["_target_"]).startswith("oss_exp."):
        return {**record, "calibration": None} == settings
    try:
        return named_solver(record) == solver
    except ValueError:
        return False
