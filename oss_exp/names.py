"""Public names: how files of this program name its classes, and the objects that they stand for.

Files hold names such as `oss_exp.OSSShared`, never module paths. Files of earlier
versions hold paths such as `oss_exp.stepsize.OSSShared`; they are read as the public
name of the same object.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import oss_exp

# Classes renamed since version 0.1.
RENAMED = {
    "models.parameterization.Data": "DataPrediction",
    "models.parameterization.EDM": "EDMPrediction",
    "models.parameterization.Noise": "NoisePrediction",
    "models.parameterization.Score": "ScorePrediction",
}
# Classes that became pipelines of diffusers, and what to write instead.
GONE = {
    "Flux": "model=flux_dev",
    "StableDiffusion": "model=sd15",
    "Wan": "model=wan2_1_1_3b",
}


def public_name(path: str) -> str:
    """Return the public name of a dotted path: "oss_exp.DEIS" for "oss_exp.solvers.deis.DEIS".

    Paths outside of this package, and paths without a public name, are returned
    unchanged.
    """
    package, *parts = path.split(".")
    if package != "oss_exp" or not parts:
        return path
    for old, new in RENAMED.items():
        if path == f"oss_exp.{old}":
            return f"oss_exp.{new}"
    public = {**oss_exp.PUBLIC, **oss_exp.CONFIGURED}
    if parts[0] in public:
        return path

    # Tasks were functions in modules: oss_exp.tasks.fit_mixture -> oss_exp.FitMixture.
    if parts[0] == "tasks" or parts[:1] == ["reproduce"]:
        task = "".join(word.capitalize() for word in parts[-1].split("_"))
        task = {"Geneval": "GenEval"}.get(task, task)
        if task in public:
            return f"oss_exp.{task}"

    # Classes, methods of classes, and functions.
    for i, part in enumerate(parts):
        if part in public and (part[0].isupper() or i == len(parts) - 1):
            return ".".join(["oss_exp", *parts[i:]])
    return path


def with_public_names(record: Any) -> Any:
    """Return a copy of a configuration in which every `_target_` is a public name."""
    if isinstance(record, Mapping):
        copy: dict[Any, Any] = {}
        for key, value in record.items():
            is_path = key == "_target_" and isinstance(value, str)
            copy[key] = public_name(value) if is_path else with_public_names(value)
        return copy
    if isinstance(record, list | tuple):
        return [with_public_names(value) for value in record]
    return record


def named_object(path: str) -> Any:
    """Return the object that a public name, or the module path of an earlier version, names.

    Only this package is ever imported.

    Raises:
        ValueError: If it is not a name of this package.
    """
    package, first, *attributes = (*public_name(path).split("."), "")[:3]
    if package == "oss_exp" and (name := path.rpartition(".")[2]) in GONE:
        raise ValueError(
            f"is {path}, which is a pipeline of diffusers now: {GONE[name]} (docs/pipelines.md)"
        )
    if package != "oss_exp" or first not in {**oss_exp.PUBLIC, **oss_exp.CONFIGURED}:
        raise ValueError(f"{path} is not a public name of oss_exp")
    value = getattr(oss_exp, first)
    for attribute in filter(None, attributes):
        value = getattr(value, attribute, None)
    if value is None:
        raise ValueError(f"{path} is not a public name of oss_exp")
    return value
