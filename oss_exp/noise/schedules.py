"""Noise schedules: where a many-step teacher puts its nodes, in canonical time.

A `NoiseSchedule` maps a number of steps N to N + 1 strictly decreasing canonical times and knows no network.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.noise.paths import (
    DDPMPath,
    EDMPath,
    VPPath,
    linear_betas,
    require_betas,
    require_shift,
    shift_time,
)

MOST_STEPS = 1_000_000
LARGEST_SIGMA = (
    1e12  # far above, the flow times sigma / (1 + sigma) of neighbouring nodes are equal in float64
)


class NoiseSchedule(abc.ABC):
    """A rule that places N jumps: `nodes(N)` gives N + 1 strictly decreasing canonical times, the last one 0."""

    def nodes(self, num_steps: int) -> Tensor:
        """(num_steps + 1,) float64, strictly decreasing from at most 1 to exactly 0."""
        require_range(at_least=1, at_most=MOST_STEPS, num_steps=num_steps)
        nodes = torch.cat([self._times(num_steps), torch.zeros(1, dtype=torch.float64)])
        if not bool((nodes.diff() < 0).all()):
            raise ValueError(
                f"{self} has no {num_steps} distinct times; ask for fewer steps or a schedule with a finer clock"
            )
        return nodes

    def bind(self, model: Any) -> NoiseSchedule:
        """Return the schedule for this model: the same, but where it is a model's own."""
        return self

    @abc.abstractmethod
    def _times(self, num_steps: int) -> Tensor:
        """(num_steps,) the times at which the network is called, noise first."""


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Uniform flow time from 1, then shifted: the default of FLUX, SD3, Wan and Open-Sora."""

    shift: float = 1.0

    def __post_init__(self) -> None:
        require_shift(self.shift)

    def _times(self, num_steps: int) -> Tensor:
        return shift_time(1 - torch.arange(num_steps, dtype=torch.float64) / num_steps, self.shift)


def flux_shift(
    height: int = 1024,
    width: int = 1024,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
) -> float:
    """Return `FlowSchedule`'s shift for FLUX pictures of so many pixels: exp(mu), mu linear in their tokens.

    From base_shift at base_tokens to max_shift at max_tokens, by default as dev's scheduler; 1024 x 1024: 3.158. A
    token is 16 x 16 pixels.
    """
    for name, pixels in (("height", height), ("width", width)):
        if pixels < 16 or pixels % 16:
            raise ValueError(f"{name} must be a multiple of 16 pixels, got {pixels}")
    tokens = height // 16 * (width // 16)
    if tokens > 256**2:  # far above, the shift leaves nothing but noise
        raise ValueError(
            f"height and width must be at most those of 4096 x 4096 pixels, got {height} x {width}"
        )
    if base_tokens == max_tokens:
        raise ValueError(f"base_tokens and max_tokens must differ, got {base_tokens} twice")
    mu = base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)
    require_range(at_least=-10, at_most=10, mu=mu)
    return math.exp(mu)


@dataclass(frozen=True)
class EDMSchedule(NoiseSchedule):
    """sigma_i = (max^(1/rho) + i/(n-1) (min^(1/rho) - max^(1/rho)))^rho, then 0. arXiv 2206.00364, eq. 5."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        require_sigmas(self.sigma_min, self.sigma_max)
        require_range(at_least=0.1, at_most=100, rho=self.rho)

    def _times(self, num_steps: int) -> Tensor:
        ends = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return EDMPath().canonical(even(*ends, num_steps) ** self.rho)


@dataclass(frozen=True)
class LogSNRSchedule(NoiseSchedule):
    """Uniform in log sigma (so in log SNR) between sigma_max and sigma_min, then 0 (DPM-Solver, arXiv 2206.00927)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        require_sigmas(self.sigma_min, self.sigma_max)

    def _times(self, num_steps: int) -> Tensor:
        log_sigma = even(math.log(self.sigma_max), math.log(self.sigma_min), num_steps)
        return EDMPath().canonical(log_sigma.exp())


@dataclass(frozen=True)
class VPSchedule(NoiseSchedule):
    """Evenly spaced times of `VPPath` from 1 to time_min, then 0: the score-SDE samplers' (arXiv 2011.13456)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    time_min: float = 0.001

    def __post_init__(self) -> None:
        require_betas(self.beta_min, self.beta_max)
        require_range(above=0, below=1, time_min=self.time_min)

    def _times(self, num_steps: int) -> Tensor:
        return VPPath(self.beta_min, self.beta_max).canonical(even(1.0, self.time_min, num_steps))


@dataclass(frozen=True, eq=False)  # a tensor field has no single truth value
class DDIMSchedule(NoiseSchedule):
    """Evenly spaced DDPM indices T-1 .. 0, rounded as the ADM code base does (a running sum of the stride), then 0."""

    betas: Tensor = field(default_factory=linear_betas, repr=False)

    def __post_init__(self) -> None:
        DDPMPath(self.betas)  # its checks

    def _times(self, num_steps: int) -> Tensor:
        path = DDPMPath(self.betas)
        stride = (len(path.betas) - 1) / max(num_steps - 1, 1)
        indices = [round(index) for index in accumulate([stride] * (num_steps - 1), initial=0.0)]
        return path.canonical(torch.tensor(indices[::-1], dtype=torch.float64))


@dataclass(frozen=True, eq=False)  # a tensor field has no single truth value
class QuadraticSchedule(NoiseSchedule):
    """DDPM indices spaced quadratically, denser towards the data. DDIM paper (arXiv 2010.02502), App. D.2."""

    betas: Tensor = field(default_factory=linear_betas, repr=False)

    def __post_init__(self) -> None:
        DDPMPath(self.betas)  # its checks

    def _times(self, num_steps: int) -> Tensor:
        path = DDPMPath(self.betas)
        remaining = 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps
        return path.canonical(len(path.betas) * remaining**2 - 1)


def even(start: float, end: float, num: int) -> Tensor:
    """(num,) float64, evenly from start to end."""
    return torch.linspace(start, end, num, dtype=torch.float64)


def require_sigmas(sigma_min: float, sigma_max: float) -> None:
    """ValueError unless 0 < sigma_min < sigma_max, whose flow times float64 can tell apart."""
    require_range(above=0, at_most=LARGEST_SIGMA, sigma_min=sigma_min, sigma_max=sigma_max)
    if not sigma_min < sigma_max:
        raise ValueError(f"sigma_min must be below sigma_max, got {sigma_min} and {sigma_max}")
