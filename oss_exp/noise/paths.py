"""Gaussian paths: how a network was trained, and its own clock beside canonical time.

All code above this file uses canonical flow-matching time t in [0, 1]: x_t = (1 - t)
x0 + t eps and v = eps - x0. A `GaussianPath` translates a network's native time tau,
and its scaling of the state, into that time (Optimal Stepsize, arXiv 2503.21774,
App. C).
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
# A chain that ends at pure noise is at its end from this sigma / alpha on, as in diffusers' Euler.
LAST_RATIO = 4096.0

Number = TypeVar("Number", float, Tensor)


class GaussianPath(abc.ABC):
    """A Gaussian path x_native = alpha(tau) x0 + sigma(tau) eps, seen in canonical time.

    x_native = (alpha + sigma) x_t at t = sigma / (alpha + sigma). `canonical` and
    `native` are inverse to each other; both take and return float64 tensors of any
    shape.

    Attributes:
        clock: Name of the native time, such as "sigma".
    """

    clock: ClassVar[str]

    @abc.abstractmethod
    def canonical(self, tau: Tensor) -> Tensor:
        """Return the canonical times in [0, 1] of native times."""

    @abc.abstractmethod
    def native(self, t: Tensor) -> Tensor:
        """Return the native times, in the network's own units, of canonical times in [0, 1]."""

    def scale(self, t: Tensor) -> Tensor:
        """Return alpha + sigma at canonical times: the network's state divided by x_t."""
        # Variance preserving unless a subclass says otherwise:
        # alpha^2 + sigma^2 = 1 with sigma / alpha = t / (1 - t).
        return 1 / torch.sqrt((1 - t) ** 2 + t**2)


@dataclass(frozen=True)
class EDMPath(GaussianPath):
    """Variance exploding path: alpha = 1, sigma = tau in [0, inf).

    Karras et al. 2022 (arXiv 2206.00364), table 1.
    """

    clock = "sigma"

    def canonical(self, tau: Tensor) -> Tensor:
        return tau / (1 + tau)

    def native(self, t: Tensor) -> Tensor:
        return t / (1 - t)

    def scale(self, t: Tensor) -> Tensor:
        return 1 / (1 - t)


@dataclass(frozen=True)
class FlowPath(GaussianPath):
    """Flow-matching path: alpha = 1 - t, sigma = t.

    The network's clock tau in [0, time_scale] may be shifted against t: t = s
    u / (1 + (s - 1) u) with u = tau / time_scale.

    Attributes:
        shift: s. At 1 the clock is t itself, as in FLUX and SD3.
        time_scale: The native time of pure noise.
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
    """Continuous cosine path: alpha = cos(pi tau / 2), sigma = sin(pi tau / 2), tau in [0, 1]."""

    clock = "tau"

    def canonical(self, tau: Tensor) -> Tensor:
        alpha = torch.cos(math.pi / 2 * tau)
        sigma = torch.sin(math.pi / 2 * tau)
        return sigma / (alpha + sigma)

    def native(self, t: Tensor) -> Tensor:
        return torch.atan2(t, 1 - t) * (2 / math.pi)


@dataclass(frozen=True)
class VPPath(GaussianPath):
    """Continuous variance-preserving path with beta(tau) rising linearly over tau in [0, 1].

    log alpha = -(int_0^tau beta) / 2. Times noisier than the end of the path have
    tau = 1, since the network was trained on nothing beyond. Song et al. 2021
    (arXiv 2011.13456), App. C.

    Attributes:
        beta_min: beta at tau = 0.
        beta_max: beta at tau = 1.
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
        root = torch.sqrt(self.beta_min**2 + 2 * self._slope * integral)
        return 2 * integral / (self.beta_min + root)

    @property
    def _slope(self) -> float:
        return self.beta_max - self.beta_min

    def _integral(self, tau: Number) -> Number:
        """Return the integral of beta from 0 to tau, which is log(1 + (sigma / alpha)^2)."""
        return tau * self.beta_min + tau**2 * self._slope / 2


@dataclass(frozen=True, eq=False)  # a tensor field has no single truth value
class DDPMPath(GaussianPath):
    """Discrete variance-preserving chain of T betas; tau in [-1, T - 1] is the index.

    Index -1 is clean data. Between two indices log(sigma / alpha) is linear in tau;
    between -1 and 0 sigma / alpha is. Times noisier than the end of the chain have its
    last index, since the network was trained on nothing beyond. A chain whose last beta
    is 1 ends at t = 1, and all times with sigma / alpha above 4096 have its last index.
    Ho et al. 2020 (arXiv 2006.11239).

    Attributes:
        betas: (T,), from `linear_betas`, `scaled_linear_betas` or `cosine_betas`.

    Raises:
        ValueError: If betas are not in (0, 1), or float64 cannot tell their noise
            levels apart.
    """

    betas: Tensor = field(default_factory=lambda: linear_betas(), repr=False)
    # (T,) sigma / alpha at every index, finite.
    _ratio: Tensor = field(init=False, repr=False)
    # Its copies on other devices: copying it at every network call would wait for the device.
    _ratios: dict[torch.device, Tensor] = field(init=False, repr=False, default_factory=dict)
    clock = "DDPM index"

    def __post_init__(self) -> None:
        betas = torch.as_tensor(self.betas, dtype=torch.float64)

        # Range. The last beta may be 1.
        inside = betas
        if betas.ndim == 1 and len(betas) > 2 and betas[-1] == 1:
            inside = betas[:-1]
        if betas.ndim != 1 or len(betas) < 2 or not bool(((inside > 0) & (inside < 1)).all()):
            raise ValueError(
                "betas must be a list of at least two numbers in (0, 1), of which the last may be "
                f"1, got shape {tuple(betas.shape)}"
            )

        # Noise levels.
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
        ratios = self._ratios_on(tau.device)
        low = tau.floor().clamp(0, len(self.betas) - 2)
        index = low.long()
        log_ratio = torch.lerp(ratios[index].log(), ratios[index + 1].log(), tau - low)
        ratio = torch.where(tau < 0, (tau + 1) * ratios[0], log_ratio.exp())
        t = ratio / (1 + ratio)
        return torch.where(tau >= len(ratios) - 1, 1.0, t) if self.betas[-1] == 1 else t

    def native(self, t: Tensor) -> Tensor:
        ratios = self._ratios_on(t.device)
        ratio = (t / (1 - t)).clamp(max=float(self._ratio[-1]))
        index = torch.searchsorted(ratios, ratio.contiguous()).clamp(1, len(self.betas) - 1)
        low = ratios[index - 1].log()
        high = ratios[index].log()
        tau = index - 1 + (ratio.clamp(min=1e-300).log() - low) / (high - low)
        return torch.where(ratio < ratios[0], ratio / ratios[0] - 1, tau)

    def _ratios_on(self, device: torch.device) -> Tensor:
        if device not in self._ratios:
            self._ratios[device] = self._ratio.to(device)
        return self._ratios[device]


def linear_betas(
    num_steps: int = 1000, start: float = 1e-4, end: float = 0.02, zero_snr: bool = False
) -> Tensor:
    """Return evenly spaced betas (num_steps,); the defaults are DDPM's.

    Args:
        num_steps: Length of the chain.
        start: First beta.
        end: Last beta.
        zero_snr: Whether the chain is changed to end at pure noise, see
            `zero_snr_betas`.
    """
    require_chain(num_steps, start=start, end=end)
    betas = torch.linspace(start, end, num_steps, dtype=torch.float64)
    return zero_snr_betas(betas) if zero_snr else betas


def scaled_linear_betas(
    num_steps: int = 1000, start: float = 0.00085, end: float = 0.012, zero_snr: bool = False
) -> Tensor:
    """Return betas (num_steps,) with evenly spaced roots; the defaults are Stable Diffusion's.

    Args:
        num_steps: Length of the chain.
        start: First beta.
        end: Last beta.
        zero_snr: Whether the chain is changed to end at pure noise, see
            `zero_snr_betas`.
    """
    require_chain(num_steps, start=start, end=end)
    betas = torch.linspace(start**0.5, end**0.5, num_steps, dtype=torch.float64) ** 2
    return zero_snr_betas(betas) if zero_snr else betas


def zero_snr_betas(betas: Tensor) -> Tensor:
    """Return betas (T,) of the chain stretched to end at pure noise, with a last beta of 1.

    The first index keeps its alpha. Lin et al. 2023 (arXiv 2305.08891), Alg. 1;
    diffusers calls it rescale_betas_zero_snr.
    """
    alpha = torch.cumprod(1 - betas, 0).sqrt()
    alphas_cumprod = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def cosine_betas(num_steps: int = 1000, max_beta: float = 0.999) -> Tensor:
    """Return betas (num_steps,) of the cosine chain with offset 0.008, clipped at max_beta.

    Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17.
    """
    require_chain(num_steps, max_beta=max_beta)
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    alphas_cumprod = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=max_beta)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Return s t / (1 + (s - 1) t), the resolution shift of SD3 and FLUX.

    arXiv 2403.03206, eq. 23. The shift 1 / s is its inverse.
    """
    return shift * t / (shift * t + (1 - t))  # equal to the formula, and exactly 1 at t = 1


def require_shift(shift: float) -> None:
    """Raise ValueError where all shifted times would be 0 or 1 in float64."""
    require_range(at_least=1e-6, at_most=1e6, shift=shift)


def require_time_scale(time_scale: float) -> None:
    """Raise ValueError where native times would overflow float32 or all be equal."""
    require_range(at_least=1e-6, at_most=1e6, time_scale=time_scale)


def require_betas(beta_min: float, beta_max: float) -> None:
    """Raise ValueError unless 0 < beta_min < beta_max <= 100.

    Above 100 the flow time of the last noise level would be 1 in float64.
    """
    require_range(above=0, at_most=100, beta_min=beta_min, beta_max=beta_max)
    if not beta_min < beta_max:
        raise ValueError(f"beta_min must be below beta_max, got {beta_min} and {beta_max}")


def require_chain(num_steps: int, **betas: float) -> None:
    """Raise ValueError unless a chain has 2 to a million betas, each from 1e-9 to below 1."""
    require_range(at_least=2, at_most=LONGEST_CHAIN, num_steps=num_steps)
    require_range(at_least=1e-9, below=1, **betas)
