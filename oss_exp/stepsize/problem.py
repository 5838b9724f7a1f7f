"""The search problem that every strategy solves: velocity, noises, grid, solver, distance, and the teacher's run.

Legend: B samples of this rank, N+1 grid nodes from the noise (node 0) to the data (node N), K steps, G conditions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from oss_exp.distances import Distance, XtMSE
from oss_exp.noise import FlowSchedule
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, LinearMultistep, Solver, walk
from oss_exp.velocity import BoundVelocity, VelocityFn


class Collective:
    """The way in which ranks agree; this one is for a single process. All ranks make the same calls in one order."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the element-wise sum over ranks."""
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Return all ranks' rows, one rank after the other; (b, ...) with any b on each rank."""
        return tensor


@dataclass(eq=False)
class Teacher:
    """The many-step run that students are compared with. Nothing is computed before it is first asked for.

    It runs the problem's solver over the whole grid once; the arguments are those of `Problem`.
    """

    velocity: BoundVelocity
    noise: Tensor
    grid: Tensor
    solver: Solver
    distance: Distance
    collective: Collective
    group: Tensor
    num_groups: int

    @cached_property
    def first_outputs(self) -> tuple[Tensor, ...]:
        """The network's outputs at the first node, (B, *E) each, for reuse.

        Raises ValueError where they are not of the noise's shape, or where the network changes its input.
        """
        with torch.no_grad():
            x = self.noise.clone()
            outputs = self.velocity.outputs(x, self.grid[0].expand(len(x)))
        for output in outputs:
            if output.shape != x.shape or not output.is_floating_point():
                raise ValueError(
                    f"the velocity must return floating-point numbers of its input's shape {tuple(x.shape)}, got "
                    f"{output.dtype} {tuple(output.shape)}"
                )
        if not torch.equal(x, self.noise):
            raise ValueError("the velocity changes its input in place; let it return a new tensor")
        return outputs

    @cached_property
    def states(self) -> Tensor:
        """The states at all nodes, (N+1, B, *E). Raises ValueError where the network returns NaN or infinity."""
        first = self.velocity.combine(self.first_outputs)

        def f(x: Tensor, t: Tensor) -> Tensor:
            return first if x is self.noise else self.velocity(x, t)

        with torch.no_grad():
            states = torch.empty(
                (len(self.grid), *self.noise.shape),
                dtype=self.noise.dtype,
                device=self.noise.device,
            )
            for node, state in enumerate(walk(self.solver, f, self.noise, self.grid)):
                states[node] = state.x
        if not bool(states.isfinite().all()):
            node = int((~states.flatten(1).isfinite().all(dim=1)).nonzero()[0])
            raise ValueError(
                f"the teacher's state is NaN or infinite from node {node} (t = {float(self.grid[node]):.4f}) on; "
                "check the model's dtype and the noise schedule's first time"
            )
        return states

    @cached_property
    def mean(self) -> Tensor:
        """The (G, *E) float32 mean clean sample at pure noise, from the first call: x0 = x - t v, over all ranks.

        A condition that no search sample has gets the mean over all of them. Every rank asks for it at the same point.
        """
        v = self.velocity.combine(self.first_outputs)
        x0 = (self.noise - self.grid[0].to(self.noise) * v).double()
        member = torch.nn.functional.one_hot(self.group, self.num_groups).to(x0)  # (B, G)
        total = self.collective.sum(torch.einsum("bg,b...->g...", member, x0))
        count = self.collective.sum(member.sum(0)).reshape(-1, *[1] * (x0.ndim - 1))
        overall = total.sum(0, keepdim=True) / count.sum()
        return torch.where(count > 0, total / count.clamp(min=1), overall).float()

    @cached_property
    def targets(self) -> list[Tensor]:
        """The distance's features (B, ...) of the state at every node."""
        with torch.no_grad():
            times = self.grid[:, None].expand(-1, len(self.noise))
            return [
                self.distance.features(x, t, self.velocity)
                for x, t in zip(self.states, times, strict=True)
            ]

    @cached_property
    def target_norms(self) -> Tensor:
        """The squared length of the targets, (N+1, B) float64."""
        return torch.stack([target.flatten(1).double().square().sum(1) for target in self.targets])

    @property
    def sample_mean(self) -> Tensor:
        """The mean clean sample of each sample's condition, (B, *E)."""
        return self.mean.to(self.noise)[self.group]

    def run(self) -> None:
        """Make all network calls now."""
        _ = self.states, self.targets

    def subset(self, samples: Tensor | slice, velocity: BoundVelocity) -> Teacher:
        """Return the same run for some of the samples, whose velocity is given. Nothing is computed anew."""
        part = replace(
            self, velocity=velocity, noise=self.noise[samples], group=self.group[samples]
        )
        part.first_outputs = tuple(output[samples] for output in self.first_outputs)
        part.states = self.states[:, samples]
        part.mean = self.mean
        if self.distance.calls:  # else they are as easily made anew
            part.targets = [target[samples] for target in self.targets]
        return part


@dataclass(frozen=True, eq=False, init=False)
class Problem:
    """One search set: a bound network, noises, the teacher's grid, the student's solver and the distance.

    The default problem is a standard normal law in two dimensions, whose velocity is exact.

    velocity: a `VelocityFn`; a plain function is wrapped as a `BoundVelocity` that cannot be divided.
    noise:    (B, *E) the teacher's state at grid[0], float32 or wider.
    grid:     (N+1,) strictly decreasing canonical times, the last one 0.
    samples:  (B,) global index of each noise (default 0 .. B-1), group: (B,) its condition in 0 .. num_groups-1.
    teacher:  its run, made from the other fields.
    Raises ValueError where the noise is empty, not finite or too narrow, or the grid is none.
    """

    velocity: BoundVelocity
    noise: Tensor
    grid: Tensor
    solver: Solver
    distance: Distance
    collective: Collective
    samples: Tensor
    group: Tensor
    num_groups: int
    teacher: Teacher = field(init=False)

    def __init__(
        self,
        velocity: VelocityFn = BoundVelocity(),
        noise: Tensor | None = None,
        grid: Tensor | None = None,
        solver: Solver = Euler(),
        distance: Distance = XtMSE(),
        collective: Collective = Collective(),
        samples: Tensor | None = None,
        group: Tensor | None = None,
        num_groups: int = 1,
    ):
        noise = (
            torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
            if noise is None
            else noise
        )
        grid = FlowSchedule().nodes(100) if grid is None else grid
        StepSchedule(grid)  # the same rules: finite, decreasing, closed by 0
        if len(noise) == 0:
            raise ValueError(
                "a search needs at least one noise on every rank; use fewer ranks or more search samples"
            )
        if not bool(noise.isfinite().all()):
            raise ValueError("the noise holds NaN or infinity")
        if noise.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the noise must be float32 or float64, got {noise.dtype}")

        device, count = noise.device, len(noise)
        for name, index in (("samples", samples), ("group", group)):
            if index is not None and index.shape != (count,):
                raise ValueError(
                    f"{name} must have one entry for each of {count} noises, got {tuple(index.shape)}"
                )
        if group is not None and not bool(((group >= 0) & (group < num_groups)).all()):
            raise ValueError(
                f"group must be from 0 to num_groups - 1 = {num_groups - 1}, got {int(group.max())}"
            )
        samples = torch.arange(count) if samples is None else samples
        group = torch.zeros(count, dtype=torch.long) if group is None else group
        self._set(
            velocity=BoundVelocity.of(velocity),
            noise=noise,
            grid=grid.to(device, torch.float64),
            solver=solver,
            distance=distance,
            collective=collective,
            samples=samples.to(device),
            group=group.to(device),
            num_groups=num_groups,
        )
        parts = self.velocity, self.noise, self.grid, self.solver, self.distance, self.collective
        self._set(teacher=Teacher(*parts, self.group, self.num_groups))

    def _set(self, **values: object) -> Problem:
        for name, value in values.items():
            object.__setattr__(self, name, value)
        return self

    @property
    def num_nodes(self) -> int:
        """N, the number of teacher steps."""
        return len(self.grid) - 1

    def cost(self, x: Tensor, nodes: Tensor) -> Tensor:
        """Return the distance (M,) to the teacher of x (M, *E), M = c B, at nodes (b,) of their samples, b = B or 1."""
        copies, count = len(x) // len(self.noise), len(self.noise)
        t = self.grid[nodes].expand(count).repeat(copies)
        targets = self.teacher.targets
        if len(nodes) == 1:
            target = targets[int(nodes)]
        else:
            target = torch.stack(
                [targets[node][sample] for sample, node in enumerate(nodes.tolist())]
            )
        features = self.distance.features(x, t, self.velocity)
        return self.distance.between(features, target.repeat(copies, *[1] * (target.ndim - 1)))

    def at_most(self, order: int | None) -> Problem:
        """Return the same problem and teacher for students whose steps are of this order or less."""
        if (
            order is None
            or not isinstance(self.solver, LinearMultistep)
            or order >= self.solver.order
        ):
            return self
        return replace(self, solver=replace(self.solver, order=order))._set(teacher=self.teacher)

    def subset(self, samples: Tensor) -> Problem:
        """Return the same problem for some of this rank's samples, (b,) positions, with no other rank to agree with.

        The teacher, its targets and the mean are those of all. A velocity that cannot be divided must be kept whole:
        else TypeError.
        """
        whole = len(samples) == len(self.noise)
        velocity = (
            self.velocity
            if whole and not self.velocity.divisible
            else self.velocity.subset(samples)
        )
        rows: Tensor | slice = samples
        if bool((samples.diff() == 1).all()):  # neighbours need no copies
            rows = slice(int(samples[0]), int(samples[-1]) + 1)
        part = replace(
            self,
            velocity=velocity,
            collective=Collective(),
            noise=self.noise[rows],
            samples=self.samples[rows],
            group=self.group[rows],
        )
        return part._set(teacher=self.teacher.subset(rows, velocity))
