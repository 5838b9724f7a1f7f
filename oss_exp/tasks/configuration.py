"""The types of the values of a run that are no object's: what `conf/config.yaml` holds beside its groups."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

import lightning as L
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from oss_exp.data.noise import NoiseData
from oss_exp.distances import Distance
from oss_exp.evaluation.metrics import ImageMetric
from oss_exp.models.base import Model
from oss_exp.noise import NoiseSchedule
from oss_exp.solvers import Solver
from oss_exp.stepsize import StepsizeStrategy
from oss_exp.tasks import border
from oss_exp.tasks.task import Count, Task, Whole


class Evaluation(TypedDict):
    """What is measured besides PSNR, and what is saved."""

    save_images: Literal["png", "npz"] | None
    trajectories: Whole


class Paths(TypedDict):
    """Folders."""

    output_dir: str
    data_dir: str


class Configuration(TypedDict):
    """A composed configuration: each task has those of these keys that it reads, and may have more."""

    model: Model
    noise_schedule: NoiseSchedule
    solver: Solver
    distance: Distance
    stepsize: Mapping[str, StepsizeStrategy]
    data: NoiseData
    images: Any
    metric: Mapping[str, ImageMetric]
    evaluation: Evaluation
    trainer: L.Trainer
    logger: Logger | None
    paths: Paths
    task: Task
    num_steps: Annotated[list[int], "such as [5,10]"]
    num_teacher_steps: Count
    run_orders: Literal["searched", "fixed"]
    stages: str | None
    keep_calls: bool
    offload_states: bool


def expand_home(node: Any) -> None:
    """Write the home folder for `~` at the start of every value below a node, in place: such values are paths."""
    for key in range(len(node)) if OmegaConf.is_list(node) else list(node):
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if OmegaConf.is_config(value):
            expand_home(value)
        elif isinstance(value, str) and (value == "~" or value.startswith("~/")):
            node[key] = os.path.expanduser(value)


def check_configuration(cfg: DictConfig) -> None:
    """Raise one ValueError for all values of a composed configuration that have a wrong type, also unused ones."""
    written: Any = OmegaConf.to_container(
        cfg
    )  # with interpolations, which may be of what is missing
    unset = [key for key, value in written.items() if value == "???"]
    if asked := unset + [f"task.{key}" for key, value in written["task"].items() if value == "???"]:
        raise ValueError(
            f"{', '.join(asked)} must be set: add {' '.join(f'{key}=VALUE' for key in asked)}"
        )
    border.check(cfg, kind=Configuration)
