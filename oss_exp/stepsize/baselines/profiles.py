"""Profiles: a density over time from one run of the teacher, whose quantiles are a student's times.

`TORS` steps by equal rotation of the trajectory, `SharpEuler` by the change of the
velocity, `Entropic` by what the network still has to learn about the clean sample. One
profile serves every K. None of them runs a student.

Legend: B samples, N+1 nodes, interval i goes from node i to node i+1, K steps, *E event
dims.
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

# Least mass of an interval, relative to the mean: no two times are equal.
LEAST = 1e-9


@dataclass(frozen=True)
class Profile(abc.ABC):
    """A schedule whose steps all have the same share of a mass.

    Within an interval of the teacher the mass is even.
    """

    per_sample: ClassVar[bool] = False
    baseline: ClassVar[bool] = True

    @torch.no_grad()
    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        budgets = check_num_steps(num_steps, problem.num_nodes)
        masses = self.masses(problem).cpu()
        masses = masses.clamp(min=LEAST * float(masses.mean()))
        times = quantiles(problem.grid.cpu(), masses, budgets)
        return {k: StepSchedule(nodes) for k, nodes in times.items()}

    @abc.abstractmethod
    def masses(self, problem: Problem) -> Tensor:
        """Return the mass (N,) float64, not negative, of each interval, over all ranks' samples."""

    @abc.abstractmethod
    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        """Return the network calls per sample, without the teacher's."""


def quantiles(grid: Tensor, masses: Tensor, budgets: Sequence[int]) -> dict[int, Tensor]:
    """Return, for every K, the K+1 times that cut the mass into equal parts.

    Args:
        grid: (N+1,) times.
        masses: (N,) positive mass of each interval.
        budgets: the K.
    """
    share = np.concatenate([[0.0], masses.cumsum(0) / masses.sum()])
    quantile_times = {}
    for k in budgets:
        inner = np.interp(np.linspace(0, 1, k + 1), share, grid)[1:-1]
        times = [float(grid[0]), *inner, 0.0]
        quantile_times[k] = torch.tensor(times, dtype=torch.float64)
    return quantile_times


def mean_over_ranks(total: Tensor, problem: Problem) -> Tensor:
    """Return the mean over the samples of all ranks of a sum over this rank's samples."""
    count = problem.collective.sum(total.new_tensor(len(problem.noise)))
    return problem.collective.sum(total) / count


# --------------------------------------------------------------------------------------------------
# TORS
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TORS(Profile):
    """Constant total rotation: the integral of sqrt(curvature^2 + torsion^2).

    Zhou et al. 2026, arXiv 2603.00763. Each trajectory is projected on its three
    principal axes, and the rotation in each interval is averaged over the trajectories.
    The authors have about 100 trajectories of 100 steps. It makes no network calls
    beside the teacher's.
    """

    def masses(self, problem: Problem) -> Tensor:
        if problem.num_nodes < 4:
            raise ValueError(
                "tors measures rotations over 4 or more steps, and the teacher takes "
                f"{problem.num_nodes}"
            )
        rotations = []
        for states in problem.teacher.states.flatten(2).unbind(1):
            rotations.append(rotation(principal_coordinates(states)))
        return mean_over_ranks(torch.stack(rotations).sum(0), problem)

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        return 0


def principal_coordinates(states: Tensor) -> Tensor:
    """Return the coordinates (N+1, 3) float64 of a trajectory on its axes of largest variance.

    Args:
        states: (N+1, F).
    """
    centred = states.double() - states.double().mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    return vectors[:, -3:] * values[-3:].clamp(min=0).sqrt()


def rotation(points: Tensor) -> Tensor:
    """Return the angle (N,) by which the frame of a curve rotates in every interval.

    It is the root of two squares: how far the tangent turns (curvature), and how far
    the osculating plane does (torsion). As angles between chords, and between planes of
    two chords, they need no derivatives and no even steps. An interval has half of the
    turn at either end; the ends of the curve have what their neighbours have.

    Args:
        points: (N+1, 3).
    """
    # Turns at nodes 1 to N-1.
    chords = points.diff(dim=0)
    turn = angle(chords[:-1], chords[1:])
    turn = torch.cat([turn[:1], turn, turn[-1:]])

    # Twists in intervals 1 to N-2.
    planes = torch.linalg.cross(chords[:-1], chords[1:])
    twist = angle(planes[:-1], planes[1:])
    twist = torch.cat([twist[:1], twist, twist[-1:]])
    return torch.hypot((turn[:-1] + turn[1:]) / 2, twist)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Return the angles (M,) between vectors (M, 3), exact for small ones too."""
    return torch.atan2(torch.linalg.cross(a, b).norm(dim=1), (a * b).sum(1))


# --------------------------------------------------------------------------------------------------
# SharpEuler
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharpEuler(Profile):
    """The density E|dv/dt|^gamma of the velocity along the trajectory.

    Gupta et al. 2026, arXiv 2605.11547.

    Args:
        gamma: 1/2 makes the local errors of Euler steps equal.
        smoothing: width of the Gaussian that smooths the density, in the teacher's
            nodes; 0 means none.
    """

    gamma: float = 0.5
    smoothing: float = 1.0

    def __post_init__(self) -> None:
        require_range(above=0, at_most=10, gamma=self.gamma)
        require_range(at_least=0, at_most=1000, smoothing=self.smoothing)

    def masses(self, problem: Problem) -> Tensor:
        if problem.num_nodes < 2:
            raise ValueError(
                "sharp_euler compares the velocities of two or more nodes, and the teacher takes "
                "one step"
            )

        # Changes of the velocity in all intervals but the last.
        steps = -problem.grid.diff()
        changes = []
        velocities = pairwise(teacher_velocities(problem))
        for (before, after), step in zip(velocities, steps[:-1], strict=True):
            changes.append((after - before).flatten(1).double().norm(dim=1).sum() / step)

        # The density, whose last value is repeated.
        density = mean_over_ranks(torch.stack(changes), problem) ** self.gamma
        density = smoothed(torch.cat([density, density[-1:]]), self.smoothing)
        return density * steps

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        return num_nodes - 1


def smoothed(values: Tensor, width: float) -> Tensor:
    """Return values (N,) under a Gaussian of this width.

    It is cut at three widths, and the ends are mirrored.
    """
    if width == 0:
        return values
    radius = max(1, int(3 * width))
    filtered = gaussian_filter1d(values.cpu().numpy(), width, mode="mirror", radius=radius)
    return torch.from_numpy(filtered).to(values)


# --------------------------------------------------------------------------------------------------
# Entropic time
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entropic(Profile):
    """Rescaled entropic time: the density E|D - x0|^2 / sigma^2 over sigma.

    Stancevic et al. 2025, arXiv 2504.13612. E|D - x0|^2 is the loss of the network's
    prediction D of clean samples x0 under noise sigma. There is no data here: the clean
    samples are the ends of the teacher's trajectories, each with a fresh noise that is
    the same at all times. The trajectories' own states would not do, because they are
    not clean samples under independent noise.
    """

    def masses(self, problem: Problem) -> Tensor:
        x0 = problem.teacher.states[-1]
        noise = torch.stack([fresh_noise(sample, x0) for sample in problem.samples.tolist()])

        # The loss at every node.
        losses = []
        for t in problem.grid[:-1]:
            x = (1 - float(t)) * x0 + float(t) * noise
            prediction = x - float(t) * problem.velocity(x, t.expand(len(x)))
            losses.append((prediction - x0).double().square().sum())

        # d sigma / sigma^2 = dt / t^2; the trapezoidal rule.
        density = mean_over_ranks(torch.stack(losses), problem) / problem.grid[:-1] ** 2
        density = torch.cat([density, density[-1:]])
        return -problem.grid.diff() * (density[:-1] + density[1:]) / 2

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        return num_nodes


def fresh_noise(sample: int, like: Tensor) -> Tensor:
    """Return standard normal noise (*E) that depends on the sample's number alone.

    Args:
        sample: global index.
        like: (B, *E), for the shape, dtype and device.
    """
    generator = np.random.default_rng((FRESH, sample))
    noise = generator.standard_normal(like.shape[1:], dtype=np.float32)
    return torch.from_numpy(noise).to(like)
