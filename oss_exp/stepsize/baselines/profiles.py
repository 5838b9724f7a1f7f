"""Profiles: a density over time from one run of the teacher, whose quantiles are the times of a student of any K.

`TORS` steps by equal rotation of the trajectory, `SharpEuler` by the change of the velocity, `Entropic` by what the
network still has to learn about the clean sample. None of them looks at a student.

Legend: B samples, N+1 nodes, interval i goes from node i to node i+1, K steps, *E event dims.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.schedule import StepSchedule
from oss_exp.stepsize.base import check_num_steps, teacher_velocities
from oss_exp.stepsize.problem import Problem

FRESH = 2504_13612  # seed of noises that no trajectory begins with

LEAST = (
    1e-9  # share of an even interval's mass that every interval has, so that no two times are equal
)


@dataclass(frozen=True)
class Profile(abc.ABC):
    """A schedule whose steps all have the same share of `masses`; within an interval of the teacher these are even."""

    per_sample: ClassVar[bool] = False
    baseline: ClassVar[bool] = True

    @torch.no_grad()
    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        budgets = check_num_steps(num_steps, problem.num_nodes)
        masses = self.masses(problem).cpu()
        times = quantiles(
            problem.grid.cpu(), masses.clamp(min=LEAST * float(masses.mean())), budgets
        )
        return {k: StepSchedule(nodes) for k, nodes in times.items()}

    @abc.abstractmethod
    def masses(self, problem: Problem) -> Tensor:
        """(N,) float64, not negative: of the teacher's intervals, over all ranks' samples."""

    @abc.abstractmethod
    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        """Network calls per sample, the teacher's aside."""


def quantiles(grid: Tensor, masses: Tensor, budgets: Sequence[int]) -> dict[int, Tensor]:
    """grid (N+1,), positive masses (N,) -> for every K the K+1 times that cut the mass into equal parts."""
    share = np.concatenate([[0.0], masses.cumsum(0) / masses.sum()])
    times = {k: np.interp(np.linspace(0, 1, k + 1), share, grid) for k in budgets}
    return {
        k: torch.tensor([float(grid[0]), *each[1:-1], 0.0], dtype=torch.float64)
        for k, each in times.items()
    }


def mean_over_ranks(total: Tensor, problem: Problem) -> Tensor:
    """The sum over this rank's samples -> the mean over those of all ranks."""
    count = problem.collective.sum(total.new_tensor(len(problem.noise)))
    return problem.collective.sum(total) / count


# --------------------------------------------------------------------------------------------------------------
# TORS
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TORS(Profile):
    """Constant total rotation: the integral of sqrt(curvature^2 + torsion^2) (Zhou et al. 2026, arXiv 2603.00763).

    Each trajectory is projected on its three principal axes, and the rotation in each interval averaged over the
    trajectories. The authors have about 100 of 100 steps. It makes no network calls beside the teacher's.
    """

    def masses(self, problem: Problem) -> Tensor:
        if problem.num_nodes < 4:
            raise ValueError(
                f"tors reads rotations off 4 or more steps, and the teacher takes {problem.num_nodes}"
            )
        rotations = [
            rotation(principal_coordinates(x)) for x in problem.teacher.states.flatten(2).unbind(1)
        ]
        return mean_over_ranks(torch.stack(rotations).sum(0), problem)

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        return 0


def principal_coordinates(states: Tensor) -> Tensor:
    """One trajectory (N+1, F) -> its coordinates (N+1, 3) float64 on the three axes of largest variance."""
    centred = states.double() - states.double().mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    return vectors[:, -3:] * values[-3:].clamp(min=0).sqrt()


def rotation(points: Tensor) -> Tensor:
    """A curve through points (N+1, 3) -> the angle (N,) by which its frame rotates in every interval.

    The root of two squares: how far the tangent turns (curvature), and the osculating plane (torsion). As angles
    between chords, and between planes of two chords, they need no derivatives and no even steps. An interval has half
    of the turn at either end; at the ends of the curve, what its neighbour has.
    """
    chords = points.diff(dim=0)
    turn = angle(chords[:-1], chords[1:])  # at nodes 1 .. N-1
    turn = torch.cat([turn[:1], turn, turn[-1:]])
    planes = torch.linalg.cross(chords[:-1], chords[1:])
    twist = angle(planes[:-1], planes[1:])  # in intervals 1 .. N-2
    twist = torch.cat([twist[:1], twist, twist[-1:]])
    return torch.hypot((turn[:-1] + turn[1:]) / 2, twist)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Vectors (M, 3) -> the angles (M,) between them, exact for small ones too."""
    return torch.atan2(torch.linalg.cross(a, b).norm(dim=1), (a * b).sum(1))


# --------------------------------------------------------------------------------------------------------------
# SharpEuler
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharpEuler(Profile):
    """The density E|dv/dt|^gamma of the velocity along the trajectory (Gupta et al. 2026, arXiv 2605.11547).

    gamma:     1/2 makes the local errors of Euler steps equal.
    smoothing: width of the Gaussian that smooths the density, in the teacher's nodes; 0: none.
    """

    gamma: float = 0.5
    smoothing: float = 1.0

    def __post_init__(self) -> None:
        require_range(above=0, at_most=10, gamma=self.gamma)
        require_range(at_least=0, at_most=1000, smoothing=self.smoothing)

    def masses(self, problem: Problem) -> Tensor:
        if problem.num_nodes < 2:
            raise ValueError(
                "sharp_euler compares the velocities of two or more nodes, and the teacher takes one step"
            )
        steps = -problem.grid.diff()
        changes = [
            (after - before).flatten(1).double().norm(dim=1).sum() / step
            for (before, after), step in zip(
                pairwise(teacher_velocities(problem)), steps[:-1], strict=True
            )
        ]
        density = mean_over_ranks(torch.stack(changes), problem) ** self.gamma
        density = smoothed(
            torch.cat([density, density[-1:]]), self.smoothing
        )  # nothing is known of the last interval
        return density * steps

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        return num_nodes - 1


def smoothed(values: Tensor, width: float) -> Tensor:
    """(N,) -> (N,) under a Gaussian of this width, cut at three of them, with the ends mirrored."""
    if width == 0:
        return values
    found = gaussian_filter1d(
        values.cpu().numpy(), width, mode="mirror", radius=max(1, int(3 * width))
    )
    return torch.from_numpy(found).to(values)


# --------------------------------------------------------------------------------------------------------------
# Entropic time
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entropic(Profile):
    """Rescaled entropic time: the density E|D - x0|^2 / sigma^2 over sigma (Stancevic et al. 2025, arXiv 2504.13612).

    E|D - x0|^2 is the loss of the network's prediction D of clean samples x0 under noise sigma. There is no data here:
    the clean samples are the ends of the teacher's trajectories, each with a fresh noise, the same at all times. The
    trajectories themselves would not do, for their states are no clean samples under independent noise.
    """

    def masses(self, problem: Problem) -> Tensor:
        x0 = problem.teacher.states[-1]
        noise = torch.stack([fresh_noise(sample, x0) for sample in problem.samples.tolist()])
        losses = []
        for t in problem.grid[:-1]:
            x = (1 - float(t)) * x0 + float(t) * noise
            predicted = x - float(t) * problem.velocity(x, t.expand(len(x)))
            losses.append((predicted - x0).double().square().sum())
        density = (
            mean_over_ranks(torch.stack(losses), problem) / problem.grid[:-1] ** 2
        )  # d sigma / sigma^2 = dt / t^2
        density = torch.cat([density, density[-1:]])
        return -problem.grid.diff() * (density[:-1] + density[1:]) / 2

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        return num_nodes


def fresh_noise(sample: int, like: Tensor) -> Tensor:
    """Return standard normal noise (*E) that depends on the sample's number alone; like (B, *E)."""
    drawn = np.random.default_rng((FRESH, sample)).standard_normal(like.shape[1:], dtype=np.float32)
    return torch.from_numpy(drawn).to(like)
