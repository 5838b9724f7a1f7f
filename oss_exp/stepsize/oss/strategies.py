"""Optimal Stepsize (OSS, arXiv 2503.21774): the schedule whose states stay closest to the teacher's, by search.

`OSS` gives every sample its own schedule (the paper's OSS), `OSSAve` the node-wise median or mean of those (its
OSS-ave), `OSSShared` chooses one schedule for all samples inside the recursion (ours). All three can start freely, at
the teacher's first node or by an analytic jump, can search coarse to fine, and can refine what they found.
Legend: B samples, N+1 nodes counted from the noise, K steps, k one budget; paths are (k, b), b = B or 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from oss_exp.checks import require_choice, require_range
from oss_exp.schedule import FittedSteps, SolverSteps, StartKind, Steps, StepSchedule
from oss_exp.solvers.base import LinearMultistep
from oss_exp.stepsize.base import check_num_steps, student_start
from oss_exp.stepsize.oss.band import Band, layers, stretch, strictly_monotone
from oss_exp.stepsize.oss.edges import Fit
from oss_exp.stepsize.oss.objectives import Mean, Objective, PerSample, Shared
from oss_exp.stepsize.oss.recursion import Path, recurse
from oss_exp.stepsize.oss.refine import refine
from oss_exp.stepsize.problem import Problem

Aggregate = Literal["median", "mean"]


@dataclass(frozen=True)
class _Search:
    """What all OSS strategies share: where a student may start, the band, and refinement.

    max_order: of a multistep solver's steps; None: the solver's own.
    """

    per_sample: ClassVar[bool] = False
    baseline: ClassVar[bool] = False

    start: StartKind = "free"
    band: Band | None = None
    refine: bool = False
    max_order: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        require_range(at_least=1, max_order=self.max_order)
        require_choice(get_args(StartKind), start=self.start)

    def paths(
        self, problem: Problem, budgets: Sequence[int], objective: Objective, fit: Fit | None = None
    ) -> dict[int, Path]:
        """The best path of the recursion for every budget, refined if wanted."""
        problem = problem.at_most(self.max_order)
        if self.band is None:
            found = recurse(problem, self._layers(problem, budgets, 1), budgets, self.start, objective, fit).paths
        else:
            found = self._coarse_to_fine(problem, budgets, objective, fit)
        if self.refine:
            refined = {k: refine(problem, path, self.start, objective, fit) for k, path in found.items()}
            found = {k: replace(path, costs=found[k].costs) for k, path in refined.items()}
        return found

    def _coarse_to_fine(
        self, problem: Problem, budgets: Sequence[int], objective: Objective, fit: Fit | None
    ) -> dict[int, Path]:
        levels = {k: self.band.levels(problem.num_nodes, k) for k in budgets}
        fewer = sorted({steps for (_, steps), *_ in levels.values()})
        layers = self._layers(problem, fewer, self.band.stride)
        pilots = recurse(problem, layers, fewer, self.start, objective, fit).paths
        found = {}
        for k, ((_, pilot), *finer) in levels.items():
            path = pilots[pilot]
            for stride, steps in finer:
                nodes = stretch(path.nodes, steps, problem.num_nodes)
                path = self._in_band(problem, nodes, stride, objective, fit, self.band.shifts)
            found[k] = path
        return found

    def _layers(self, problem: Problem, budgets: Sequence[int], stride: int) -> list[Tensor]:
        return layers(problem.num_nodes, budgets, self.start, stride, problem.grid.device)

    def _in_band(
        self, problem: Problem, nodes: Tensor, stride: int, objective: Objective, fit: Fit | None, shifts: int
    ) -> Path:
        """The best path of every stride-th node in the band around `nodes` (k, b)."""
        k, count = len(nodes), len(range(0, problem.num_nodes, stride))
        windows = []
        touched = torch.zeros(nodes.shape[1], dtype=torch.bool, device=nodes.device)
        limits = [(0, 0) if r == 0 and self.start == "pinned" else (r, count - k + r) for r in range(k)]
        for position, (lowest, highest) in zip(nodes // stride, limits, strict=True):
            width = self.band.reach(stride)
            size = min(2 * width + 1, highest - lowest + 1)
            first = (position - width).clamp(lowest, highest - size + 1)
            windows.append((first + torch.arange(size, device=nodes.device)[:, None]) * stride)
        found = recurse(problem, windows, [k], self.start, objective, fit).paths[k]
        for node, window, (lowest, highest) in zip(found.nodes, windows, limits, strict=True):
            touched |= (node == window[0]) & (node > lowest * stride) | (node == window[-1]) & (node < highest * stride)
        if shifts == 0 or not bool(touched.any()):
            return found
        if fit is not None or found.nodes.shape[1] == 1:
            return self._in_band(problem, found.nodes, stride, objective, fit, shifts - 1)
        # Only the samples that need it, where the velocity can be cut to them.
        rows = torch.ones_like(touched).nonzero()[:, 0]
        if problem.velocity.divisible:
            rows = touched.nonzero()[:, 0]
            problem = problem.subset(rows)
        again = self._in_band(problem, found.nodes[:, rows], stride, objective, fit, shifts - 1)
        for old, new in ((found.nodes, again.nodes), (found.orders, again.orders), (found.costs, again.costs)):
            old[:, rows] = torch.where(touched[rows], new, old[:, rows])
        return found

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        """Calls per sample of the recursion (the band not moved) and a typical refinement."""
        budgets = check_num_steps(num_steps, num_nodes)
        stride, steps, finer = 1, budgets, []
        if self.band is not None:
            levels = [self.band.levels(num_nodes, k) for k in budgets]
            stride, steps = self.band.stride, sorted({pilot for (_, pilot), *_ in levels})
            finer = [level for _, *rest in levels for level in rest]
        sizes = [len(layer) for layer in layers(num_nodes, steps, self.start, stride, "cpu")]
        calls = sum(sizes) - 1 + edge_calls * sum(a * b // 2 for a, b in zip(sizes, [*sizes[1:], 0], strict=True))
        for stride, k in finer:
            width = 2 * self.band.reach(stride) + 1
            calls += k * width * (1 + edge_calls * width)
        if self.refine:
            calls += sum(8 * k * (k + 2) for k in budgets)  # two sweeps at each of four sizes, half a run a try
        return calls


@dataclass(frozen=True)
class OSS(_Search):
    """One schedule per sample (paper, Alg. 1, exactly k steps): how good a schedule can be if it may know the noise.

    chunk: samples searched at a time; it bounds the memory and changes nothing else. With a plain VelocityFn, which
    cannot be cut to some samples, all are searched at once.
    """

    per_sample: ClassVar[bool] = True

    chunk: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(at_least=1, chunk=self.chunk)

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        paths = self.sample_paths(problem, check_num_steps(num_steps, problem.num_nodes))
        samples = problem.collective.gather(problem.samples)
        order = samples.argsort()
        in_order = {
            k: replace(path, nodes=path.nodes[:, order], orders=path.orders[:, order]) for k, path in paths.items()
        }
        return {k: _schedule(problem, path, self.start, samples[order].tolist()) for k, path in in_order.items()}

    def sample_paths(self, problem: Problem, budgets: Sequence[int]) -> dict[int, Path]:
        """Nodes, orders and costs (k, B) of all ranks' samples, one rank after the other."""
        count = len(problem.noise)
        chunk = self.chunk if problem.velocity.divisible else count
        parts = []
        for rows in torch.arange(count, device=problem.noise.device).split(chunk):
            parts.append(self.paths(problem.subset(rows), budgets, PerSample()))
        gathered = {}
        for k in budgets:
            tables = {name: [getattr(part[k], name) for part in parts] for name in ("nodes", "orders", "costs")}
            whole = {name: torch.cat(table, dim=1).T.contiguous() for name, table in tables.items()}
            gathered[k] = Path(**{name: problem.collective.gather(table).T for name, table in whole.items()})
        return gathered


@dataclass(frozen=True)
class OSSAve(_Search):
    """The paper's OSS-ave: node-wise agreement of the per-sample schedules, made strictly monotone again.

    aggregate `median` rounds halves towards the data, as the released code does for an even number of samples.
    `refine`, off in the paper, moves the agreed nodes over the batch's mean error.
    """

    aggregate: Aggregate = "median"
    chunk: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(get_args(Aggregate), aggregate=self.aggregate)
        require_range(at_least=1, chunk=self.chunk)

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        budgets = check_num_steps(num_steps, problem.num_nodes)
        alone = OSS(self.start, self.band, False, self.chunk, max_order=self.max_order)
        plans = {}
        for k, path in alone.sample_paths(problem, budgets).items():
            nodes = strictly_monotone(self._agree(path.nodes), problem.num_nodes)
            agreed = Path(nodes[:, None], self._agree(path.orders)[:, None])
            if self.refine:
                agreed = refine(problem.at_most(self.max_order), agreed, self.start, Shared("mean"))
            plans[k] = _schedule(problem, replace(agreed, costs=path.costs), self.start)
        return plans

    def _agree(self, values: Tensor) -> Tensor:
        """(k, B) -> (k,)"""
        if self.aggregate == "median":
            return values.double().quantile(0.5, dim=1).ceil().long()
        return values.double().mean(1).round().long()


@dataclass(frozen=True)
class OSSShared(_Search):
    """One schedule for all samples, chosen inside the recursion by the batch's mean cost or mean log cost (ours)."""

    start: StartKind = "analytic"
    refine: bool = True
    objective: Mean = "log_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        Shared(self.objective)  # its checks

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        budgets = check_num_steps(num_steps, problem.num_nodes)
        paths = self.paths(problem, budgets, Shared(self.objective))
        return {k: _schedule(problem, path, self.start) for k, path in paths.items()}


@dataclass(frozen=True)
class OSSFit(_Search):
    """`OSSShared` whose steps have fitted coefficients instead of a solver's (ours); see `edges.Fit`."""

    start: StartKind = "analytic"
    refine: bool = True
    objective: Mean = "log_mean"
    history: int = 3
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        Shared(self.objective)  # its checks
        Fit(self.history, self.ridge)  # its checks

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        """As for the others, but every try of a refinement is a whole run."""
        calls = super().network_calls(num_nodes, num_steps, edge_calls)
        return calls + (sum(8 * k * (k + 2) for k in set(num_steps)) if self.refine else 0)

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        if not problem.distance.quadratic:
            raise ValueError(f"oss_fit solves least squares on the states: {problem.distance} is not one; use xt_mse")
        if self.ridge < 1e-7 and problem.noise.dtype == torch.float32:
            raise ValueError(
                f"oss_fit.ridge={self.ridge} allows weights that float32 states cannot carry; use 1e-7 or more"
            )
        budgets = check_num_steps(num_steps, problem.num_nodes)
        paths = self.paths(problem, budgets, Shared(self.objective), Fit(self.history, self.ridge))
        return {k: _schedule(problem, path, self.start) for k, path in paths.items()}


def _closed(nodes: Tensor, problem: Problem) -> Tensor:
    """(..., k) -> (..., k+1), node N appended."""
    return torch.nn.functional.pad(nodes, (0, 1), value=problem.num_nodes)


def _schedule(problem: Problem, path: Path, start: StartKind, samples: Sequence[int] | None = None) -> StepSchedule:
    """Return the schedule of a path of b = 1 for all samples, or of one for each of these.

    Its provenance says what the recursion's cost was after each of its rounds, before anything was agreed or refined.
    """
    times = problem.grid[_closed(path.nodes.T, problem)].cpu()
    steps: Steps = SolverSteps()
    if path.weights is not None:
        steps = FittedSteps(path.weights.cpu(), problem.teacher.mean.cpu())
    elif isinstance(problem.solver, LinearMultistep) and problem.solver.order > 1:
        steps = SolverSteps(path.orders.T.cpu() if samples is not None else path.orders[:, 0].cpu())
    total = problem.collective.sum(path.costs.double().sum(1))
    count = problem.collective.sum(total.new_tensor([path.costs.shape[1]]))
    costs = [float(f"{cost:.4g}") for cost in (total / count).tolist()]
    return StepSchedule(
        times if samples is not None else times[0],
        student_start(problem, start),
        steps,
        samples=None if samples is None else tuple(samples),
        provenance={"planning": {"cost_per_round": costs}},
    )
