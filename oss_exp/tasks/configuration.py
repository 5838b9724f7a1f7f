"""The types of a composed configuration: its groups, and the plain values beside them."""

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
    """The plain values of `evaluation`."""

    save_images: Literal["png", "npz"] | None
    trajectories: Whole


class Paths(TypedDict):
    """The folders of a run."""

    output_dir: str
    data_dir: str


class Configuration(TypedDict):
    """A composed configuration; a task has the keys that it reads, and may have others."""

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
    """Replace `~` at the start of every value below a node by the home folder, in place.

    Such values are paths.
    """
    for key in range(len(node)) if OmegaConf.is_list(node) else list(node):
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        value = node[key]
        if OmegaConf.is_config(value):
            expand_home(value)
        elif isinstance(value, str) and (value == "~" or value.startswith("~/")):
            node[key] = os.path.expanduser(value)


def list_num_steps(cfg: DictConfig) -> None:
    """Replace a single number of steps by a list of it, in place: `num_steps=5` means `[5]`."""
    if type(cfg.get("num_steps")) is int:
        cfg.num_steps = [cfg.num_steps]


def check_configuration(cfg: DictConfig) -> None:
    """Check the types of all values of a composed configuration, also of unused ones.

    Raises:
        ValueError: If values are not set or have a wrong type; the message lists all of them.
    """
    # Unset values first; interpolations stay, because they may refer to such values.
    written: Any = OmegaConf.to_container(cfg)
    unset = []
    for prefix, values in (("", written), ("task.", written["task"])):
        for key, value in values.items():
            if value == "???":
                unset.append(f"{prefix}{key}")
    if unset:
        advice = " ".join(f"{key}=VALUE" for key in unset)
        raise ValueError(f"{', '.join(unset)} must be set: add {advice}")
    border.check(cfg, kind=Configuration)
