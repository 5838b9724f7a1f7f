"""The arguments of a pipeline's call: which one conditions number, and which a search refuses."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor

TEXTS = ("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")
NEGATIVES = ("negative_prompt", "negative_prompt_embeds")
PER_SAMPLE = (*TEXTS, "image", "mask_image", "control_image", "generator")
CHOSEN_BY_SEARCH = {"num_inference_steps", "timesteps", "sigmas", "latents"}

# Arguments whose effect depends on a step's number.
BY_STEP_NUMBER = (
    "control_guidance_start",
    "control_guidance_end",
    "cfg_trunc_ratio",
    "cfg_truncation",
    "skip_guidance_layers",
    "denoising_start",
    "denoising_end",
    "adapter_conditioning_factor",
)


def is_pipeline(value: Any) -> bool:
    """Tell whether a value is a pipeline of diffusers, without importing diffusers."""
    return any(kind.__name__ == "DiffusionPipeline" for kind in type(value).__mro__)


def call_parameters(kind: type) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline class's call."""
    return inspect.signature(kind.__call__).parameters


def condition_argument(parameters: Collection[str]) -> str:
    """Return the argument of a call that conditions number; empty if there is none."""
    for name in ("prompt", "class_labels", "image"):
        if name in parameters:
            return name
    return ""


def takes_images(argument: str) -> bool:
    """Tell whether an argument of a call takes images."""
    return argument == "image" or argument.endswith("_image")


def for_samples(value: Any, samples: Sequence[int], count: int) -> Any:
    """Return the entries of these samples, from a list or batch with an entry for each of count.

    Any other value belongs to all samples, and is returned as it is.
    """
    if isinstance(value, list) and len(value) == count:
        return [value[i] for i in samples]
    if isinstance(value, Tensor) and value.ndim > 3 and len(value) == count:
        return value[list(samples)]
    return value


def check_pipeline(pipe: Any) -> None:
    """Raise ValueError unless `pipe` is a pipeline of diffusers with exactly one scheduler."""
    kind = type(pipe).__name__
    if not is_pipeline(pipe) or not hasattr(pipe, "scheduler"):
        raise ValueError(f"pipe must be a pipeline of diffusers with a scheduler, got {kind}")

    schedulers = []
    for name, part in pipe.components.items():
        if hasattr(part, "set_timesteps"):
            schedulers.append(name)
    if len(schedulers) > 1:
        raise ValueError(
            f"{kind} is a cascade, of {', '.join(schedulers)}; search its pipelines one by one"
        )


def check_call(kind: type, prompts: Sequence[Any], call: Mapping[str, Any]) -> None:
    """Raise ValueError for a call that a search cannot make.

    Args:
        kind: The pipeline's class.
        prompts: What conditions number.
        call: All other arguments of the call.
    """
    parameters = call_parameters(kind)

    # Names.
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(f"prompts must be a list of one or more, got {prompts!r}")
    if chosen := CHOSEN_BY_SEARCH & call.keys():
        raise ValueError(
            f"{', '.join(sorted(chosen))} of the call is for the search to choose; leave it out"
        )
    if unknown := sorted(call.keys() - parameters.keys()):
        near = ", ".join(get_close_matches(unknown[0], parameters, n=3) or parameters)
        raise ValueError(f"{kind.__name__} takes no {unknown[0]}; it takes, among others, {near}")

    # Values.
    _check_strength(strength_of(kind, call))
    if "prompt" in call or "class_labels" in call:
        raise ValueError(
            "prompt and class_labels of the call are the model's prompts; give them there"
        )
    for name in {*TEXTS, "generator"} & call.keys():
        if isinstance(call[name], list | tuple) and len(call[name]) != len(prompts):
            raise ValueError(
                f"{name} has {len(call[name])} entries for {len(prompts)} prompts; "
                "give one for each, or no list"
            )
    for name, value in call.items():
        if name.endswith("_per_prompt") and value != 1:
            raise ValueError(f"{name} must be 1; give a prompt as often as it is wanted")
    for name in BY_STEP_NUMBER:
        if name in call and name in parameters and call[name] != parameters[name].default:
            raise ValueError(f"{name} counts steps, and a search goes by times; leave it out")

    # Guidance that diffusers leaves out without a word.
    scale = call.get("true_cfg_scale")
    is_negated = any(call.get(name) is not None for name in NEGATIVES)
    if isinstance(scale, int | float) and scale > 1 and not is_negated:
        raise ValueError(
            f"true_cfg_scale={scale} does nothing without a negative prompt; add "
            "negative_prompt='', or leave true_cfg_scale out"
        )

    # Missing arguments.
    if not condition_argument(parameters):
        raise ValueError(f"{kind.__name__} takes no prompt, class_labels or image")
    require_arguments(kind, call)


def strength_of(kind: type, call: Mapping[str, Any]) -> Any:
    """Return the call's `strength`, or the class's default, or 1 if it takes none."""
    if "strength" in call:
        return call["strength"]
    parameter = call_parameters(kind).get("strength")
    return 1.0 if parameter is None else parameter.default


def _check_strength(strength: Any) -> None:
    is_number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not is_number or not 0 < strength <= 1:
        raise ValueError(f"strength must be a number above 0 and at most 1, got {strength!r}")


def require_arguments(kind: type, names: Collection[str]) -> None:
    """Raise ValueError if a call with arguments of these names lacks one that has no default."""
    parameters = call_parameters(kind)
    present = ("self", condition_argument(parameters), *names)
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind not in several
        if required and name not in present:
            file = "=FILE" if takes_images(name) else ""
            raise ValueError(f"{kind.__name__} needs {name}; add call.{name}{file}")
