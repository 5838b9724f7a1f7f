"""Gaussian paths and noise schedules, in canonical time."""

from oss_exp.noise.paths import (
    CosinePath,
    DDPMPath,
    EDMPath,
    FlowPath,
    GaussianPath,
    VPPath,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    shift_time,
)
from oss_exp.noise.schedules import (
    DDIMSchedule,
    EDMSchedule,
    FlowSchedule,
    LogSNRSchedule,
    NoiseSchedule,
    QuadraticSchedule,
    VPSchedule,
    flux_shift,
)

__all__ = [
    "CosinePath",
    "DDIMSchedule",
    "DDPMPath",
    "EDMPath",
    "EDMSchedule",
    "FlowPath",
    "FlowSchedule",
    "GaussianPath",
    "LogSNRSchedule",
    "NoiseSchedule",
    "QuadraticSchedule",
    "VPPath",
    "VPSchedule",
    "cosine_betas",
    "flux_shift",
    "linear_betas",
    "scaled_linear_betas",
    "shift_time",
]
