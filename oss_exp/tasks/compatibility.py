"""What may not go together: a run folder and another configuration, a saved schedule and another run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
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
MEASURING = ("metric", "evaluation")  # measured anew where they change, of the same schedules


def require_same(cfg: DictConfig, folder: Path, *free: str) -> None:
    """Raise ValueError where the folder holds results of another configuration.

    What is measured may differ. free: keys of cfg.task that may differ too.
    """
    if not (folder / "config.yaml").is_file() or not any(
        (folder / name).exists() for name in RESULTS
    ):
        return
    new = canonical(OmegaConf.to_container(cfg, resolve=True))
    try:
        old = canonical(load_config(inside(folder, "config.yaml"), "configuration"))
        for values in (old, new):
            values["task"] = {
                key: value for key, value in values.get("task", {}).items() if key not in free
            }
        keys = [key for key in changed(old, new) if key not in MEASURING]
        if "task" in keys:
            options = [
                f"task.{key}" for key in changed(old["task"], new["task"]) if key != "_target_"
            ]
            keys[keys.index("task")] = ", ".join(options) or "task"
    except (AttributeError, KeyError, TypeError):
        raise ValueError(
            f"{folder / 'config.yaml'} is no configuration of a run; choose another folder"
        ) from None
    if keys:
        raise ValueError(
            f"{folder} holds a run with another {', '.join(keys)}; go on with the same values, or choose another folder"
        )


def check_fits(
    setting: Setting, cfg: DictConfig, path: Path, steps: StepSchedule, allow_other_model: bool
) -> None:
    """Refuse a schedule made for another model, another first time, or other noises than those of this run."""
    made_for = steps.about("model")
    model = setting.model
    own = (model.fingerprint, model.original.fingerprint)
    if made_for.get("sha256") not in own and not allow_other_model:
        raise ValueError(
            f"step schedule {path} was searched on model {made_for.get('name')!r} (weights "
            f"{str(made_for.get('sha256'))[:12]}), this run has {model.name!r} ({model.fingerprint[:12]}); "
            "choose that model, or set task.allow_other_model=true to measure how it transfers"
        )
    first = float(setting.grid[0])
    if abs(steps.start_time - first) > 1e-9:
        raise ValueError(
            f"step schedule {path} starts its noise at t = {steps.start_time:.6g}, this run's teacher at "
            f"{first:.6g}; choose the noise_schedule it was searched on"
        )
    solver, searched_with = replace(setting.solver, calibration=None), steps.about("solver")
    searched = steps.orders is not None and cfg.run_orders == "searched"
    if searched and not _is_of(solver, searched_with):
        raise ValueError(
            f"step schedule {path} has the orders searched with {dict(searched_with)}, this run steps "
            f"with {solver}; choose that solver, or run_orders=fixed"
        )
    if isinstance(steps.steps, FittedSteps) and made_for.get("guidance") != asdict(model.guidance):
        raise ValueError(
            f"step schedule {path} has steps fitted at model.guidance={made_for.get('guidance')}, this run has "
            f"{asdict(model.guidance)}; choose that guidance, or plan it again"
        )
    if steps.per_sample and steps.provenance.get("seed") != cfg.data.seed:
        raise ValueError(
            f"step schedule {path} belongs to the noises of data.seed={steps.provenance.get('seed')}, "
            f"this run has data.seed={cfg.data.seed}"
        )


def axes_of(cfg: DictConfig, model: Model) -> dict[str, Any]:
    """Return what a run is on each axis of a certificate; None: it has no such axis."""
    call = cfg.model.get("call") or {}
    scale = call.get("true_cfg_scale", call.get("guidance_scale"))
    if "guidance" in cfg.model:
        scale = cfg.model.guidance.scale
    transformer = getattr(getattr(model, "pipe", None), "transformer", None)
    embedded = bool(
        getattr(getattr(transformer, "config", None), "guidance_embeds", False)
    )  # it is no CFG then
    inner = None
    if embedded:
        scale, inner = call.get("true_cfg_scale", 1.0), call.get("guidance_scale")
    quantized = {"float8": "float8_e4m3fn"}.get(
        cfg.model.get("quantization"), cfg.model.get("quantization")
    )
    dtype, shift = quantized or cfg.model.get("dtype"), cfg.noise_schedule.get("shift")
    loras = ", ".join(cfg.model.get("loras") or [])
    return {
        "dtype": dtype if isinstance(dtype, str) else None,
        "guidance": None if scale is None else float(scale),
        "embedded_guidance": None if inner is None else float(inner),
        "shift": None if shift is None else float(shift),
        "shape": list(model.event_shape),
        "lora": loras or cfg.stages or "",
        "teacher_steps": int(cfg.num_teacher_steps),
        "solver": str(cfg.solver.get("_target_", "")).rpartition(".")[2],
    }


def warn_outside(setting: Setting, cfg: DictConfig, path: Path, steps: StepSchedule) -> None:
    """Warn where a run is outside of the range that a schedule was measured to hold in."""
    if steps.range is None:
        return
    from oss_exp.export.oss_scheduler import outside

    for text in outside(steps.range.model_dump(), axes_of(cfg, setting.model)):
        warnings.warn(f"step schedule {path}: {text}", stacklevel=2)


def _is_of(solver: Solver, record: Mapping[str, Any]) -> bool:
    """Whether the provenance of a schedule names this solver, which may be of a class outside of this package."""
    own = configuration(solver)
    if not str(own["_target_"]).startswith("oss_exp."):
        return {**record} == own
    try:
        return named_solver(record) == solver
    except ValueError:
        return False
