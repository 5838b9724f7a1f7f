"""Read the configurations of earlier versions in the spelling of this one.

So runs of earlier versions can resume and are found again. A configuration here is the plain data
of a run's config.yaml; nothing in it is executed or resolved. When a key moves or a class is
renamed, `canonical` is extended, and every older folder keeps its meaning.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from oss_exp.names import named_object, with_public_names

# Keys on which no result depends.
FREE = ("trainer", "logger", "paths", "hydra", "keep_calls", "offload_states")
METRICS = ("fid", "kid", "precision_recall", "class_agreement", "lpips", "clip_score")
SHIPPED_EXTRACTOR = "fashion_features.safetensors"
PLAIN = (type(None), bool, int, float, str)


def canonical(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the results of a run depend on, in one spelling for all versions.

    Classes have their public names, keys are where they are today, and options that are not set
    have the defaults of their class. Today's configurations go through it as well, so that two
    can be compared.
    """
    values = {key: value for key, value in with_public_names(config).items() if key not in FREE}
    evaluation = dict(values.get("evaluation") or {})
    task = dict(values.get("task") or {})

    # Version 0.1 listed metrics by name in evaluation.metrics, beside the options of all of them.
    if "metrics" in evaluation:
        names = evaluation.pop("metrics")
        options = {name: evaluation.pop(name, None) for name in METRICS}
        values["metric"] = {name: options[name] for name in names if name in options}
        values["evaluation"] = evaluation

    # Version 0.1 named the file of the shipped extractor, which is its default, and null for
    # others, which have none.
    extractor = evaluation.get("extractor")
    if isinstance(extractor, Mapping) and extractor.get("file") in (None, SHIPPED_EXTRACTOR):
        values["evaluation"] = {**evaluation, "extractor": _without(extractor, "file")}

    # Version 0.1 had the images of task=finetune at data@task.images.
    if "images" in task:
        values["images"] = task.pop("images")
        values["task"] = task

    # Version 0.1 named the file of prompts twice, in data.prompts and in model.prompts.
    if isinstance(values.get("model"), Mapping):
        values["model"] = _without(values["model"], "prompts")

    # Version 0.1 searched one iteration of MAR, by default the first.
    if isinstance(values.get("model"), Mapping) and "search_iteration" in values["model"]:
        values["model"] = dict(values["model"])
        values["model"]["search_iterations"] = [values["model"].pop("search_iteration")]

    # Version 0.1 had no model.weights_set, which is null today.
    values = _spelled_out(values)
    if isinstance(values.get("model"), Mapping) and values["model"].get("weights_set") is None:
        values["model"] = _without(values["model"], "weights_set")
    return values


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ between two canonical configurations.

    Only keys of the new one count, because others are not read any more. A missing key is null.
    """
    return [key for key in new if old.get(key) != new[key]]


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    values = dict(values)
    values.pop(name, None)
    return values


def _spelled_out(value: Any) -> Any:
    """Add the defaults of all options, and write whole numbers in one way (1, not 1.0)."""
    if isinstance(value, Mapping):
        entries = {**_defaults(value.get("_target_")), **value}
        return {key: _spelled_out(entry) for key, entry in entries.items()}
    if isinstance(value, list | tuple):
        return [_spelled_out(entry) for entry in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _defaults(target: Any) -> dict[str, Any]:
    """Return the defaults of a class or function of this package, those that are plain values."""
    if not isinstance(target, str) or not target.startswith("oss_exp."):
        return {}
    try:
        parameters = inspect.signature(named_object(target)).parameters
    except ValueError:  # not a name of this version, so nothing of it can be equal
        return {}
    defaults = {}
    for name, parameter in parameters.items():
        is_set = parameter.default is not inspect.Parameter.empty
        if is_set and isinstance(parameter.default, PLAIN):
            defaults[name] = parameter.default
    return defaults
