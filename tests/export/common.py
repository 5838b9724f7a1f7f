"""The chain of Stable Diffusion, and noises, for the tests of several exports."""

import torch

from oss_exp.noise import DDPMPath, scaled_linear_betas

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PATH = DDPMPath(scaled_linear_betas(1000, 0.00085, 0.012))


def draw(shape: tuple[int, ...], seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Draw noise of a shape from a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
