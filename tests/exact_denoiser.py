"""An exact denoiser of spectra: the clean spectrum is Gaussian around half of the noisy one."""

import math

import torch
from torch import Tensor, nn

from oss_exp.models.families.psdenoiser import LogRange, PSDenoiser
from oss_exp.noise import VPPath

SPREAD = 0.3  # standard deviation of the clean data around its mean
EVENT = (1, 4, 3)


def alpha_sigma(tau: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma of the VP path from beta 0.1 to 20 (Song et al. 2021)."""
    alpha = torch.exp(-0.25 * tau**2 * (20 - 0.1) - 0.5 * tau * 0.1)
    return alpha, torch.sqrt(1 - alpha**2)


def mean(noisy: Tensor) -> Tensor:
    """Return the mean of the clean data, in the network's units."""
    return noisy / 2


class ExactNoise(nn.Module):
    """E[eps | x], x = alpha x0 + sigma eps, x0 ~ N(mean(noisy), SPREAD^2), at clock 999 tau."""

    def forward(self, x: Tensor, clock: Tensor, noisy: Tensor) -> Tensor:
        alpha, sigma = (part[:, None, None, None] for part in alpha_sigma(clock / 999))
        return sigma * (x - alpha * mean(noisy)) / (alpha**2 * SPREAD**2 + sigma**2)


def build(beta_min, beta_max, time_min, time_scale, micro_batch, checkpoint) -> PSDenoiser:
    """Return the exact denoiser, in place of `PSDenoiser.from_package`."""
    assert checkpoint is None
    return PSDenoiser(
        ExactNoise(),
        VPPath(beta_min, beta_max),
        time_min=time_min,
        time_scale=time_scale,
        noisy=LogRange(-4.0, 13.0),
        clean=LogRange(-3.5, 11.0),
        event_shape=EVENT,
        micro_batch=micro_batch,
        name="exact",
        fingerprint="exact",
    )


def default() -> PSDenoiser:
    """Return the exact denoiser with the package's settings."""
    return build(0.1, 20.0, 1e-3, 999.0, 64, None)


def spectra(count: int, seed: int = 0) -> Tensor:
    """Return different positive powers over some decades, (count, 4, 3) float64."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randn(count, *EVENT[1:], dtype=torch.float64, generator=generator)
    return 10 ** (math.log10(50) + exponents)
