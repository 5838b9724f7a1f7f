"""Noise schedules: where a many-step teacher puts its nodes, in canonical time.

A `NoiseSchedule` maps a number of steps N to N + 1 strictly decreasing canonical times and knows no network.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from oss_exp.noise.paths import DDPMPath, EDMPath, VPPath, require_betas, require_positive, shift_time


class NoiseSchedule(abc.ABC):
    """A rule that places N jumps: `nodes(N)` gives N + 1 strictly decreasing canonical times, the last one 0."""

    def nodes(self, num_steps: int) -> Tensor:
        """(num_steps + 1,) float64, strictly decreasing from at most 1 to exactly 0."""
        if num_steps < 1:
            raise ValueError(f"a noise schedule needs at least 1 step, got {num_steps}")
        nodes = torch.cat([self._times(num_steps), torch.zeros(1, dtype=torch.float64)])
        if not bool((nodes.diff() < 0).all()):
            raise ValueError(
                f"{self} has no {num_steps} distinct times; ask for fewer steps or a schedule with a finer clock"
            )
        return nodes

    @abc.abstractmethod
    def _times(self, num_steps: int) -> Tensor:
        """(num_steps,) the times at which the network is called, noise first."""


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Uniform flow time from 1, then shifted: the default of FLUX, SD3, Wan and Open-Sora."""

    shift: float

    def __post_init__(self) -> None:
        require_positive(shift=self.shift)

    def _times(self, num_steps: int) -> Tensor:
        return shift_time(1 - torch.arange(num_steps, dtype=torch.float64) / num_steps, self.shift)


def flux_shift(height: int, width: int) -> float:
    """Return `FlowSchedule`'s shift for FLUX pictures of so many pixels: exp(mu), mu linear in their tokens.

    From 0.5 at 256 tokens to 1.15 at 4096, as dev's scheduler; 1024 x 1024: 3.158. A token is 16 x 16 pixels.
    """
    for name, pixels in (("height", height), ("width", width)):
        if not isinstance(pixels, int) or pixels < 16 or pixels % 16:
            raise ValueError(f"{name} must be a multiple of 16 pixels, got {pixels!r}")
    tokens = height // 16 * (width // 16)
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


@dataclass(frozen=True)
class EDMSchedule(NoiseSchedule):
    """sigma_i = (max^(1/rho) + i/(n-1) (min^(1/rho) - max^(1/rho)))^rho, then 0. arXiv 2206.00364, eq. 5."""

    sigma_min: float
    sigma_max: float
    rho: float

    def __post_init__(self) -> None:
        require_sigmas(self.sigma_min, self.sigma_max)
        require_positive(rho=self.rho)

    def _times(self, num_steps: int) -> Tensor:
        ends = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return EDMPath().canonical(even(*ends, num_steps) ** self.rho)


@dataclass(frozen=True)
class LogSNRSchedule(NoiseSchedule):
    """Uniform in log sigma (so in log SNR) between sigma_max and sigma_min, then 0 (DPM-Solver, arXiv 2206.00927)."""

    sigma_min: float
    sigma_max: float

    def __post_init__(self) -> None:
        require_sigmas(self.sigma_min, self.sigma_max)

    def _times(self, num_steps: int) -> Tensor:
        log_sigma = even(math.log(self.sigma_max), math.log(self.sigma_min), num_steps)
        return EDMPath().canonical(log_sigma.exp())


@dataclass(frozen=True)
class VPSchedule(NoiseSchedule):
    """Evenly spaced times of `VPPath` from 1 to time_min, then 0: the score-SDE samplers' (arXiv 2011.13456)."""

    beta_min: float
    beta_max: float
    time_min: float

    def __post_init__(self) -> None:
        require_betas(self.beta_min, self.beta_max)
        if not isinstance(self.time_min, int | float) or not 0 < self.time_min < 1:
            raise ValueError(f"time_min must lie between 0 and 1, got {self.time_min!r}")

    def _times(self, num_steps: int) -> Tensor:
        return VPPath(self.beta_min, self.beta_max).canonical(even(1.0, self.time_min, num_steps))


@dataclass(frozen=True, eq=False)  # a tensor field has no single truth value
class DDIMSchedule(NoiseSchedule):
    """Evenly spaced DDPM indices T-1 .. 0, rounded as the ADM code base does (a running sum of the stride), then 0."""

    betas: Tensor = field(repr=False)

    def _times(self, num_steps: int) -> Tensor:
        path = DDPMPath(self.betas)
        stride = (len(path.betas) - 1) / max(num_steps - 1, 1)
        indices = [round(index) for index in accumulate([stride] * (num_steps - 1), initial=0.0)]
        return path.canonical(torch.tensor(indices[::-1], dtype=torch.float64))


@dataclass(frozen=True, eq=False)  # a tensor field has no single truth value
class QuadraticSchedule(NoiseSchedule):
    """DDPM indices spaced quadratically, denser towards the data. DDIM paper (arXiv 2010.02502), App. D.2."""

    betas: Tensor = field(repr=False)

    def _times(self, num_steps: int) -> Tensor:
        path = DDPMPath(self.betas)
        remaining = 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps
        return path.canonical(len(path.betas) * remaining**2 - 1)


def even(start: float, end: float, num: int) -> Tensor:
    """(num,) float64, evenly from start to end."""
    return torch.linspace(start, end, num, dtype=torch.float64)


def require_sigmas(sigma_min: float, sigma_max: float) -> None:
    require_positive(sigma_min=sigma_min, sigma_max=sigma_max)
    if not sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got sigma_min={sigma_min}, sigma_max={sigma_max}")
