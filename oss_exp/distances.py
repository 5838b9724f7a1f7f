"""Distances: what a search minimises between a student's state and the teacher's at the same time.

A distance here is a mean of squares after a linear map, `features`. That is all the search needs to score every edge
from inner products. Wrappers such as `Select` narrow the map. Legend: M rows, *E event dims, F features.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor


class Distance(abc.ABC):
    """distance(x, y) = mean over the features of (features(x) - features(y))^2, one number a row."""

    @abc.abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """(M, *E) -> (M, F), linear in x."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y (M, *E) -> (M,) float64."""
        return (self.features(x) - self.features(y)).double().square().mean(dim=1)


@dataclass(frozen=True)
class MSE(Distance):
    """x_t-MSE of the OSS paper (section 4.2.2): all elements of the state."""

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@dataclass(frozen=True)
class Select(Distance):
    """Another distance on some channels and frames of (C, H, W) images or (C, F, H, W) videos.

    frames:   this many, spread evenly from the first to the last (truncated to integers, as in the released OSS code).
    channels: the first so many. None keeps all.
    """

    distance: Distance
    frames: int | None
    channels: int | None

    def __post_init__(self) -> None:
        for name, count in (("frames", self.frames), ("channels", self.channels)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1 or null for all, got {count}")

    def features(self, x: Tensor) -> Tensor:
        if self.channels is not None:
            self._check("channels", self.channels, x.shape[1])
            x = x[:, : self.channels]
        if self.frames is not None:
            if x.ndim != 5:
                raise ValueError(f"frames needs videos of shape (M, C, F, H, W), got {tuple(x.shape)}; set frames=null")
            self._check("frames", self.frames, x.shape[2])
            x = x[:, :, torch.linspace(0, x.shape[2] - 1, self.frames).long().to(x.device)]
        return self.distance.features(x)

    @staticmethod
    def _check(name: str, wanted: int, present: int) -> None:
        if wanted > present:
            raise ValueError(f"{name}={wanted} but the states have only {present}")
