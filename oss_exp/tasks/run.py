"""What the tasks around a search share: everything that the configuration names, built once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from oss_exp.checks import require_name
from oss_exp.data.noise import NoiseData
from oss_exp.data.prompts import read_prompts
from oss_exp.distances import Distance
from oss_exp.files import write_atomically
from oss_exp.models.base import Model
from oss_exp.models.stages import Staged
from oss_exp.noise import NoiseSchedule
from oss_exp.solvers import Solver
from oss_exp.stepsize import ClosedForm, StepsizeStrategy
from oss_exp.stepsize.base import check_num_steps
from oss_exp.stepsize.oss.strategies import with_required
from oss_exp.tasks import border
from oss_exp.tasks.collective import GroupEnd, SharedFolder
from oss_exp.tasks.compatibility import require_same
from oss_exp.tasks.setting import Setting, describe


class Run:
    """Everything that the configuration names, built once; fails before any work when a value does not fit."""

    def __init__(self, cfg: DictConfig, *free: str):
        """free: keys of cfg.task in which a run may differ from the one whose results its folder has."""
        self.cfg = cfg
        self.folder = Path(cfg.paths.output_dir)
        for name in cfg.stepsize:
            require_name(stepsize=str(name))
        model = build_model(cfg)
        require_name(**{"model.name": model.name})
        if cfg.data.get("classes") == "auto":
            cfg.data.classes = "all" if model.needs_classes else None
        require_same(cfg, self.folder, *free)
        self.config: Any = OmegaConf.to_container(cfg, resolve=True)
        self.strategies: dict[str, StepsizeStrategy] = {
            name: _bound(border.build(strategy, f"stepsize.{name}", StepsizeStrategy), model)
            for name, strategy in cfg.stepsize.items()
        }
        self.setting = build_setting(cfg, model, self.strategies.values())
        if (calibration := self.setting.solver.amplitude_table) is not None:
            calibration.check(model.fingerprint, model.name, self.setting.grid)
        self.num_steps = check_num_steps(list(cfg.num_steps), cfg.num_teacher_steps)
        self.data = self.noises()
        for strategy in self.strategies.values():
            strategy.network_calls(
                cfg.num_teacher_steps, self.num_steps, 0
            )  # refuses a band that does not fit
        self.about = describe(self.setting, self.config)
        try:
            self.trainer: L.Trainer = border.build(
                cfg.trainer, "trainer", L.Trainer, default_root_dir=self.folder
            )
        except ValueError as error:
            raise ValueError(
                f"{error}; choose one that this machine has, such as trainer=cpu"
            ) from error
        self.trainer.callbacks += [GroupEnd(), SharedFolder()]  # pyright: ignore[reportAttributeAccessIssue]  # Lightning sets it
        grid = json.dumps({"times": self.setting.grid.tolist()})
        rank_zero_only(write_atomically)(self.folder / "teacher.json", f"{grid}\n")
        rank_zero_only(write_atomically)(
            self.folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True)
        )

    def noises(self, **changes: Any) -> NoiseData:
        """Return what `data` describes for this model, with some of its values changed."""
        return self.noises_for(self.setting.model, **changes)

    def noises_for(self, model: Model, **changes: Any) -> NoiseData:
        """Return what `data` describes for such a model, with some of its values changed."""
        return border.build(
            self.cfg.data,
            "data",
            NoiseData,
            event_shape=model.event_shape,
            num_classes=model.num_classes,
            **changes,
        )

    def file(self, strategy: str, num_steps: int) -> Path:
        """Return where the schedule of a strategy is saved."""
        return self.folder / "schedules" / f"{strategy}_{num_steps}.json"


def build_model(cfg: DictConfig) -> Model:
    """Return the model of a configuration, with the stages that it names."""
    model = border.build(cfg.model, "model", Model, **prompts_for(cfg))
    return model if cfg.stages is None else Staged.load(model, cfg.stages)


def build_setting(
    cfg: DictConfig, model: Model, strategies: Iterable[StepsizeStrategy] = ()
) -> Setting:
    """Return what a configuration makes of a model; the grid has the nodes that these strategies require."""
    schedule: NoiseSchedule = border.build(cfg.noise_schedule, "noise_schedule", NoiseSchedule)
    return Setting(
        model=model,
        grid=with_required(schedule.bind(model).nodes(cfg.num_teacher_steps), strategies),
        solver=border.build(cfg.solver, "solver", Solver),
        distance=border.build(cfg.distance, "distance", Distance).bind(model),
    )


def _bound(strategy: StepsizeStrategy, model: Model) -> StepsizeStrategy:
    """A schedule by hand can be the model's own."""
    if isinstance(strategy, ClosedForm):
        return replace(strategy, schedule=strategy.schedule.bind(model))
    return strategy


def takes_prompts(model: DictConfig) -> bool:
    """Whether a configuration of conf/model is of a model of prompts."""
    return "prompts" in border.parameters_of(border.class_of(model, "model")).kinds


def prompts_for(cfg: DictConfig) -> dict[str, list[str]]:
    """Return the data's prompts as the argument of a model that takes prompts, which encodes them before it loads."""
    return (
        {"prompts": read_prompts(cfg.data.prompts)}
        if "prompts" in cfg.data and takes_prompts(cfg.model)
        else {}
    )
