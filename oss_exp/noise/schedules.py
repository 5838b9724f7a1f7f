"""Noise schedules: where a many-step teacher puts its nodes, in canonical time.

A `NoiseSchedule` maps a number of steps N to N + 1 strictly decreasing canonical times.
It does not depend on a network.
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
# Far above this sigma, the flow times sigma / (1 + sigma) of two nodes are equal in float64.
LARGEST_SIGMA = 1e12


class NoiseSchedule(abc.ABC):
    """A rule that places the nodes of a sampler for any number of steps."""

    def nodes(self, num_steps: int) -> Tensor:
        """Return num_steps + 1 times, float64, strictly decreasing from at most 1 to exactly 0.

        Raises:
            ValueError: If the schedule has fewer than num_steps distinct times.
        """
        require_range(at_least=1, at_most=MOST_STEPS, num_steps=num_steps)
        nodes = torch.cat([self._times(num_steps), torch.zeros(1, dtype=torch.float64)])
        if not bool((nodes.diff() < 0).all()):
            raise ValueError(
                f"{self} has no {num_steps} distinct times; "
                "ask for fewer steps or a schedule with a finer clock"
            )
        return nodes

    def bind(self, model: Any) -> NoiseSchedule:
        """Return the schedule for a model; only one that reads the model's clock differs."""
        return self

    @abc.abstractmethod
    def _times(self, num_steps: int) -> Tensor:
        """Return the times (num_steps,) at which the network is called, noise first."""


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Even flow times from 1 to 0, then shifted: the default of FLUX, SD3, Wan and Open-Sora.

    Attributes:
        shift: Resolution shift, see `shift_time`; 1 leaves the times even.
    """

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
    """Return the shift of `FlowSchedule` for FLUX images of a size.

    It is exp(mu), with mu linear in the number of tokens. The defaults are those of
    FLUX.1-dev's scheduler, which give 3.158 for 1024 x 1024 pixels.

    Args:
        height: Height in pixels, a multiple of 16. A token is 16 x 16 pixels.
        width: Width in pixels, a multiple of 16.
        base_shift: mu at base_tokens.
        max_shift: mu at max_tokens.
        base_tokens: Number of tokens of the smallest images.
        max_tokens: Number of tokens of the largest images.

    Raises:
        ValueError: If a size is no multiple of 16, or the image is larger than 4096 x
            4096.
    """
    # Tokens.
    for name, pixels in (("height", height), ("width", width)):
        if pixels < 16 or pixels % 16:
            raise ValueError(f"{name} must be a multiple of 16 pixels, got {pixels}")
    tokens = height // 16 * (width // 16)
    if tokens > 256**2:  # far above, shifted times are all noise
        raise ValueError(
            f"height and width must be at most those of 4096 x 4096 pixels, got {height} x {width}"
        )

    # Shift.
    if base_tokens == max_tokens:
        raise ValueError(f"base_tokens and max_tokens must differ, got {base_tokens} twice")

    mu = base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)
    require_range(at_least=-10, at_most=10, mu=mu)
    return math.exp(mu)


@dataclass(frozen=True)
class EDMSchedule(NoiseSchedule):
    """Sigmas evenly spaced in sigma^(1/rho), then 0. Karras et al. (arXiv 2206.00364), eq. 5.

    Attributes:
        sigma_min: Last sigma before 0.
        sigma_max: First sigma.
        rho: Exponent; a larger one puts more steps at low sigmas.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        require_sigmas(self.sigma_min, self.sigma_max)
        require_range(at_least=0.1, at_most=100, rho=self.rho)

    def _times(self, num_steps: int) -> Tensor:
        first = self.sigma_max ** (1 / self.rho)
        last = self.sigma_min ** (1 / self.rho)
        return EDMPath().canonical(even(first, last, num_steps) ** self.rho)


@dataclass(frozen=True)
class LogSNRSchedule(NoiseSchedule):
    """Sigmas evenly spaced in log sigma, so in log SNR, then 0. DPM-Solver (arXiv 2206.00927).

    Attributes:
        sigma_min: Last sigma before 0.
        sigma_max: First sigma.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        require_sigmas(self.sigma_min, self.sigma_max)

    def _times(self, num_steps: int) -> Tensor:
        log_sigma = even(math.log(self.sigma_max), math.log(self.sigma_min), num_steps)
        return EDMPath().canonical(log_sigma.exp())


@dataclass(frozen=True)
class VPSchedule(NoiseSchedule):
    """Even times of `VPPath` from 1 to time_min, then 0, as in score SDEs (arXiv 2011.13456).

    Attributes:
        beta_min: As in `VPPath`.
        beta_max: As in `VPPath`.
        time_min: Last native time before 0.
    """

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
    """Evenly spaced DDPM indices from T - 1 to 0, then clean data.

    Indices are rounded as in the ADM code base, which sums the stride.

    Attributes:
        betas: (T,), as in `DDPMPath`.
    """

    betas: Tensor = field(default_factory=linear_betas, repr=False)

    def __post_init__(self) -> None:
        DDPMPath(self.betas)  # checks the betas

    def _times(self, num_steps: int) -> Tensor:
        path = DDPMPath(self.betas)
        stride = (len(path.betas) - 1) / max(num_steps - 1, 1)
        sums = accumulate([stride] * (num_steps - 1), initial=0.0)
        indices = [round(index) for index in sums]
        return path.canonical(torch.tensor(indices[::-1], dtype=torch.float64))


@dataclass(frozen=True, eq=False)  # a tensor field has no single truth value
class QuadraticSchedule(NoiseSchedule):
    """Quadratically spaced DDPM indices, denser towards the data.

    DDIM (arXiv 2010.02502), App. D.2.

    Attributes:
        betas: (T,), as in `DDPMPath`.
    """

    betas: Tensor = field(default_factory=linear_betas, repr=False)

    def __post_init__(self) -> None:
        DDPMPath(self.betas)  # checks the betas

    def _times(self, num_steps: int) -> Tensor:
        path = DDPMPath(self.betas)
        remaining = 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps
        return path.canonical(len(path.betas) * remaining**2 - 1)


def even(start: float, end: float, num: int) -> Tensor:
    """Return evenly spaced values (num,), float64, from start to end."""
    return torch.linspace(start, end, num, dtype=torch.float64)


def require_sigmas(sigma_min: float, sigma_max: float) -> None:
    """Raise ValueError unless 0 < sigma_min < sigma_max <= 1e12."""
    require_range(above=0, at_most=LARGEST_SIGMA, sigma_min=sigma_min, sigma_max=sigma_max)
    if not sigma_min < sigma_max:
        raise ValueError(f"sigma_min must be below sigma_max, got {sigma_min} and {sigma_max}")
