"""Build the objects that a run's configuration names.

Searching, evaluating and comparing share them. They are built once, before any work, so that a
value that does not fit is reported in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from oss_exp.checks import require_name
from oss_exp.data.noise import NoiseData
from oss_exp.data.prompts import read_prompts
from oss_exp.distances import Distance
from oss_exp.files import write_atomically
from oss_exp.models.base import Model
from oss_exp.models.pipeline import Pipeline
from oss_exp.models.stages import Staged
from oss_exp.noise import NoiseSchedule
from oss_exp.solvers import Solver
from oss_exp.stepsize import ClosedForm, StepsizeStrategy
from oss_exp.stepsize.base import check_num_steps
from oss_exp.stepsize.oss.strategies import with_required
from oss_exp.tasks import border
from oss_exp.tasks.collective import build_trainer
from oss_exp.tasks.compatibility import require_same
from oss_exp.tasks.setting import Setting, describe


class Run:
    """The objects of one run, built from its configuration.

    Making it writes `config.yaml` and `teacher.json` into the run folder.

    Args:
        cfg: The composed configuration.
        free: Keys of `cfg.task` that may have changed since the results in the folder were made.

    Raises:
        ValueError: If a value does not fit, or the folder holds results of another configuration.
    """

    def __init__(self, cfg: DictConfig, *free: str):
        self.cfg = cfg
        self.folder = Path(cfg.paths.output_dir)

        # Model, and the configuration with nothing left open.
        for name in cfg.stepsize:
            require_name(stepsize=str(name))
        model = build_model(cfg)
        require_name(**{"model.name": model.name})
        if cfg.data.get("classes") == "auto":
            cfg.data.classes = "all" if model.needs_classes else None
        require_same(cfg, self.folder, *free)

        # A pipeline tells its times and shapes by running, which on a CPU takes long.
        self.trainer = build_trainer(cfg)
        if isinstance(model, Pipeline):
            model.to(self.trainer.strategy.root_device)

        self.config: Any = OmegaConf.to_container(cfg, resolve=True)

        # Strategies, and what they all share.
        self.strategies: dict[str, StepsizeStrategy] = {}
        for name, node in cfg.stepsize.items():
            strategy = border.build(node, f"stepsize.{name}", StepsizeStrategy)
            self.strategies[name] = _bind(strategy, model)
        self.setting = build_setting(cfg, model, self.strategies.values())
        if (calibration := self.setting.solver.amplitude_table) is not None:
            calibration.check(model.fingerprint, model.name, self.setting.grid)

        # Budgets and data. Counting the calls refuses what does not fit the grid.
        self.num_steps = check_num_steps(list(cfg.num_steps), cfg.num_teacher_steps)
        self.data = self.noises()
        for strategy in self.strategies.values():
            strategy.network_calls(cfg.num_teacher_steps, self.num_steps, 0)
        self.about = describe(self.setting, self.config)

        self._write_inputs()

    @property
    def per_sample(self) -> list[str]:
        """Names of the strategies that plan one schedule per sample."""
        return [name for name, strategy in self.strategies.items() if strategy.per_sample]

    def noises(self, **changes: Any) -> NoiseData:
        """Return the noises that `data` describes for this run's model.

        Args:
            changes: Values that replace those of `data`.
        """
        return self.noises_for(self.setting.model, **changes)

    def noises_for(self, model: Model, **changes: Any) -> NoiseData:
        """Return the noises that `data` describes, in the shape and classes of `model`.

        Args:
            model: The model that takes the noises.
            changes: Values that replace those of `data`.
        """
        return border.build(
            self.cfg.data,
            "data",
            NoiseData,
            event_shape=model.event_shape,
            num_classes=model.num_classes,
            **changes,
        )

    def file(self, strategy: str, num_steps: int) -> Path:
        """Return the path of the file for a strategy's schedule of `num_steps` steps."""
        return self.folder / "schedules" / f"{strategy}_{num_steps}.json"

    def _write_inputs(self) -> None:
        grid = json.dumps({"times": self.setting.grid.tolist()})
        text = OmegaConf.to_yaml(self.cfg, resolve=True)
        rank_zero_only(write_atomically)(self.folder / "teacher.json", f"{grid}\n")
        rank_zero_only(write_atomically)(self.folder / "config.yaml", text)


def build_model(cfg: DictConfig) -> Model:
    """Return the model of a configuration, with its finetuned stages if it names some."""
    model = border.build(cfg.model, "model", Model, **prompts_for(cfg))
    return model if cfg.stages is None else Staged.load(model, cfg.stages)


def build_setting(
    cfg: DictConfig, model: Model, strategies: Iterable[StepsizeStrategy] = ()
) -> Setting:
    """Return the model with the teacher's grid, solver and distance of a configuration.

    Args:
        cfg: The composed configuration.
        model: The model to run.
        strategies: Strategies whose required times become nodes of the grid.
    """
    schedule: NoiseSchedule = border.build(cfg.noise_schedule, "noise_schedule", NoiseSchedule)
    nodes = schedule.bind(model).nodes(cfg.num_teacher_steps)
    return Setting(
        model=model,
        grid=with_required(nodes, strategies),
        solver=border.build(cfg.solver, "solver", Solver),
        distance=border.build(cfg.distance, "distance", Distance).bind(model),
    )


def _bind(strategy: StepsizeStrategy, model: Model) -> StepsizeStrategy:
    """Return the strategy; a closed-form one is bound to the model, which may set its times."""
    if isinstance(strategy, ClosedForm):
        return replace(strategy, schedule=strategy.schedule.bind(model))
    return strategy


def takes_prompts(model: DictConfig) -> bool:
    """Return whether the class of a model configuration has an argument `prompts`."""
    return "prompts" in border.parameters_of(border.class_of(model, "model")).kinds


def prompts_for(cfg: DictConfig) -> dict[str, list[str]]:
    """Return the argument {"prompts": [...]} for a model that takes prompts, else {}.

    Such a model encodes all of them before it loads its network.
    """
    if "prompts" in cfg.data and takes_prompts(cfg.model):
        return {"prompts": read_prompts(cfg.data.prompts)}
    return {}
