"""What every strategy of a run has in common, and how a schedule's provenance describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from oss_exp.distances import Distance
from oss_exp.models.base import Model
from oss_exp.provenance import model_record, provenance
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Solver
from oss_exp.velocity import BoundVelocity


@dataclass(frozen=True, eq=False)
class Setting:
    """What every strategy of a run has in common: the model, the teacher's grid (N+1,), the solver, the distance."""

    model: Model
    grid: Tensor
    solver: Solver
    distance: Distance

    @property
    def teacher(self) -> StepSchedule:
        """The grid as a schedule: sampling it is running the teacher."""
        return StepSchedule(self.grid)

    def velocity(self, batch: Mapping[str, Tensor]) -> BoundVelocity:
        """Bound to the batch's conditions (B, ...) where its data has any, else to its classes."""
        return self.model.velocity(batch.get("condition", self.classes(batch)))

    @staticmethod
    def classes(batch: Mapping[str, Tensor]) -> Tensor | None:
        """(B,), each with a mean clean sample of its own; None: all samples share one, whatever their conditions."""
        return None if bool((batch["label"] < 0).all()) else batch["label"]

    def first_state(self, noise: Tensor) -> Tensor:
        """Unit noise (B, *E) -> the teacher's state at grid[0] = t_N: t_N eps, as EDM and DDPM samplers start."""
        return noise * self.grid[0].to(noise)


def describe(setting: Setting, config: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance that all schedules of a run share; `config` is the resolved run configuration."""
    data = config["data"]
    return provenance(
        model={
            **model_record(setting.model),
            "classes": data.get("classes"),
            "prompts": data.get("prompts"),
        },
        teacher={"noise_schedule": config["noise_schedule"], "num_steps": len(setting.grid) - 1},
        solver=config["solver"],
        distance=config["distance"],
        seed=data["seed"],
    )
