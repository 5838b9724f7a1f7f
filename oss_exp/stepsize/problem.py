"""The search problem that every strategy solves: velocity, noises, grid, solver, distance, and the teacher's run.

Legend: B samples of this rank, N+1 grid nodes from the noise (node 0) to the data (node N), K steps, G conditions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from oss_exp.distances import Distance
from oss_exp.schedule import StepSchedule
from oss_exp.solvers.base import LinearMultistep, Solver
from oss_exp.solvers.sampling import walk
from oss_exp.velocity import BoundVelocity, VelocityFn, answers, mixed


class Collective:
    """How ranks agree. This one is for a single process; every rank must make the same calls in the same order."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Element-wise sum over ranks."""
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """(b, ...) with any b on each rank -> all ranks' rows, one after the other."""
        return tensor


@dataclass(frozen=True, eq=False)
class Teacher:
    """states (N+1, B, *E) of the many-step run, and the network's answers (B, *E) at its first node, for reuse."""

    states: Tensor
    first: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Problem:
    """One search set: a bound network, noises, the teacher's grid, the student's solver and the distance.

    velocity: see `VelocityFn`; with a `BoundVelocity` the search can go through the samples in small groups.
    noise:    (B, *E) the teacher's state at grid[0], float32 or wider.
    grid:     (N+1,) strictly decreasing canonical times, the last one 0.
    samples:  (B,) global index of each noise (default 0 .. B-1), group: (B,) its condition in 0 .. num_groups-1.
    """

    velocity: VelocityFn
    noise: Tensor
    grid: Tensor
    solver: Solver
    distance: Distance
    collective: Collective = field(default_factory=Collective)
    samples: Tensor | None = None
    group: Tensor | None = None
    num_groups: int = 1

    def __post_init__(self) -> None:
        StepSchedule(self.grid)  # the same rules: finite, decreasing, closed by 0
        if len(self.noise) == 0:
            raise ValueError("a search needs at least one noise on every rank; use fewer ranks or more search samples")
        if not bool(self.noise.isfinite().all()):
            raise ValueError("the noise holds NaN or infinity")
        if self.noise.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the noise must be float32 or float64, got {self.noise.dtype}")
        device, count = self.noise.device, len(self.noise)
        object.__setattr__(self, "grid", self.grid.to(device, torch.float64))
        for name, default in (("samples", torch.arange(count)), ("group", torch.zeros(count, dtype=torch.long))):
            value = getattr(self, name)
            object.__setattr__(self, name, (default if value is None else value).to(device))

    @property
    def num_nodes(self) -> int:
        """N, the number of teacher steps."""
        return len(self.grid) - 1

    @cached_property
    def teacher(self) -> Teacher:
        """Runs the solver over the whole grid once. ValueError if the network returns NaN or infinity."""
        with torch.no_grad():
            first = answers(self.velocity, self.noise, self.grid[0].expand(len(self.noise)))

            def f(x: Tensor, t: Tensor) -> Tensor:
                return mixed(self.velocity, first) if x is self.noise else self.velocity(x, t)

            states = torch.empty((len(self.grid), *self.noise.shape), dtype=self.noise.dtype, device=self.noise.device)
            for node, state in enumerate(walk(self.solver, f, self.noise, self.grid)):
                states[node] = state.x
        if not bool(states.isfinite().all()):
            node = int((~states.flatten(1).isfinite().all(dim=1)).nonzero()[0])
            raise ValueError(
                f"the teacher's state is NaN or infinite from node {node} (t = {float(self.grid[node]):.4f}) on; "
                "check the model's dtype and the noise schedule's first time"
            )
        return Teacher(states, first)

    @cached_property
    def mean(self) -> Tensor:
        """(G, *E) float32 mean clean sample at pure noise, from the teacher's first call: x0 = x - t v, over all ranks.

        A condition that no search sample has gets the mean over all of them.
        """
        v = mixed(self.velocity, self.teacher.first)
        x0 = (self.noise - self.grid[0].to(self.noise) * v).double()
        member = torch.nn.functional.one_hot(self.group, self.num_groups).to(x0)  # (B, G)
        total = self.collective.sum(torch.einsum("bg,b...->g...", member, x0))
        count = self.collective.sum(member.sum(0)).reshape(-1, *[1] * (x0.ndim - 1))
        overall = total.sum(0, keepdim=True) / count.sum()
        return torch.where(count > 0, total / count.clamp(min=1), overall).float()

    @cached_property
    def goals(self) -> list[Tensor]:
        """The features (B, ...) of the teacher's state at every node."""
        with torch.no_grad():
            times = self.grid[:, None].expand(-1, len(self.noise))
            return [
                self.distance.features(x, t, self.velocity) for x, t in zip(self.teacher.states, times, strict=True)
            ]

    @cached_property
    def goal_norms(self) -> Tensor:
        """(N+1, B) float64: the squared length of the goals."""
        return torch.stack([goal.flatten(1).double().square().sum(1) for goal in self.goals])

    def cost(self, x: Tensor, nodes: Tensor) -> Tensor:
        """x (M, *E), M = c B, reached at nodes (b,) of their samples, b = B or 1 -> distance to the teacher (M,)."""
        copies, count = len(x) // len(self.noise), len(self.noise)
        t = self.grid[nodes].expand(count).repeat(copies)
        if len(nodes) == 1:
            goal = self.goals[int(nodes)]
        else:
            goal = torch.stack([self.goals[node][sample] for sample, node in enumerate(nodes.tolist())])
        features = self.distance.features(x, t, self.velocity)
        return self.distance.between(features, goal.repeat(copies, *[1] * (goal.ndim - 1)))

    def at_most(self, order: int | None) -> Problem:
        """The same question and teacher for students whose steps are of this order or less."""
        if order is None or not isinstance(self.solver, LinearMultistep) or order >= self.solver.order:
            return self
        part = replace(self, solver=replace(self.solver, order=order))
        for kept in ("teacher", "mean", "goals"):
            part.__dict__[kept] = getattr(self, kept)
        return part

    def subset(self, samples: Tensor) -> Problem:
        """The same question for some of this rank's samples, (b,) positions, with no other rank to agree with.

        The teacher, its features and the mean are kept. A plain VelocityFn can only be kept whole: else TypeError.
        """
        if isinstance(self.velocity, BoundVelocity):
            velocity = self.velocity.subset(samples)
        elif len(samples) == len(self.noise):
            velocity = self.velocity
        else:
            raise TypeError("only a problem with a BoundVelocity can be cut to some of its samples")
        if bool((samples.diff() == 1).all()):  # neighbours need no copies
            samples = slice(int(samples[0]), int(samples[-1]) + 1)
        part = replace(
            self,
            velocity=velocity,
            collective=Collective(),
            noise=self.noise[samples],
            samples=self.samples[samples],
            group=self.group[samples],
        )
        first = tuple(answer[samples] for answer in self.teacher.first)
        part.__dict__["teacher"] = Teacher(self.teacher.states[:, samples], first)
        part.__dict__["mean"] = self.mean
        if self.distance.calls:  # else they are as easily made anew
            part.__dict__["goals"] = [goal[samples] for goal in self.goals]
        return part


def sample_means(problem: Problem) -> Tensor:
    """The mean clean sample of each sample's condition, (B, *E)."""
    return problem.mean.to(problem.noise)[problem.group]
