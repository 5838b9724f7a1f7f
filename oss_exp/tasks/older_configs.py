"""Configurations of earlier versions in the words of this one, so that runs made then go on and are found again.

A configuration here is plain data, as it was saved in a run's config.yaml: nothing in it is executed or resolved. Where
a key moves or a class is renamed, `canonical` learns it, and every older folder still means the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from oss_exp.names import named_object, with_public_names

FREE = (
    "trainer",
    "logger",
    "paths",
    "hydra",
    "keep_calls",
    "offload_states",
)  # what no result depends on
METRICS = ("fid", "kid", "precision_recall", "class_agreement", "lpips", "clip_score")
PLAIN = (type(None), bool, int, float, str)


def canonical(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the results of a run depend on, spelled in one way by all versions.

    Classes have their public names, keys stand where they stand today, and options that are not given have the defaults
    of their class. Today's configurations go through it as well, so that two can be compared.
    """
    values = {key: value for key, value in with_public_names(config).items() if key not in FREE}
    evaluation, task = dict(values.get("evaluation") or {}), dict(values.get("task") or {})

    # Version 0.1 listed metrics by name in evaluation.metrics, beside the options of all of them.
    if "metrics" in evaluation:
        chosen = evaluation.pop("metrics")
        options = {name: evaluation.pop(name, None) for name in METRICS}
        values["metric"] = {name: options[name] for name in chosen if name in options}
        values["evaluation"] = evaluation

    # Version 0.1 named the file of the shipped extractor, which is its default, and null for others, which have none.
    extractor = evaluation.get("extractor")
    if isinstance(extractor, Mapping) and extractor.get("file") in (
        None,
        "fashion_features.safetensors",
    ):
        extractor = {key: value for key, value in extractor.items() if key != "file"}
        values["evaluation"] = {**evaluation, "extractor": extractor}

    # Version 0.1 had the images of task=finetune at data@task.images.
    if "images" in task:
        values["images"] = task.pop("images")
        values["task"] = task

    # Version 0.1 named the file of prompts twice, in data.prompts and in model.prompts.
    if isinstance(values.get("model"), Mapping):
        values["model"] = {key: value for key, value in values["model"].items() if key != "prompts"}

    # Version 0.1 searched one iteration of MAR, by default the first.
    if isinstance(values.get("model"), Mapping) and "search_iteration" in values["model"]:
        values["model"] = dict(values["model"])
        values["model"]["search_iterations"] = [values["model"].pop("search_iteration")]

    # Version 0.1 had no model.weights_set, which is null today.
    values = _spelled_out(values)
    if isinstance(values.get("model"), Mapping) and values["model"].get("weights_set") is None:
        values["model"] = {
            key: value for key, value in values["model"].items() if key != "weights_set"
        }
    return values


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ between two canonical configurations.

    Only keys of the new one count: what it does not have is not read any more. A missing key is null.
    """
    return [key for key in new if old.get(key) != new[key]]


def _spelled_out(value: Any) -> Any:
    """Add the default of every option that is not given, and write whole numbers in one way (1, not 1.0)."""
    if isinstance(value, Mapping):
        return {
            key: _spelled_out(inner)
            for key, inner in {**_defaults(value.get("_target_")), **value}.items()
        }
    if isinstance(value, list | tuple):
        return [_spelled_out(inner) for inner in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _defaults(target: Any) -> dict[str, Any]:
    """Return {option: default} of a class or function of this package, as far as they are plain values."""
    if not isinstance(target, str) or not target.startswith("oss_exp."):
        return {}
    try:
        parameters = inspect.signature(named_object(target)).parameters
    except ValueError:  # no name of this version: then nothing of it is equal
        return {}
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty and isinstance(parameter.default, PLAIN)
    }
