"""Public names: what the files of this program call its classes, and the objects that they stand for.

Files hold names such as `oss_exp.OSSShared`, never module paths. Files of earlier versions held paths such as
`oss_exp.stepsize.OSSShared`; they are read as the public name of the same object.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import oss_exp

RENAMED = {  # since version 0.1
    "models.parameterization.Data": "DataPrediction",
    "models.parameterization.EDM": "EDMPrediction",
    "models.parameterization.Noise": "NoisePrediction",
    "models.parameterization.Score": "ScorePrediction",
}
GONE = {  # into pipelines of diffusers
    "Flux": "model=flux_dev",
    "StableDiffusion": "model=sd15",
    "Wan": "model=wan2_1_1_3b",
}


def public_name(path: str) -> str:
    """Return the public name of a dotted path, "oss_exp.solvers.deis.DEIS" -> "oss_exp.DEIS".

    Paths outside of this package, and paths that hold no public name, are returned as they are.
    """
    package, *parts = path.split(".")
    if package != "oss_exp" or not parts:
        return path
    for old, new in RENAMED.items():
        if path == f"oss_exp.{old}":
            return f"oss_exp.{new}"
    known = {**oss_exp.PUBLIC, **oss_exp.CONFIGURED}
    if parts[0] in known:
        return path
    if parts[0] == "tasks" or parts[:1] == ["reproduce"]:
        task = "".join(word.capitalize() for word in parts[-1].split("_"))
        task = {"Geneval": "GenEval"}.get(task, task)
        if task in known:
            return f"oss_exp.{task}"
    for i, part in enumerate(parts):
        if part in known and (part[0].isupper() or i == len(parts) - 1):
            return ".".join(["oss_exp", *parts[i:]])
    return path


def with_public_names(record: Any) -> Any:
    """Return a copy of a configuration in which every `_target_` is a public name."""
    if isinstance(record, Mapping):
        return {
            key: public_name(value)
            if key == "_target_" and isinstance(value, str)
            else with_public_names(value)
            for key, value in record.items()
        }
    if isinstance(record, list | tuple):
        return [with_public_names(value) for value in record]
    return record


def named_object(path: str) -> Any:
    """Return the object that a public name, or the module path of an earlier version, stands for.

    Raises ValueError where it is no name of this package. Nothing outside of the package is ever imported.
    """
    package, first, *rest = (*public_name(path).split("."), "")[:3]
    if package == "oss_exp" and (gone := path.rpartition(".")[2]) in GONE:
        raise ValueError(
            f"is {path}, which is a pipeline of diffusers now: {GONE[gone]} (docs/pipelines.md)"
        )
    if package != "oss_exp" or first not in {**oss_exp.PUBLIC, **oss_exp.CONFIGURED}:
        raise ValueError(f"{path} is no public name of oss_exp")
    found = getattr(oss_exp, first)
    for name in filter(None, rest):
        found = getattr(found, name, None)
    if found is None:
        raise ValueError(f"{path} is no public name of oss_exp")
    return found
