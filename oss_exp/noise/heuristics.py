"""Hand-made schedules that users of diffusers and ComfyUI know by name.

They are baselines of a searched one. Each places K network calls, the first at the
highest noise, and ends at 0. A sigma is the ratio sigma / alpha (Karras et al. 2022),
so t = sigma / (1 + sigma). Two more of the family need no class of their own: `karras`
is `EDMSchedule` and `exponential` is `LogSNRSchedule`, both on the sigma range of
Stable Diffusion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.special import betaincinv
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.noise import CosinePath, EDMPath, NoiseSchedule
from oss_exp.noise.schedules import even, require_sigmas


@dataclass(frozen=True)
class KLOptimalSchedule(NoiseSchedule):
    """Sigmas evenly spaced in arctan sigma, then 0: `kl_optimal` in A1111 and ComfyUI.

    For normal data of variance 1, no other Euler steps from sigma_max to sigma_min have
    a lower KL divergence: Align Your Steps (arXiv 2404.14507), theorem 3.1 with c = 1.
    The theorem does not cover the last jump to 0.

    Attributes:
        sigma_min: Last sigma before 0.
        sigma_max: First sigma.
    """

    sigma_min: float = 0.0292
    sigma_max: float = 14.6146

    def __post_init__(self) -> None:
        require_sigmas(self.sigma_min, self.sigma_max)

    def _times(self, num_steps: int) -> Tensor:
        angle = even(math.atan(self.sigma_max), math.atan(self.sigma_min), num_steps)
        return EDMPath().canonical(angle.tan())


@dataclass(frozen=True)
class BetaSchedule(NoiseSchedule):
    """Sigmas at even quantiles of a Beta(alpha, beta) distribution, then 0.

    This is `use_beta_sigmas` of diffusers, with alpha = beta = 0.6. Beta Sampling
    (arXiv 2407.12173) and ComfyUI apply the quantiles to the indices of the network's
    own clock instead, which puts far fewer calls at high sigmas; see
    `BetaLevelsSchedule`.

    Attributes:
        sigma_min: Last sigma before 0.
        sigma_max: First sigma.
        alpha: From 0.01 to 100. Below 1 it crowds the low sigmas; alpha = beta = 1 is
            uniform.
        beta: From 0.01 to 100. Below 1 it crowds the high sigmas.
    """

    sigma_min: float = 0.0292
    sigma_max: float = 14.6146
    alpha: float = 0.6
    beta: float = 0.6

    def __post_init__(self) -> None:
        require_sigmas(self.sigma_min, self.sigma_max)
        require_range(at_least=0.01, at_most=100, alpha=self.alpha, beta=self.beta)

    def _times(self, num_steps: int) -> Tensor:
        share = torch.from_numpy(betaincinv(self.alpha, self.beta, even(1, 0, num_steps).numpy()))
        return EDMPath().canonical(self.sigma_min + share * (self.sigma_max - self.sigma_min))


@dataclass(frozen=True)
class LinearQuadraticSchedule(NoiseSchedule):
    """Even flow times from 1 to 1 - threshold, then quadratic ones to 0, for video models.

    The slope is continuous between the two parts. Used by Movie Gen (arXiv 2410.13720),
    and by Mochi with threshold 0.025, where 25 of 50 steps are those of a run of 1000.
    A single step goes from 1 to 0.

    Attributes:
        threshold: Length of flow time that the even steps cover, from 1e-6 to below 1.
        linear_steps: Number of even steps, at least 1; None uses half of them, rounded
            down.
    """

    threshold: float = 0.025
    linear_steps: int | None = None

    def __post_init__(self) -> None:
        require_range(at_least=1e-6, below=1, threshold=self.threshold)
        require_range(at_least=1, linear_steps=self.linear_steps)

    def _times(self, num_steps: int) -> Tensor:
        if num_steps == 1:
            return torch.ones(1, dtype=torch.float64)
        linear = num_steps // 2 if self.linear_steps is None else self.linear_steps
        if linear >= num_steps:
            raise ValueError(
                f"linear_steps={linear} leaves none of {num_steps} steps to be quadratic; "
                "ask for more steps or for fewer linear ones"
            )
        # One line through all steps; after the last even step a parabola bends it down to 0.
        step = torch.arange(num_steps, dtype=torch.float64)
        slope = self.threshold / linear
        bend = ((step - linear).clamp(min=0) / (num_steps - linear)) ** 2
        return 1 - slope * step - (1 - slope * num_steps) * bend


@dataclass(frozen=True)
class CosineSchedule(NoiseSchedule):
    """Even times of the cosine path: sigma = tan(pi tau / 2) at tau = 1 - i / K.

    Nichol & Dhariwal 2021 (arXiv 2102.09672) without their offset, as in simple
    diffusion (arXiv 2301.11093).
    """

    def _times(self, num_steps: int) -> Tensor:
        return CosinePath().canonical(1 - torch.arange(num_steps, dtype=torch.float64) / num_steps)
