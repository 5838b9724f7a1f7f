"""The three tasks around a search: `search` plans and saves, `evaluate` measures, `compare` (the main job) does both.

Each takes the composed configuration, builds what it names, and leaves its results in `paths.output_dir`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, ListConfig, OmegaConf

from oss_exp.data.noise import NoiseData
from oss_exp.files import write_atomically
from oss_exp.models.stages import Staged
from oss_exp.schedule import StepSchedule
from oss_exp.stepsize.base import check_num_steps
from oss_exp.tasks.evaluate import EvaluateModule, Metrics
from oss_exp.tasks.older_configs import canonical, changed
from oss_exp.tasks.search import SearchModule
from oss_exp.tasks.setting import Setting, describe
from oss_exp.tasks.trajectories import Trajectories


def search(cfg: DictConfig) -> None:
    """Plan every strategy of `stepsize` for every K of `num_steps`; write schedules/<strategy>_<K>.json."""
    run = Run(cfg)
    run.plan()


def compare(cfg: DictConfig) -> None:
    """Plan as `search` does, then measure all schedules on held-out noises against the teacher."""
    run = Run(cfg)
    run.plan()
    labels = [(name, k) for name in run.strategies for k in run.num_steps]
    run.measure([(name, run.folder / "schedules" / f"{name}_{k}.json") for name, k in labels])


def evaluate(cfg: DictConfig) -> None:
    """Measure the saved schedule `task.schedule`; without one, plan `stepsize` first."""
    if cfg.task.schedule is None:
        return compare(cfg)
    run = Run(cfg)
    path = Path(cfg.task.schedule).expanduser()
    steps = StepSchedule.load(path)
    run.check_fits(path, steps)
    run.measure([(steps.about("strategy").get("name", path.stem), path)])
    rank_zero_only(steps.save)(run.folder / "schedules" / path.name)


RESULTS = ("schedules", "calls", "evaluation", "metrics.json", "images", "stages.json")


def require_same(cfg: DictConfig, folder: Path, *free: str) -> None:
    """ValueError where the folder holds results of another configuration, but for FREE and these keys of cfg.task."""
    if not (folder / "config.yaml").is_file() or not any((folder / name).exists() for name in RESULTS):
        return
    old, new = (
        canonical(OmegaConf.to_container(each, resolve=resolve))
        for each, resolve in ((OmegaConf.load(folder / "config.yaml"), False), (cfg, True))
    )
    for each in (old, new):
        each["task"] = {key: value for key, value in each.get("task", {}).items() if key not in free}
    if keys := changed(old, new):
        raise ValueError(
            f"{folder} holds a run with another {', '.join(keys)}; go on with the same values, or choose another folder"
        )


class Run:
    """Everything that the configuration names, built once; fails before any work when a value does not fit."""

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg
        self.folder = Path(cfg.paths.output_dir)
        if not isinstance(cfg.num_steps, ListConfig):
            raise ValueError(f"num_steps must be a list of whole numbers such as [5,10], got {cfg.num_steps!r}")
        model = instantiate(cfg.model)
        if cfg.stages is not None:
            model = Staged.load(model, cfg.stages)
        if cfg.data.get("classes") == "auto":
            cfg.data.classes = "all" if model.needs_classes else None
        require_same(cfg, self.folder)
        self.config: Any = OmegaConf.to_container(cfg, resolve=True)
        if not isinstance(cfg.num_teacher_steps, int) or cfg.num_teacher_steps < 1:
            raise ValueError(f"num_teacher_steps must be a whole number of at least 1, got {cfg.num_teacher_steps!r}")
        self.setting = Setting(
            model=model,
            grid=instantiate(cfg.noise_schedule).nodes(cfg.num_teacher_steps),
            solver=instantiate(cfg.solver),
            distance=instantiate(cfg.distance, _convert_="all").bind(model),
        )
        if (calibration := self.setting.solver.calibration) is not None:
            calibration.check(model.fingerprint, model.name, self.setting.grid)
        for name in ("offload_states", "keep_calls"):
            if not isinstance(cfg[name], bool):
                raise ValueError(f"{name} must be true or false, got {cfg[name]!r}")
        if cfg.run_orders not in ("searched", "fixed"):
            raise ValueError(f"run_orders must be searched or fixed, got {cfg.run_orders!r}")
        self.strategies = {name: instantiate(strategy, _convert_="all") for name, strategy in cfg.stepsize.items()}
        self.num_steps = check_num_steps(list(cfg.num_steps), cfg.num_teacher_steps)
        self.data: NoiseData = instantiate(cfg.data, event_shape=model.event_shape, num_classes=model.num_classes)
        self.metrics = Metrics(cfg.evaluation)
        self.trajectories = Trajectories(cfg.evaluation.trajectories)
        for strategy in self.strategies.values():
            strategy.network_calls(cfg.num_teacher_steps, self.num_steps, 0)  # refuses a band that does not fit
        self.about = describe(self.setting, self.config)
        try:
            self.trainer: L.Trainer = instantiate(cfg.trainer, default_root_dir=self.folder)
        except InstantiationException as error:
            raise ValueError(
                f"trainer: {error.__cause__}; choose one that this machine has, such as trainer=cpu"
            ) from error
        rank_zero_only(write_atomically)(self.folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))

    def plan(self) -> None:
        """Write the schedules that are not there yet."""
        folder = self.folder / "schedules"
        missing = {
            name: strategy
            for name, strategy in self.strategies.items()
            if not all((folder / f"{name}_{k}.json").is_file() for k in self.num_steps)
        }
        if not missing:
            return
        module = SearchModule(
            self.setting,
            missing,
            self.num_steps,
            folder,
            self.about,
            self.config["stepsize"],
            self.cfg.offload_states,
            self.cfg.keep_calls,
        )
        self.trainer.predict(module, dataloaders=self.data.predict_dataloader(), return_predictions=False)

    def measure(self, files: list[tuple[str, Path]]) -> None:
        schedules, rows = {}, {}
        for name, path in files:
            steps = StepSchedule.load(path)
            if self.cfg.run_orders == "fixed":
                steps = replace(steps, orders=None)
            label = f"{name} K={steps.num_steps}"
            schedules[label] = steps
            rows[label] = {
                "strategy": name,
                "num_steps": steps.num_steps,
                "baseline": steps.about("strategy").get("baseline", False),
                "start": steps.start,
                "schedule": f"schedules/{path.name}",
                "planning": dict(steps.about("planning")),
            }
        shown = self.cfg.evaluation.save_images, self.trajectories, self.data.eval_samples
        module = EvaluateModule(self.setting, schedules, rows, self.folder, self.about, self.metrics, *shown)
        self.trainer.test(module, dataloaders=self.data.test_dataloader(), verbose=False)

    def check_fits(self, path: Path, steps: StepSchedule) -> None:
        """Refuse a schedule made for another model, another first time, or other noises than this run's."""
        made_for = steps.about("model")
        model = self.setting.model
        own = (model.fingerprint, model.original.fingerprint)
        if made_for.get("sha256") not in own and not self.cfg.task.allow_other_model:
            raise ValueError(
                f"step schedule {path} was searched on model {made_for.get('name')!r} (weights "
                f"{str(made_for.get('sha256'))[:12]}), this run has {model.name!r} ({model.fingerprint[:12]}); "
                "choose that model, or set task.allow_other_model=true to measure how it transfers"
            )
        first = float(self.setting.grid[0])
        if abs(steps.start_time - first) > 1e-9:
            raise ValueError(
                f"step schedule {path} starts its noise at t = {steps.start_time:.6g}, this run's teacher at "
                f"{first:.6g}; choose the noise_schedule it was searched on"
            )
        solver = {**self.config["solver"], "calibration": None}
        if steps.orders is not None and self.cfg.run_orders == "searched" and steps.provenance.get("solver") != solver:
            raise ValueError(
                f"step schedule {path} has the orders searched with {steps.provenance.get('solver')}, this run steps "
                f"with {solver}; choose that solver, or run_orders=fixed"
            )
        if steps.weights is not None and made_for.get("guidance") != asdict(model.guidance):
            raise ValueError(
                f"step schedule {path} has steps fitted at model.guidance={made_for.get('guidance')}, this run has "
                f"{asdict(model.guidance)}; choose that guidance, or plan it again"
            )
        if steps.samples is not None and steps.provenance.get("seed") != self.cfg.data.seed:
            raise ValueError(
                f"step schedule {path} belongs to the noises of data.seed={steps.provenance.get('seed')}, "
                f"this run has data.seed={self.cfg.data.seed}"
            )
