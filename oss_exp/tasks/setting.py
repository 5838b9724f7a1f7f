"""The setting that all strategies of a run share, and its record in the provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    """The setting that all strategies of a run share.

    Attributes:
        model: The model.
        grid: Nodes of the teacher, (N+1,), decreasing.
        solver: The solver.
        distance: What the search minimises.
    """

    model: Model
    grid: Tensor
    solver: Solver
    distance: Distance

    @property
    def teacher(self) -> StepSchedule:
        """The grid as a step schedule, which samples as the teacher does."""
        return StepSchedule(self.grid)

    @property
    def teacher_solver(self) -> Solver:
        """The solver without its calibration, which is for students alone."""
        return replace(self.solver, calibration=None)

    def velocity(self, batch: Mapping[str, Tensor]) -> BoundVelocity:
        """Return the velocity of a batch: bound to its conditions (B, ...), or to its classes."""
        return self.model.velocity(batch.get("condition", self.classes(batch)))

    @staticmethod
    def classes(batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return the classes (B,) of a batch, or None if it has none.

        Every class has a mean clean sample; without classes, all samples share one.
        """
        return None if bool((batch["label"] < 0).all()) else batch["label"]

    def first_state(self, noise: Tensor) -> Tensor:
        """Return the teacher's state t_N eps at its first node t_N, for unit noise eps (B, *E).

        The samplers of EDM and DDPM start in this way.
        """
        return noise * self.grid[0].to(noise)


def describe(setting: Setting, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the provenance that all schedules of a run share.

    Args:
        setting: Model, grid, solver and distance.
        config: The resolved configuration.
    """
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
