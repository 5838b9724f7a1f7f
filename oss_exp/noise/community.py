"""Schedules that users of ComfyUI know by name, most of them over a network's own noise levels.

ComfyUI describes a network by its list of 1000 noise levels. Here `clock` gives these
levels, as a noise schedule with that many nodes: `FlowSchedule(shift)` for flow
matching, `DDIMSchedule(betas)` for a chain of betas, `LogSNRSchedule` for EDM. Level 0
has the most noise.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field

import torch
from scipy.special import betaincinv
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.noise import FlowSchedule, NoiseSchedule
from oss_exp.noise.schedules import MOST_STEPS, even


@dataclass(frozen=True)
class LevelsSchedule(NoiseSchedule):
    """Times at some of the noise levels of a network, then 0.

    Attributes:
        clock: Noise schedule whose first `num_levels` nodes are the levels.
        num_levels: Number of levels.
    """

    clock: NoiseSchedule = field(default_factory=FlowSchedule)
    num_levels: int = 1000

    def __post_init__(self) -> None:
        require_range(at_least=2, at_most=MOST_STEPS, num_levels=self.num_levels)

    def _times(self, num_steps: int) -> Tensor:
        levels = self.clock.nodes(self.num_levels)[:-1]
        position = self._positions(num_steps).clamp(0, self.num_levels - 1)
        low = position.floor().long()
        return torch.lerp(levels[low], levels[position.ceil().long()], position - low)

    @abc.abstractmethod
    def _positions(self, num_steps: int) -> Tensor:
        """Return positions (num_steps,) in the list of levels; between levels t is linear."""


@dataclass(frozen=True)
class SimpleSchedule(LevelsSchedule):
    """Even positions from the noisiest level on, rounded towards it: ComfyUI's `simple`."""

    def _positions(self, num_steps: int) -> Tensor:
        return (torch.arange(num_steps).double() * (self.num_levels / num_steps)).floor()


@dataclass(frozen=True)
class SGMUniformSchedule(LevelsSchedule):
    """Even positions from the first level up to the last, excluded: ComfyUI's `sgm_uniform`."""

    def _positions(self, num_steps: int) -> Tensor:
        return even(0, self.num_levels - 1, num_steps + 1)[:-1]


@dataclass(frozen=True)
class BetaLevelsSchedule(LevelsSchedule):
    """Levels at even quantiles of a Beta(alpha, beta) distribution (arXiv 2407.12173).

    The defaults are `beta57` in RES4LYF for ComfyUI. With alpha = beta = 0.6 it is
    `beta` of ComfyUI. `BetaSchedule`, which diffusers has, applies the quantiles to
    sigmas instead.

    Attributes:
        clock: As in `LevelsSchedule`.
        num_levels: As in `LevelsSchedule`.
        alpha: From 0.01 to 100.
        beta: From 0.01 to 100.
    """

    alpha: float = 0.5
    beta: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(at_least=0.01, at_most=100, alpha=self.alpha, beta=self.beta)

    def _positions(self, num_steps: int) -> Tensor:
        remaining = 1 - torch.arange(num_steps).double() / num_steps
        quantiles = torch.from_numpy(betaincinv(self.alpha, self.beta, remaining.numpy()))
        last = self.num_levels - 1
        return last - (quantiles * last).round()


@dataclass(frozen=True)
class BongTangentSchedule(NoiseSchedule):
    """Flow times along two arctangents: `bong_tangent` in RES4LYF for ComfyUI.

    The first curve goes from 1 to 1/2, the second from 1/2 to 0; both are steepest
    where they meet. Of K + 2 points the first curve has floor(0.6 (K + 2)), and its
    last one is dropped.

    Attributes:
        slope: Slope of the arctangents for 40 points. For n points it is multiplied by
            40 / n.
    """

    slope: float = 0.2

    def __post_init__(self) -> None:
        require_range(above=0, at_most=1000, slope=self.slope)

    def _times(self, num_steps: int) -> Tensor:
        points = num_steps + 2
        if num_steps == 1:
            return torch.ones(1, dtype=torch.float64)
        slope = self.slope * 40 / points
        upper_points = 3 * points // 5
        upper = arctangent(upper_points, slope, upper_points, 1.0, 0.5)
        lower = arctangent(points - upper_points, slope, 0, 0.5, 0.0)
        return torch.cat([upper[:-1], lower[:-1]])


def arctangent(count: int, slope: float, pivot: int, start: float, end: float) -> Tensor:
    """Return points (count,) of a falling arctangent, stretched to go from `start` to `end`.

    Args:
        count: Number of points, at x = 0 .. count - 1.
        slope: The curve is -arctan(slope (x - pivot)).
        pivot: x of the steepest point.
        start: Value at the first point.
        end: Value at the last point.
    """
    values = torch.atan(-slope * (torch.arange(count).double() - pivot)) / math.pi
    return end + (values - values[-1]) / (values[0] - values[-1]) * (start - end)
