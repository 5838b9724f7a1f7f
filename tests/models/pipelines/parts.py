"""Pipelines of diffusers with small random parts, and how each is called and compared with itself."""

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

    num_steps: a number that its own times divide without rounding.
    latents:   a state as the scheduler sees it, and what its samples draw from -> the `latents` that the call takes.
    atol:      of pixels, between its own samples and ours.
    """

    pipe: DiffusionPipeline
    call: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[Any, ...] = tuple(PROMPTS)
    num_steps: int = 6
    latents: Callable[[Tensor, list[torch.Generator]], Tensor] = lambda state, draws: state
    atol: float = 1e-5


FAMILIES: dict[str, Callable[[], Family]] = {}


def family(make: Callable[[], Family]) -> Callable[[], Family]:
    """Register what makes a family, under its function's name."""
    FAMILIES[make.__name__] = make
    return make


def shipped(kind: str, **call: Any) -> Family:
    """The family of the small pipeline that comes with the package."""
    return Family(*tiny(kind, call))
