"""Gaussian paths: how a network was trained, and its own clock beside canonical time.

Everything above this file speaks canonical flow-matching time t in [0, 1]: x_t = (1 - t) x0 + t eps, v = eps - x0.
A `GaussianPath` translates a network's own clock tau, and its scaling of the state, into that time
(Optimal Stepsize, arXiv 2503.21774, App. C).
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from oss_exp.checks import require_range

LONGEST_CHAIN = 1_000_000  # betas
LAST_RATIO = 4096.0  # sigma / alpha from which a chain that ends at pure noise is at its end, as in diffusers' Euler

Number = TypeVar("Number", float, Tensor)


class GaussianPath(abc.ABC):
    """x_native = alpha(tau) x0 + sigma(tau) eps, seen as x_native = (alpha + sigma) x_t at t = sigma / (alpha + sigma).

    `canonical` and `native` are inverse to each other; both take and return float64 tensors of any shape.
    clock: what tau is called.
    """

    clock: ClassVar[str]

    @abc.abstractmethod
    def canonical(self, tau: Tensor) -> Tensor:
        """Native time -> t in [0, 1]."""

    @abc.abstractmethod
    def native(self, t: Tensor) -> Tensor:
        """t in [0, 1] -> native time, in the network's own units."""

    def scale(self, t: Tensor) -> Tensor:
        """alpha + sigma at canonical time t: multiply a canonical state by this to get the network's state."""
        # Variance-preserving unless a subclass says otherwise: alpha^2 + sigma^2 = 1 with sigma / alpha = t / (1 - t).
        return 1 / torch.sqrt((1 - t) ** 2 + t**2)


@dataclass(frozen=True)
class EDMPath(GaussianPath):
    """Variance exploding: alpha = 1, sigma = tau in [0, inf). Karras et al. 2022 (arXiv 2206.00364), table 1."""

    clock = "sigma"

    def canonical(self, tau: Tensor) -> Tensor:
        return tau / (1 + tau)

    def native(self, t: Tensor) -> Tensor:
        return t / (1 - t)

    def scale(self, t: Tensor) -> Tensor:
        return 1 / (1 - t)


@dataclass(frozen=True)
class FlowPath(GaussianPath):
    """Flow matching: alpha = 1 - t, sigma = t. The network's clock tau in [0, time_scale] may be shifted against t.

    `shift`: t = s u / (1 + (s - 1) u) with u = tau / time_scale (1: the clock is t itself, as in FLUX and SD3).
    """

    shift: float = 1.0
    time_scale: float = 1000.0
    clock = "flow time"

    def __post_init__(self) -> None:
        require_shift(self.shift)
        require_time_scale(self.time_scale)

    def canonical(self, tau: Tensor) -> Tensor:
        return shift_time(tau / self.time_scale, self.shift)

    def native(self, t: Tensor) -> Tensor:
        return shift_time(t, 1 / self.shift) * self.time_scale

    def scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class CosinePath(GaussianPath):
    """Continuous variance-preserving cosine: alpha = cos(pi tau / 2), sigma = sin(pi tau / 2), tau in [0, 1]."""

    clock = "tau"

    def canonical(self, tau: Tensor) -> Tensor:
        alpha, sigma = torch.cos(math.pi / 2 * tau), torch.sin(math.pi / 2 * tau)
        return sigma / (alpha + sigma)

    def native(self, t: Tensor) -> Tensor:
        return torch.atan2(t, 1 - t) * (2 / math.pi)


@dataclass(frozen=True)
class VPPath(GaussianPath):
    """Continuous variance-preserving with beta(tau) rising linearly, tau in [0, 1]: log alpha = -(int_0^tau beta) / 2.

    Times noisier than its end have tau = 1: the network has seen nothing beyond.
    Song et al. 2021 (arXiv 2011.13456, App. C): beta_min = 0.1, beta_max = 20.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    clock = "tau"

    def __post_init__(self) -> None:
        require_betas(self.beta_min, self.beta_max)

    def canonical(self, tau: Tensor) -> Tensor:
        ratio = torch.expm1(self._integral(tau)).sqrt()
        return ratio / (1 + ratio)

    def native(self, t: Tensor) -> Tensor:
        integral = torch.log1p((t / (1 - t)) ** 2).clamp(max=self._integral(1.0))
        # The positive root of `_integral`, written so that nothing cancels as t -> 0.
        return (
            2
            * integral
            / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * self._slope * integral))
        )

    @property
    def _slope(self) -> float:
        return self.beta_max - self.beta_min

    def _integral(self, tau: Number) -> Number:
        """of beta from 0 to tau: -2 log alpha, which is log(1 + (sigma / alpha)^2)."""
        return tau * self.beta_min + tau**2 * self._slope / 2


@dataclass(frozen=True, eq=False)  # a tensor field has no single truth value
class DDPMPath(GaussianPath):
    """Discrete variance-preserving chain with T betas; tau in [-1, T - 1] is the index, -1 is clean data.

    Between integers the log of sigma / alpha is interpolated linearly; between -1 and 0 sigma / alpha itself is.
    Times noisier than the end of the chain have its last index: the network has seen nothing beyond. A chain whose last
    beta is 1 ends at t = 1, and above a sigma / alpha of 4096 all its times have the last index.
    Ho et al. 2020 (arXiv 2006.11239). Build the betas with `linear_betas`, `scaled_linear_betas` or `cosine_betas`.
    """

    betas: Tensor = field(default_factory=lambda: linear_betas(), repr=False)
    _ratio: Tensor = field(
        init=False, repr=False
    )  # sigma / alpha at index 0 .. T-1, float64, finite
    clock = "DDPM index"

    def __post_init__(self) -> None:
        betas = torch.as_tensor(self.betas, dtype=torch.float64)
        inside = betas[:-1] if betas.ndim == 1 and len(betas) > 2 and betas[-1] == 1 else betas
        if betas.ndim != 1 or len(betas) < 2 or not bool(((inside > 0) & (inside < 1)).all()):
            raise ValueError(
                "betas must be a list of at least two numbers in (0, 1), of which the last may be 1, got shape "
                f"{tuple(betas.shape)}"
            )
        alphas_cumprod = torch.cumprod(1 - betas, 0)
        ratio = torch.sqrt((1 - alphas_cumprod) / alphas_cumprod)
        if betas[-1] == 1:
            ratio[-1] = max(LAST_RATIO, 2 * float(ratio[-2]))
        if not bool(ratio.isfinite().all() and (ratio.diff(prepend=ratio.new_zeros(1)) > 0).all()):
            raise ValueError(
                "betas are so small or so large that float64 cannot tell their noise levels apart"
            )
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "_ratio", ratio)

    def canonical(self, tau: Tensor) -> Tensor:
        ratios = self._ratio.to(tau.device)
        low = tau.floor().clamp(0, len(self.betas) - 2)
        index = low.long()
        log_ratio = torch.lerp(ratios[index].log(), ratios[index + 1].log(), tau - low)
        ratio = torch.where(tau < 0, (tau + 1) * ratios[0], log_ratio.exp())
        t = ratio / (1 + ratio)
        return torch.where(tau >= len(ratios) - 1, 1.0, t) if self.betas[-1] == 1 else t

    def native(self, t: Tensor) -> Tensor:
        ratios = self._ratio.to(t.device)
        ratio = (t / (1 - t)).clamp(max=float(self._ratio[-1]))
        index = torch.searchsorted(ratios, ratio.contiguous()).clamp(1, len(self.betas) - 1)
        low, high = ratios[index - 1].log(), ratios[index].log()
        tau = index - 1 + (ratio.clamp(min=1e-300).log() - low) / (high - low)
        return torch.where(ratio < ratios[0], ratio / ratios[0] - 1, tau)


def linear_betas(
    num_steps: int = 1000, start: float = 1e-4, end: float = 0.02, zero_snr: bool = False
) -> Tensor:
    """(num_steps,) betas, uniform between the ends; the defaults are DDPM's. zero_snr: as in `zero_snr_betas`."""
    require_chain(num_steps, start=start, end=end)
    betas = torch.linspace(start, end, num_steps, dtype=torch.float64)
    return zero_snr_betas(betas) if zero_snr else betas


def scaled_linear_betas(
    num_steps: int = 1000, start: float = 0.00085, end: float = 0.012, zero_snr: bool = False
) -> Tensor:
    """(num_steps,) betas whose square roots are uniform; the defaults are Stable Diffusion's. zero_snr: as above."""
    require_chain(num_steps, start=start, end=end)
    betas = torch.linspace(start**0.5, end**0.5, num_steps, dtype=torch.float64) ** 2
    return zero_snr_betas(betas) if zero_snr else betas


def zero_snr_betas(betas: Tensor) -> Tensor:
    """(T,) betas -> those of a chain that ends at pure noise, the last 1. Lin et al. 2023, arXiv 2305.08891, Alg. 1.

    diffusers calls it rescale_betas_zero_snr. The first index keeps its alpha.
    """
    alpha = torch.cumprod(1 - betas, 0).sqrt()
    kept = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    return 1 - torch.cat([kept[:1], kept[1:] / kept[:-1]])


def cosine_betas(num_steps: int = 1000, max_beta: float = 0.999) -> Tensor:
    """(num_steps,) betas of Nichol & Dhariwal 2021 (arXiv 2102.09672, eq. 17), offset 0.008, clipped at max_beta."""
    require_chain(num_steps, max_beta=max_beta)
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    alphas_cumprod = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=max_beta)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t -> s t / (1 + (s - 1) t), the resolution shift of SD3 / FLUX (arXiv 2403.03206, eq. 23); inverse: shift 1/s."""
    return shift * t / (shift * t + (1 - t))  # the same, and exactly 1 at t = 1


def require_shift(shift: float) -> None:
    """ValueError where all shifted times would be 0 or 1 in float64."""
    require_range(at_least=1e-6, at_most=1e6, shift=shift)


def require_time_scale(time_scale: float) -> None:
    """ValueError where a network's clock would leave float32, or be the same for all times."""
    require_range(at_least=1e-6, at_most=1e6, time_scale=time_scale)


def require_betas(beta_min: float, beta_max: float) -> None:
    """ValueError unless 0 < beta_min < beta_max, the last noise level below where its flow time is 1 in float64."""
    require_range(above=0, at_most=100, beta_min=beta_min, beta_max=beta_max)
    if not beta_min < beta_max:
        raise ValueError(f"beta_min must be below beta_max, got {beta_min} and {beta_max}")


def require_chain(num_steps: int, **betas: float) -> None:
    """ValueError unless there are from 2 to a million betas, in (0, 1) and not too small for float64."""
    require_range(at_least=2, at_most=LONGEST_CHAIN, num_steps=num_steps)
    require_range(at_least=1e-9, below=1, **betas)
