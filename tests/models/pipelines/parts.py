"""Small random pipelines of diffusers, and how tests call them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from oss_exp.models.tiny import tiny

PROMPTS = ["a red bicycle", "two cats, sleeping"]


@dataclass(frozen=True)
class Family:
    """A pipeline whose scheduler steps by Euler's method (or DDIM's), and how it is called.

    Attributes:
        pipe: the pipeline.
        call: arguments of its call.
        prompts: the conditions, one a sample.
        num_steps: a number of steps whose times the scheduler does not round.
        latents: a function of a state as the scheduler sees it and of the samples' generators;
            it returns the `latents` that the call takes.
        atol: the largest difference of pixels between the pipeline's samples and ours.
    """

    pipe: DiffusionPipeline
    call: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[Any, ...] = tuple(PROMPTS)
    num_steps: int = 6
    latents: Callable[[Tensor, list[torch.Generator]], Tensor] = lambda state, draws: state
    atol: float = 1e-5


FAMILIES: dict[str, Callable[[], Family]] = {}


def family(build: Callable[[], Family]) -> Callable[[], Family]:
    """Register the function that builds a family under its name."""
    FAMILIES[build.__name__] = build
    return build


def shipped(kind: str, **call: Any) -> Family:
    """The family of the small pipeline that comes with the package."""
    return Family(*tiny(kind, call))
