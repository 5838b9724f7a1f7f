"""What every strategy of a run has in common, and how a schedule's provenance describes it."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import oss_exp
from oss_exp.distances import Distance
from oss_exp.models.base import Model
from oss_exp.noise import GaussianPath
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
    return {
        "program": f"oss_exp {oss_exp.__version__}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "model": {
            "name": setting.model.name,
            "sha256": setting.model.fingerprint,
            "guidance": asdict(setting.model.guidance),
            "event_shape": list(setting.model.event_shape),
            "classes": config["data"].get("classes"),
            "prompts": config["data"].get("prompts"),
        },
        "teacher": {"noise_schedule": config["noise_schedule"], "num_steps": len(setting.grid) - 1},
        "solver": config["solver"],
        "distance": config["distance"],
        "seed": config["data"]["seed"],
        "state_dtype": "float32",
    }


def native_times(path: GaussianPath, times: Tensor) -> dict[str, Any]:
    """Canonical times in the clock of the model's own samplers; infinite ones are null."""
    rows = path.native(times.reshape(-1, times.shape[-1])).tolist()
    listed = [[tau if math.isfinite(tau) else None for tau in row] for row in rows]
    return {"clock": path.clock, "times": listed if times.ndim == 2 else listed[0]}
