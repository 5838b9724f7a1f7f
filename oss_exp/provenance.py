"""The provenance of a step schedule: the record in its file of how it was made."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import oss_exp
from oss_exp.names import public_name
from oss_exp.noise import GaussianPath

if TYPE_CHECKING:
    from oss_exp.models.base import Model


def provenance(
    model: Mapping[str, Any],
    teacher: Mapping[str, Any],
    solver: Mapping[str, Any],
    distance: Mapping[str, Any],
    seed: int | None,
) -> dict[str, Any]:
    """Return the provenance that all schedules of one search or comparison share.

    Args:
        model: Section of the model, see `model_record`.
        teacher: Noise schedule and number of steps of the teacher.
        solver: Configuration of the solver.
        distance: Configuration of the distance.
        seed: Seed of the noises; None if the caller passed noises.
    """
    return {
        "program": f"oss_exp {oss_exp.__version__}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "model": dict(model),
        "teacher": dict(teacher),
        "solver": solver,
        "distance": distance,
        "seed": seed,
        "state_dtype": "float32",
    }


def model_record(model: Model) -> dict[str, Any]:
    """Return the name, hash of the weights, guidance and event shape of a model."""
    return {
        "name": model.name,
        "sha256": model.fingerprint,
        "guidance": asdict(model.guidance),
        "event_shape": list(model.event_shape),
    }


def native_times(path: GaussianPath, times: Tensor) -> dict[str, Any]:
    """Return times (K+1,) or (B, K+1) in the model's native clock; infinite ones as None."""
    rows: list[list[float | None]] = []
    for row in path.native(times.reshape(-1, times.shape[-1])).tolist():
        rows.append([tau if math.isfinite(tau) else None for tau in row])
    return {"clock": path.clock, "times": rows if times.ndim == 2 else rows[0]}


def configuration(value: Any) -> Any:
    """Return an object as a configuration in JSON: `_target_`, its public name, and its fields.

    A tensor becomes its shape and hash, an object without fields its class.
    """
    # Values.
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor):
        digest = hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        return {"shape": list(value.shape), "sha256": digest}

    # Containers.
    if isinstance(value, Mapping):
        return {str(key): configuration(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [configuration(entry) for entry in value]

    # Objects.
    kind = value if hasattr(value, "__qualname__") else type(value)
    record = {"_target_": public_name(f"{kind.__module__}.{kind.__qualname__}")}
    if is_dataclass(value):
        for field in fields(value):
            if field.init:
                record[field.name] = configuration(getattr(value, field.name))
    return record
