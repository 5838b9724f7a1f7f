"""A network's input and output in terms of the velocity v = eps - x0 at x_t = (1 - t) x0 + t eps.

A parameterization is a network's clock and input scaling (`inputs`), and the quantity that it
was trained to predict (`target`). Sampling reads `velocity`; training regresses the network's
output on `target`.

Legend: M rows, *E event dims; t (M,) float64.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.noise import DDPMPath, EDMPath, FlowPath, GaussianPath, cosine_betas
from oss_exp.noise.paths import require_time_scale
from oss_exp.noise.schedules import require_sigmas
from oss_exp.tensors import rowwise


class Parameterization(abc.ABC):
    """The input and output of one network; `path` translates its clock."""

    path: GaussianPath

    def inputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the network's input (M, *E) and its clock (M,), in x's dtype.

        Args:
            x: States x_t (M, *E).
            t: Canonical times (M,).
        """
        return rowwise(self.path.scale(t), x) * x, self.path.native(t).to(x)

    @abc.abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the training target (M, *E) for x0 and noise (M, *E)."""

    @abc.abstractmethod
    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return v (M, *E), from the network's output (M, *E) at x_t."""

    def loss(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Return the training loss of outputs and targets (M, *E): mean squared error, scalar."""
        return F.mse_loss(output, target)


@dataclass(frozen=True)
class FlowVelocity(Parameterization):
    """The network predicts v itself: flow matching (Lipman et al. 2022, arXiv 2210.02747)."""

    path: GaussianPath = field(default_factory=FlowPath)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x0

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return output


@dataclass(frozen=True)
class NoisePrediction(Parameterization):
    """The network predicts eps, and v = (eps - x) / (1 - t).

    Source: Ho et al. 2020, arXiv 2006.11239.

    Args:
        path: The chain.
        time_max: Below 1, the noisiest canonical time of training. It takes the place of later
            ones.
        time_scale: Factor on the path's clock; 999 if the network counts 1000 steps on a
            continuous path.
        whole: Round the clock to the whole number whose sigma / alpha is nearest, as EDM does.
    """

    path: GaussianPath = field(default_factory=DDPMPath)
    time_max: float = 0.99368716  # the last index of the default chain
    time_scale: float = 1.0
    whole: bool = False

    def __post_init__(self) -> None:
        require_range(above=0, below=1, time_max=self.time_max)
        require_time_scale(self.time_scale)

    def inputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.clamp(max=self.time_max)
        tau = self._nearest(t) if self.whole else self.path.native(t)
        return rowwise(self.path.scale(t), x) * x, (self.time_scale * tau).to(x)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return (output - x) / rowwise(1 - t.clamp(max=self.time_max), x)

    def _nearest(self, t: Tensor) -> Tensor:
        """Return the whole native time whose ratio sigma / alpha is nearest to that of t."""
        tau = self.path.native(t)
        below = self._ratio(tau.floor())
        ratio = self._ratio(tau)
        above = self._ratio(tau.ceil())
        return torch.where(ratio - below < above - ratio, tau.floor(), tau.ceil())

    def _ratio(self, tau: Tensor) -> Tensor:
        """Return sigma / alpha at a native time."""
        t = self.path.canonical(tau)
        return t / (1 - t)


@dataclass(frozen=True)
class VPVelocity(Parameterization):
    """The network predicts alpha eps - sigma x0 of a variance-preserving path.

    With alpha^2 + sigma^2 = 1 and s = alpha + sigma, v = (2 t - 1) s^2 x + s output.
    Source: Salimans & Ho 2022, arXiv 2202.00512.

    Args:
        path: The chain.
        time_max: As in `NoisePrediction`; 1 for a chain that ends at pure noise.
    """

    path: GaussianPath = field(default_factory=lambda: DDPMPath(cosine_betas()))
    time_max: float = 0.99995072  # the last index of the default chain

    def __post_init__(self) -> None:
        require_range(above=0, at_most=1, time_max=self.time_max)

    def inputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return super().inputs(x, t.clamp(max=self.time_max))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        scale = self.path.scale(t)
        return rowwise(scale * (1 - t), x0) * noise - rowwise(scale * t, x0) * x0

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        t = t.clamp(max=self.time_max)
        scale = self.path.scale(t)
        return rowwise((2 * t - 1) * scale**2, x) * x + rowwise(scale, x) * output


@dataclass(frozen=True)
class ScorePrediction(Parameterization):
    """The network predicts sigma times the score, which is -eps, at x_native = x0 + sigma eps.

    Its clock is ln(sigma / 2) (EDM, table 1). Clock and scaling stop at sigma_min and sigma_max,
    the bounds of training. Source: Song et al. 2021, arXiv 2011.13456.
    """

    path: GaussianPath = field(default_factory=EDMPath, init=False, repr=False)
    sigma_min: float = 0.02  # as in the original, and 100
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        require_sigmas(self.sigma_min, self.sigma_max)

    def inputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.path.native(t).clamp(max=self.sigma_max)
        clock = (sigma.clamp(min=self.sigma_min) / 2).log()
        return rowwise(1 + sigma, x) * x, clock.to(x)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return -noise

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        sigma = self.path.native(t).clamp(max=self.sigma_max)
        return -(output + x) * rowwise(1 + sigma, x)


@dataclass(frozen=True)
class DataPrediction(Parameterization):
    """The network predicts x0, and v = (x - x0) / t.

    Args:
        path: Translates the network's clock.
        time_min: Above 0, the cleanest time that the network is evaluated at.
    """

    path: GaussianPath = field(default_factory=lambda: FlowPath(time_scale=1000.0))
    time_min: float = 0.05

    def __post_init__(self) -> None:
        require_range(above=0, below=1, time_min=self.time_min)

    def inputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return super().inputs(x, t.clamp(min=self.time_min))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return x0

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return (x - output) / rowwise(t.clamp(min=self.time_min), x)

    def loss(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Return the mean squared error of v, which trains better than that of x0.

        Source: Li and He 2025, arXiv 2511.13720, section 4.
        """
        t = rowwise(t.clamp(min=self.time_min), output)
        return F.mse_loss(output / t, target / t)


@dataclass(frozen=True)
class EDMPrediction(Parameterization):
    """The network predicts F, where D = c_skip x_native + c_out F is the denoised sample.

    Written in t, no coefficient has a pole: with q^2 = t^2 + (sigma_data (1 - t))^2 the input is
    x / q and v = (t - sigma_data^2 (1 - t)) x / q^2 - sigma_data F / q. Only the clock,
    time_scale ln(sigma) / 4, has one; it stops at sigma_min and sigma_max, the bounds of training.
    Source: Karras et al. 2022, arXiv 2206.00364, table 1.
    """

    path: GaussianPath = field(default_factory=EDMPath, init=False, repr=False)
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        require_sigmas(self.sigma_min, self.sigma_max)
        require_range(at_least=1e-3, at_most=1e3, sigma_data=self.sigma_data)
        require_time_scale(self.time_scale)

    def inputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.path.native(t).clamp(self.sigma_min, self.sigma_max)
        clock = self.time_scale * sigma.log() / 4
        return x / rowwise(self._q(t), x), clock.to(x)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        difference = rowwise(t, x0) * x0 - rowwise(self.sigma_data**2 * (1 - t), x0) * noise
        return difference / rowwise(self.sigma_data * self._q(t), x0)

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        q = self._q(t)
        skip = (t - self.sigma_data**2 * (1 - t)) / q**2
        return rowwise(skip, x) * x - rowwise(self.sigma_data / q, x) * output

    def _q(self, t: Tensor) -> Tensor:
        return torch.sqrt(t**2 + (self.sigma_data * (1 - t)) ** 2)
