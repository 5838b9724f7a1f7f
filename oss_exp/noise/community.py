"""Schedules that users of ComfyUI know by name, most of them over the levels of a network's own clock.

ComfyUI knows a network by its list of 1000 noise levels. Here `clock` places them, as a noise schedule of so many
nodes: `FlowSchedule(shift)` for flow matching, `DDIMSchedule(betas)` for a chain of betas, `LogSNRSchedule` for EDM's.
Level 0 has the most noise.
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
    """Calls at some of the num_levels levels of `clock`, then 0."""

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
        """(num_steps,) float64: which levels; between whole numbers t is linear."""


@dataclass(frozen=True)
class SimpleSchedule(LevelsSchedule):
    """Every so many levels from the noisiest on, rounded towards it: `simple` in ComfyUI."""

    def _positions(self, num_steps: int) -> Tensor:
        return (torch.arange(num_steps).double() * (self.num_levels / num_steps)).floor()


@dataclass(frozen=True)
class SGMUniformSchedule(LevelsSchedule):
    """Evenly from the first level towards the last, which is left out: `sgm_uniform` in ComfyUI."""

    def _positions(self, num_steps: int) -> Tensor:
        return even(0, self.num_levels - 1, num_steps + 1)[:-1]


@dataclass(frozen=True)
class BetaLevelsSchedule(LevelsSchedule):
    """Levels at even quantiles of a Beta(alpha, beta) law (arXiv 2407.12173): `beta57` in ComfyUI's RES4LYF.

    With alpha = beta = 0.6 it is ComfyUI's own `beta`; `BetaSchedule`, diffusers', spreads the sigmas in that way.
    """

    alpha: float = 0.5
    beta: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(at_least=0.01, at_most=100, alpha=self.alpha, beta=self.beta)

    def _positions(self, num_steps: int) -> Tensor:
        remaining = 1 - torch.arange(num_steps).double() / num_steps
        index = torch.from_numpy(betaincinv(self.alpha, self.beta, remaining.numpy())) * (
            self.num_levels - 1
        )
        return self.num_levels - 1 - index.round()


@dataclass(frozen=True)
class BongTangentSchedule(NoiseSchedule):
    """Flow times along two arctangents, from 1 to 1/2 and from there to 0: `bong_tangent` in ComfyUI's RES4LYF.

    Of K + 2 points the first floor(0.6 (K + 2)) are those of the upper one, whose last is left out. Both have their
    steepest point where they meet, and are stretched to their ends.

    slope: of the arctangents, for 40 points; of other numbers it is in proportion.
    """

    slope: float = 0.2

    def __post_init__(self) -> None:
        require_range(above=0, at_most=1000, slope=self.slope)

    def _times(self, num_steps: int) -> Tensor:
        points = num_steps + 2
        upper = 3 * points // 5
        if num_steps == 1:
            return torch.ones(1, dtype=torch.float64)
        slope = self.slope * 40 / points
        first = arctangent(upper, slope, upper, 1.0, 0.5)[:-1]
        return torch.cat([first, arctangent(points - upper, slope, 0, 0.5, 0.0)[:-1]])


def arctangent(count: int, slope: float, pivot: int, start: float, end: float) -> Tensor:
    """(count,) points of -arctan(slope (x - pivot)) at x = 0 .. count - 1, stretched from `start` to `end`."""
    values = torch.atan(-slope * (torch.arange(count).double() - pivot)) / math.pi
    return end + (values - values[-1]) / (values[0] - values[-1]) * (start - end)
