"""The search problem that every strategy solves, and the teacher's run in it.

Legend: B samples of this rank, N+1 grid nodes from the noise (node 0) to the data
(node N), K steps, G conditions, *E event dims.
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
    """Sums and gathers over ranks; this one serves a single process.

    All ranks must make the same calls in the same order.
    """

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the element-wise sum over ranks."""
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of all ranks, one rank after the other.

        The ranks' tensors (n, ...) may have different numbers of rows n.
        """
        return tensor


@dataclass(eq=False)
class Teacher:
    """The many-step run that students are compared with.

    The problem's solver takes it over the whole grid, from node to node, once. Nothing is
    computed before it is first used. The arguments are those of `Problem`.
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
        """The network's outputs at the first node, (B, *E) each, which students reuse.

        Raises ValueError where they have another shape than the noise, or where the
        network changes its input.
        """
        with torch.no_grad():
            x = self.noise.clone()
            outputs = self.velocity.outputs(x, self.grid[0].expand(len(x)))
        for output in outputs:
            if output.shape != x.shape or not output.is_floating_point():
                raise ValueError(
                    "the velocity must return floating-point numbers of its input's shape "
                    f"{tuple(x.shape)}, got {output.dtype} {tuple(output.shape)}"
                )
        if not torch.equal(x, self.noise):
            raise ValueError("the velocity changes its input in place; let it return a new tensor")
        return outputs

    @cached_property
    def states(self) -> Tensor:
        """The states at all nodes, (N+1, B, *E).

        Raises ValueError where the network returns NaN or infinity.
        """
        first = self.velocity.combine(self.first_outputs)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return first if x is self.noise else self.velocity(x, t)

        shape = (len(self.grid), *self.noise.shape)
        with torch.no_grad():
            states = torch.empty(shape, dtype=self.noise.dtype, device=self.noise.device)
            for node, state in enumerate(walk(self.solver, velocity, self.noise, self.grid)):
                states[node] = state.x
        if not bool(states.isfinite().all()):
            node = int((~states.flatten(1).isfinite().all(dim=1)).nonzero()[0])
            raise ValueError(
                f"the teacher's state is NaN or infinite from node {node} "
                f"(t = {float(self.grid[node]):.4f}) on; check the model's dtype and the noise "
                "schedule's first time"
            )
        return states

    @cached_property
    def mean(self) -> Tensor:
        """The mean clean sample of each condition at pure noise, (G, *E) float32.

        It is the mean over all ranks of the first call's predictions, x0 = x - t v. A
        condition without any search sample gets the mean over all of them. It is 0 for a
        velocity without means. Every rank must ask for it at the same point.
        """
        if not self.velocity.has_means:
            return self.noise.new_zeros(self.num_groups, *self.noise.shape[1:]).float()

        # Predictions of this rank.
        v = self.velocity.combine(self.first_outputs)
        x0 = (self.noise - self.grid[0].to(self.noise) * v).double()

        # Sums over the samples of each condition, and over ranks.
        member = torch.nn.functional.one_hot(self.group, self.num_groups).to(x0)  # (B, G)
        total = self.collective.sum(torch.einsum("bg,b...->g...", member, x0))
        count = self.collective.sum(member.sum(0)).reshape(-1, *[1] * (x0.ndim - 1))
        overall = total.sum(0, keepdim=True) / count.sum()
        return torch.where(count > 0, total / count.clamp(min=1), overall).float()

    @cached_property
    def targets(self) -> list[Tensor]:
        """The distance's features (B, ...) of the state at every node."""
        times = self.grid[:, None].expand(-1, len(self.noise))
        targets = []
        with torch.no_grad():
            for x, t in zip(self.states, times, strict=True):
                targets.append(self.distance.features(x, t, self.velocity))
        return targets

    @cached_property
    def target_norms(self) -> Tensor:
        """The squared lengths of the targets, (N+1, B) float64."""
        return torch.stack([target.flatten(1).double().square().sum(1) for target in self.targets])

    @property
    def sample_mean(self) -> Tensor:
        """The mean clean sample of each sample's condition, (B, *E)."""
        return self.mean.to(self.noise)[self.group]

    def run(self) -> None:
        """Make all network calls now."""
        _ = self.states, self.targets

    def subset(self, samples: Tensor | slice, velocity: BoundVelocity) -> Teacher:
        """Return the same run for some of the samples; no network call is repeated.

        Args:
            samples: (b,) positions, or a slice of them.
            velocity: that of these samples.
        """
        noise, group = self.noise[samples], self.group[samples]
        part = replace(self, velocity=velocity, noise=noise, group=group)
        part.first_outputs = tuple(output[samples] for output in self.first_outputs)
        part.states = self.states[:, samples]
        part.mean = self.mean
        # Targets that cost no network call are computed again when they are needed.
        if self.distance.calls:
            part.targets = [target[samples] for target in self.targets]
        return part


@dataclass(frozen=True, eq=False, init=False)
class Problem:
    """A search set, the teacher to follow on it, and the distance that measures how closely.

    The default problem is a standard normal distribution in two dimensions, whose
    velocity is exact.

    Args:
        velocity: a `VelocityFn`. A plain function is wrapped as a `BoundVelocity` that
            cannot be cut to some of its samples.
        noise: (B, *E) state of the teacher at grid[0], float32 or float64.
        grid: (N+1,) strictly decreasing canonical times, the last one 0.
        solver: the solver of the teacher and of its students; its calibration is left out.
        distance: what the search minimises.
        collective: how ranks combine their tensors.
        samples: (B,) global index of each noise; 0 to B-1 by default.
        group: (B,) condition of each noise, from 0 to num_groups - 1; 0 by default.
        num_groups: the number of conditions, G.

    Attributes:
        teacher: its run, made from the other fields.

    Raises:
        ValueError: the noise is empty, not finite or of another dtype, or a field does
            not have the shape and range that are given above.
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
        # Defaults.
        if noise is None:
            noise = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
        if grid is None:
            grid = FlowSchedule().nodes(100)
        StepSchedule(grid)  # the same rules: finite, decreasing, closed by 0
        _check_noise(noise)
        device, count = noise.device, len(noise)
        _check_indices(count, samples, group, num_groups)
        if samples is None:
            samples = torch.arange(count)
        if group is None:
            group = torch.zeros(count, dtype=torch.long)

        # Fields.
        self._set(
            velocity=BoundVelocity.of(velocity),
            noise=noise,
            grid=grid.to(device, torch.float64),
            solver=replace(solver, calibration=None),
            distance=distance,
            collective=collective,
            samples=samples.to(device),
            group=group.to(device),
            num_groups=num_groups,
        )
        teacher = Teacher(
            self.velocity,
            self.noise,
            self.grid,
            self.solver,
            self.distance,
            self.collective,
            self.group,
            self.num_groups,
        )
        self._set(teacher=teacher)

    def _set(self, **values: object) -> Problem:
        """Set fields of this frozen object, and return it."""
        for name, value in values.items():
            object.__setattr__(self, name, value)
        return self

    @property
    def num_nodes(self) -> int:
        """N, the number of nodes that a step can start from, and of the teacher's steps.

        Node N, the data, is not counted.
        """
        return len(self.grid) - 1

    def cost(self, x: Tensor, nodes: Tensor) -> Tensor:
        """Return the distance (M,) of states to the teacher's.

        Args:
            x: (M, *E) states, M a multiple of B: c copies of all samples, one after the
                other.
            nodes: (b,) node of each sample, b = B or 1.
        """
        count = len(self.noise)
        copies = len(x) // count
        t = self.grid[nodes].expand(count).repeat(copies)

        # Features of the teacher's states, (B, ...).
        targets = self.teacher.targets
        if len(nodes) == 1:
            target = targets[int(nodes)]
        else:
            rows = [targets[node][sample] for sample, node in enumerate(nodes.tolist())]
            target = torch.stack(rows)

        features = self.distance.features(x, t, self.velocity)
        return self.distance.between(features, target.repeat(copies, *[1] * (target.ndim - 1)))

    def at_most(self, order: int | None) -> Problem:
        """Return the problem with the same teacher, for students of at most this order."""
        if order is None or not isinstance(self.solver, LinearMultistep):
            return self
        if order >= self.solver.order:
            return self
        return replace(self, solver=replace(self.solver, order=order))._set(teacher=self.teacher)

    def subset(self, samples: Tensor) -> Problem:
        """Return the problem for some of this rank's samples, without other ranks.

        It keeps what the teacher has computed: its states for these samples, and its mean
        over all samples of all ranks.

        Args:
            samples: (b,) positions.

        Raises:
            TypeError: the velocity cannot be cut to these samples.
        """
        # A velocity that cannot be cut may be kept whole.
        velocity = self.velocity
        if len(samples) < len(self.noise) or velocity.divisible:
            velocity = velocity.subset(samples)

        # Neighbours need no copies.
        rows: Tensor | slice = samples
        if bool((samples.diff() == 1).all()):
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


def _check_noise(noise: Tensor) -> None:
    if len(noise) == 0:
        raise ValueError(
            "a search needs at least one noise on every rank; use fewer ranks or more "
            "search samples"
        )
    if not bool(noise.isfinite().all()):
        raise ValueError("the noise holds NaN or infinity")
    if noise.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the noise must be float32 or float64, got {noise.dtype}")


def _check_indices(
    count: int, samples: Tensor | None, group: Tensor | None, num_groups: int
) -> None:
    for name, index in (("samples", samples), ("group", group)):
        if index is not None and index.shape != (count,):
            raise ValueError(
                f"{name} must have one entry for each of {count} noises, got {tuple(index.shape)}"
            )
    if group is not None and not bool(((group >= 0) & (group < num_groups)).all()):
        raise ValueError(
            f"group must be from 0 to num_groups - 1 = {num_groups - 1}, got {int(group.max())}"
        )
