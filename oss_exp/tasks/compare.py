"""Plan every strategy for every budget, and measure all schedules: `task=compare`, the main job."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig

from oss_exp.tasks.evaluate import metrics_of, plan_and_measure
from oss_exp.tasks.run import Run
from oss_exp.tasks.task import Task


@dataclass(frozen=True)
class Compare(Task):
    """Plan every strategy of `stepsize` for every K of `num_steps`, and measure all schedules.

    All run on the same held-out noises, and are compared with the teacher.
    """

    def __call__(self, cfg: DictConfig) -> None:
        run = Run(cfg)
        plan_and_measure(run, metrics_of(run))
