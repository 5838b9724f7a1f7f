"""Optimal Stepsize (OSS, arXiv 2503.21774): the schedule whose states stay closest to the teacher's, by search.

`OSS` gives every sample its own schedule (the paper's OSS), `OSSAve` the node-wise median or mean of those (its
OSS-ave), `OSSShared` chooses one schedule for all samples inside the recursion (ours). All three can start freely, at
the teacher's first node or by an analytic jump, can search coarse to fine, and can refine what they found.
Legend: B samples, N+1 nodes counted from the noise, K steps, k one budget; paths are (k, b), b = B or 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from oss_exp.solvers import BoundVelocity
from oss_exp.steps import Start, StepSchedule
from oss_exp.stepsize.base import Problem, check_num_steps
from oss_exp.stepsize.recursion import Objective, PerSample, Shared, recurse
from oss_exp.stepsize.refine import refine


@dataclass(frozen=True)
class Band:
    """Coarse to fine: search every `stride`-th node first, then all nodes within `width` of that path.

    Where the fine path touches the edge of its band the band is laid around it anew, at most `MAX_SHIFTS` times.
    """

    stride: int
    width: int

    MAX_SHIFTS: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.stride < 2 or self.width < 1:
            raise ValueError(f"band needs stride >= 2 and width >= 1, got stride={self.stride}, width={self.width}")

    def check(self, num_nodes: int, budgets: Sequence[int]) -> None:
        if len(range(0, num_nodes, self.stride)) < budgets[-1]:
            raise ValueError(
                f"band.stride={self.stride} leaves {len(range(0, num_nodes, self.stride))} pilot nodes of "
                f"{num_nodes}, too few for {budgets[-1]} steps; use a stride of at most {num_nodes // budgets[-1]}, "
                "or band=null"
            )


@dataclass(frozen=True)
class _Search:
    """What all OSS strategies share: where a student may start, the band (or its fields as a dict), and refinement."""

    per_sample: ClassVar[bool] = False
    baseline: ClassVar[bool] = False

    start: Start
    band: Band | None
    refine: bool

    def __post_init__(self) -> None:
        if self.start not in get_args(Start):
            raise ValueError(f"start must be one of {', '.join(get_args(Start))}, got {self.start!r}")
        if isinstance(self.band, Mapping):
            if set(self.band) != {"stride", "width"}:
                raise ValueError(f"band must be null or {{stride: ..., width: ...}}, got {dict(self.band)}")
            object.__setattr__(self, "band", Band(**self.band))

    def paths(self, problem: Problem, budgets: Sequence[int], objective: Objective) -> dict[int, Tensor]:
        """{k: (k, b) nodes} of the recursion."""
        if self.band is None:
            return recurse(problem, self._layers(problem, budgets, 1), budgets, self.start, objective).paths
        self.band.check(problem.num_nodes, budgets)
        pilot = recurse(problem, self._layers(problem, budgets, self.band.stride), budgets, self.start, objective)
        return {k: self._in_band(problem, pilot.paths[k], objective, Band.MAX_SHIFTS) for k in budgets}

    def _layers(self, problem: Problem, budgets: Sequence[int], stride: int) -> list[Tensor]:
        return layers(problem.num_nodes, budgets, self.start, stride, problem.grid.device)

    def _in_band(self, problem: Problem, path: Tensor, objective: Objective, shifts: int) -> Tensor:
        """The best path (k, b) within the band around `path`, which follows it where it touches the edge."""
        k, end = len(path), problem.num_nodes
        windows, touched = [], torch.zeros(path.shape[1], dtype=torch.bool, device=path.device)
        bounds = []
        for r in range(k):
            lowest, highest = (0, 0) if r == 0 and self.start == "pinned" else (r, end - k + r)
            size = min(2 * self.band.width + 1, highest - lowest + 1)
            first = (path[r] - self.band.width).clamp(lowest, highest - size + 1)
            windows.append(first + torch.arange(size, device=path.device)[:, None])
            bounds.append((lowest, highest))
        found = recurse(problem, windows, [k], self.start, objective).paths[k]
        for r, (window, (lowest, highest)) in enumerate(zip(windows, bounds, strict=True)):
            touched |= (found[r] == window[0]) & (found[r] > lowest) | (found[r] == window[-1]) & (found[r] < highest)
        if shifts == 0 or not bool(touched.any()):
            return found
        if path.shape[1] > 1 and isinstance(problem.velocity, BoundVelocity):  # only the samples that need it
            rows = touched.nonzero()[:, 0]
            found[:, rows] = self._in_band(problem.subset(rows), found[:, rows], objective, shifts - 1)
            return found
        return torch.where(touched, self._in_band(problem, found, objective, shifts - 1), found)

    def network_calls(self, num_nodes: int, num_steps: Sequence[int]) -> int:
        """Calls per sample of the recursion (the band not moved) with a multistep solver, and a typical refinement."""
        budgets = check_num_steps(num_steps, num_nodes)
        stride = 1 if self.band is None else self.band.stride
        calls = sum(len(layer) for layer in layers(num_nodes, budgets, self.start, stride, "cpu")) - 1
        if self.band is not None:
            calls += sum(k * min(2 * self.band.width + 1, num_nodes - k + 1) for k in budgets)
        if self.refine:
            calls += sum(8 * k * (k + 2) for k in budgets)  # two sweeps at each of four sizes, half a run a try
        return calls


def layers(num_nodes: int, budgets: Sequence[int], start: Start, stride: int, device) -> list[Tensor]:
    """max(budgets) x (W, 1): every stride-th node from which the data can be reached in exactly the calls left."""
    nodes = torch.arange(0, num_nodes, stride, device=device)[:, None]
    result = []
    for r in range(budgets[-1]):
        to_go = min(k for k in budgets if k > r) - r  # calls left, this one included, for the nearest budget
        result.append(nodes[r : len(nodes) - to_go + 1] if r or start != "pinned" else nodes[:1])
    return result


@dataclass(frozen=True)
class OSS(_Search):
    """One schedule per sample (paper, Alg. 1, exactly k steps): how good a schedule can be if it may know the noise.

    chunk: samples searched at a time; it bounds the memory and changes nothing else. With a plain VelocityFn, which
    cannot be cut to some samples, all are searched at once.
    """

    per_sample: ClassVar[bool] = True

    chunk: int

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        paths = self.sample_paths(problem, check_num_steps(num_steps, problem.num_nodes))
        samples = problem.collective.gather(problem.samples)
        order = samples.argsort()
        plans = {}
        for k, path in paths.items():
            nodes = problem.collective.gather(path.T.contiguous())[order]
            plans[k] = StepSchedule(
                problem.grid[_closed(nodes, problem)].cpu(),
                self.start,
                float(problem.grid[0]),
                mean=problem.mean.cpu() if self.start == "analytic" else None,
                samples=tuple(samples[order].tolist()),
            )
        return plans

    def sample_paths(self, problem: Problem, budgets: Sequence[int]) -> dict[int, Tensor]:
        """{k: (k, B)} for the samples of this rank."""
        count = len(problem.noise)
        chunk = self.chunk if isinstance(problem.velocity, BoundVelocity) else count
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 sample, got {chunk}")
        parts = []
        for rows in torch.arange(count, device=problem.noise.device).split(chunk):
            part = problem.subset(rows)
            paths = self.paths(part, budgets, PerSample())
            if self.refine:
                paths = {k: refine(part, path, self.start, PerSample()) for k, path in paths.items()}
            parts.append({k: path.expand(-1, len(rows)) for k, path in paths.items()})
        return {k: torch.cat([part[k] for part in parts], dim=1) for k in budgets}


@dataclass(frozen=True)
class OSSAve(_Search):
    """The paper's OSS-ave: node-wise agreement of the per-sample schedules, made strictly monotone again.

    aggregate `median` rounds halves towards the data, as the released code does for an even number of samples.
    `refine`, off in the paper, moves the agreed nodes over the batch's mean error.
    """

    aggregate: Literal["median", "mean"]
    chunk: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregate not in ("median", "mean"):
            raise ValueError(f"aggregate must be median or mean, got {self.aggregate!r}")

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        budgets = check_num_steps(num_steps, problem.num_nodes)
        plans = {}
        for k, path in OSS(self.start, self.band, False, self.chunk).sample_paths(problem, budgets).items():
            nodes = problem.collective.gather(path.T.contiguous()).double()
            agreed = nodes.quantile(0.5, dim=0) if self.aggregate == "median" else nodes.mean(0)
            agreed = agreed.ceil() if self.aggregate == "median" else agreed.round()
            agreed = strictly_monotone(agreed.long(), problem.num_nodes)[:, None]
            if self.refine:
                agreed = refine(problem, agreed, self.start, Shared("mean"))
            plans[k] = _shared_schedule(problem, agreed, self.start)
        return plans


@dataclass(frozen=True)
class OSSShared(_Search):
    """One schedule for all samples, chosen inside the recursion by the batch's mean cost or mean log cost (ours)."""

    objective: Literal["mean", "log_mean"]

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        objective = Shared(self.objective)
        plans = {}
        for k, path in self.paths(problem, check_num_steps(num_steps, problem.num_nodes), objective).items():
            if self.refine:
                path = refine(problem, path, self.start, objective)
            plans[k] = _shared_schedule(problem, path, self.start)
        return plans


def strictly_monotone(nodes: Tensor, num_nodes: int) -> Tensor:
    """nodes (k,) ascending with repeats -> strictly ascending within 0 .. N-1, each moved as little as may be."""
    steps = torch.arange(len(nodes), device=nodes.device)
    risen = (nodes - steps).cummax(0).values + steps
    return torch.minimum(risen, num_nodes - len(nodes) + steps)


def _closed(nodes: Tensor, problem: Problem) -> Tensor:
    """(..., k) -> (..., k+1), node N appended."""
    return torch.nn.functional.pad(nodes, (0, 1), value=problem.num_nodes)


def _shared_schedule(problem: Problem, path: Tensor, start: Start) -> StepSchedule:
    times = problem.grid[_closed(path[:, 0], problem)].cpu()
    mean = problem.mean.cpu() if start == "analytic" else None
    return StepSchedule(times, start, float(problem.grid[0]), mean=mean)
