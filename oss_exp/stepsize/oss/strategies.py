"""Optimal Stepsize (OSS, arXiv 2503.21774): the schedule whose states stay closest to the teacher's, by search.

`OSS` gives every sample its own schedule (the paper's OSS), `OSSAve` the node-wise median or mean of those (its
OSS-ave), `OSSShared` chooses one schedule for all samples inside the recursion (ours). All three can start freely, at
the teacher's first node or by an analytic jump, can search coarse to fine, and can refine what they found.
Legend: B samples, N+1 nodes counted from the noise, K steps, k one budget; paths are (k, b), b = B or 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from oss_exp.checks import require_choice, require_range
from oss_exp.schedule import FittedSteps, SolverSteps, StartKind, Steps, StepSchedule
from oss_exp.solvers.base import LinearMultistep
from oss_exp.stepsize.base import StepsizeStrategy, check_num_steps, student_start
from oss_exp.stepsize.oss.band import Band, layers, stretch, strictly_monotone
from oss_exp.stepsize.oss.coefficients import Fit, FittedPath, FittedStudent
from oss_exp.stepsize.oss.objectives import Mean, Objective, PerSample, Shared
from oss_exp.stepsize.oss.recursion import SolverPath, recurse
from oss_exp.stepsize.oss.refine import FIT_CALLS, refine, refine_fitted
from oss_exp.stepsize.oss.required import Required, with_nodes
from oss_exp.stepsize.polish import polish, polish_calls
from oss_exp.stepsize.problem import Problem

Aggregate = Literal["median", "mean"]


@dataclass(frozen=True)
class Search:
    """What all OSS strategies share: where a student may start, the band, and refinement.

    max_order:    of a multistep solver's steps; None: the solver's own.
    must_visit:   times at which every schedule calls the network, such as the switch between two experts.
    first_sigmas: the schedule's first times, which a distilled model is given; the search chooses the rest.
                  Both are times t, of which the grid's nearest nodes are taken.
    """

    per_sample: ClassVar[bool] = False
    baseline: ClassVar[bool] = False

    start: StartKind = "free"
    band: Band | None = None
    refine: bool = False
    max_order: int | None = field(default=None, kw_only=True)
    must_visit: Sequence[float] | None = field(default=None, kw_only=True)
    first_sigmas: Sequence[float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        require_range(at_least=1, max_order=self.max_order)
        for name in ("must_visit", "first_sigmas"):
            if (times := getattr(self, name)) is not None:
                if isinstance(times, int | float | str):
                    raise ValueError(f"{name} must be a list of times, such as [{times}]")
                for time in times:
                    require_range(above=0, at_most=1, **{name: time})
                object.__setattr__(
                    self, name, [float(time) for time in times]
                )  # it is written into schedules
        require_choice(get_args(StartKind), start=self.start)

    def paths(
        self, problem: Problem, budgets: Sequence[int], objective: Objective
    ) -> dict[int, SolverPath]:
        """The best path of the recursion for every budget, refined if wanted."""
        problem = problem.at_most(self.max_order)
        required = self._required(problem, budgets[0])
        if self.band is None or not self.band.fits(problem.num_nodes):
            steps = self._layers(problem, budgets, 1, required)
            found = recurse(problem, steps, budgets, self.start, objective, required).paths
        else:
            found = self._coarse_to_fine(problem, budgets, objective, required)
        if self.refine:
            found = {
                k: refine(problem, path, self.start, objective, required)
                for k, path in found.items()
            }
        return found

    @property
    def required_times(self) -> list[float]:
        """Times that the teacher's grid should have among its nodes."""
        return [*(self.first_sigmas or ()), *(self.must_visit or ())]

    def _required(self, problem: Problem, num_steps: int) -> Required | None:
        """For paths of so many steps or more; ValueError where there is none."""
        if not self.required_times:
            return None
        return Required.of(
            problem.grid, self.must_visit or (), self.first_sigmas or (), self.start, num_steps
        )

    def _coarse_to_fine(
        self,
        problem: Problem,
        budgets: Sequence[int],
        objective: Objective,
        required: Required | None,
    ) -> dict[int, SolverPath]:
        assert self.band is not None
        levels = {k: self.band.levels(problem.num_nodes, k) for k in budgets}
        if required is not None:
            levels = {
                k: [
                    (stride, required.steps(steps, stride, problem.num_nodes))
                    for stride, steps in level
                ]
                for k, level in levels.items()
            }
        fewer = sorted({steps for (_, steps), *_ in levels.values()})
        layers = self._layers(problem, fewer, self.band.stride, required)
        pilots = recurse(problem, layers, fewer, self.start, objective, required).paths
        found = {}
        for k, ((_, pilot), *finer) in levels.items():
            path = pilots[pilot]
            for stride, steps in finer:
                nodes = stretch(path.nodes, steps, problem.num_nodes)
                nodes = nodes if required is None else required.behind_the_head(nodes)
                path = self._in_band(problem, nodes, stride, objective, self.band.shifts, required)
            found[k] = path
        return found

    def _layers(
        self, problem: Problem, budgets: Sequence[int], stride: int, required: Required | None
    ) -> list[Tensor]:
        return layers(problem.num_nodes, budgets, self.start, stride, problem.grid.device, required)

    def _in_band(
        self,
        problem: Problem,
        nodes: Tensor,
        stride: int,
        objective: Objective,
        shifts: int,
        required: Required | None = None,
    ) -> SolverPath:
        """The best path of every stride-th node in the band around `nodes` (k, b)."""
        assert self.band is not None
        k, count = len(nodes), len(range(0, problem.num_nodes, stride))
        windows = []
        touched = torch.zeros(nodes.shape[1], dtype=torch.bool, device=nodes.device)
        limits = [
            (0, 0) if r == 0 and self.start == "pinned" else (r, count - k + r) for r in range(k)
        ]
        for position, (lowest, highest) in zip(nodes // stride, limits, strict=True):
            width = self.band.reach(stride)
            size = min(2 * width + 1, highest - lowest + 1)
            first = (position - width).clamp(lowest, highest - size + 1)
            windows.append((first + torch.arange(size, device=nodes.device)[:, None]) * stride)
        wider = (
            windows
            if required is None
            else [required.window(window, r) for r, window in enumerate(windows)]
        )
        found = recurse(problem, wider, [k], self.start, objective, required).paths[k]
        for node, window, (lowest, highest) in zip(found.nodes, windows, limits, strict=True):
            touched |= (node == window[0]) & (node > lowest * stride) | (node == window[-1]) & (
                node < highest * stride
            )
        if shifts == 0 or not bool(touched.any()):
            return found
        if found.nodes.shape[1] == 1:
            return self._in_band(problem, found.nodes, stride, objective, shifts - 1, required)
        # Only the samples that need it, where the velocity can be cut to them.
        rows = torch.ones_like(touched).nonzero()[:, 0]
        if problem.velocity.divisible:
            rows = touched.nonzero()[:, 0]
            problem = problem.subset(rows)
        again = self._in_band(
            problem, found.nodes[:, rows], stride, objective, shifts - 1, required
        )
        for old, new in (
            (found.nodes, again.nodes),
            (found.orders, again.orders),
            (found.costs, again.costs),
        ):
            old[:, rows] = torch.where(touched[rows], new, old[:, rows])
        return found

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        """Calls per sample of the recursion and a typical refinement."""
        calls = self._recursion_calls(num_nodes, num_steps, edge_calls)
        if self.refine:
            calls += sum(
                8 * k * (k + 2) for k in set(num_steps)
            )  # two sweeps at each of four sizes, half a run a try
        return calls

    def _recursion_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int) -> int:
        """Those of the recursion, its band not moved."""
        budgets = check_num_steps(num_steps, num_nodes)
        stride, steps, finer = 1, budgets, []
        if self.band is not None and self.band.fits(num_nodes):
            levels = [self.band.levels(num_nodes, k) for k in budgets]
            stride, steps = self.band.stride, sorted({pilot for (_, pilot), *_ in levels})
            finer = [
                (k, 2 * self.band.reach(apart) + 1) for _, *rest in levels for apart, k in rest
            ]
        sizes = [len(layer) for layer in layers(num_nodes, steps, self.start, stride, "cpu")]
        calls = (
            sum(sizes)
            - 1
            + edge_calls * sum(a * b // 2 for a, b in zip(sizes, [*sizes[1:], 0], strict=True))
        )
        for k, width in finer:
            calls += k * width * (1 + edge_calls * width)
        return calls


@dataclass(frozen=True)
class OSS(Search):
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
            k: replace(path, nodes=path.nodes[:, order], orders=path.orders[:, order])
            for k, path in paths.items()
        }
        return {
            k: path_schedule(problem, path, self.start, samples[order].tolist())
            for k, path in in_order.items()
        }

    def sample_paths(self, problem: Problem, budgets: Sequence[int]) -> dict[int, SolverPath]:
        """Nodes, orders and costs (k, B) of all ranks' samples, one rank after the other."""
        count = len(problem.noise)
        chunk = self.chunk if problem.velocity.divisible else count
        parts = []
        for rows in torch.arange(count, device=problem.noise.device).split(chunk):
            parts.append(self.paths(problem.subset(rows), budgets, PerSample()))
        gathered = {}
        for k in budgets:
            tables = {
                name: [getattr(part[k], name) for part in parts]
                for name in ("nodes", "orders", "costs")
            }
            whole = {name: torch.cat(table, dim=1).T.contiguous() for name, table in tables.items()}
            gathered[k] = SolverPath(
                **{name: problem.collective.gather(table).T for name, table in whole.items()}
            )
        return gathered


@dataclass(frozen=True)
class OSSAve(Search):
    """The paper's OSS-ave: node-wise agreement of the per-sample schedules, made strictly monotone again.

    aggregate `median` rounds halves towards the data, as the released code does for an even number of samples.
    `refine`, off in the paper, moves the agreed nodes over the batch's mean error.
    """

    aggregate: Aggregate = "median"
    chunk: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(get_args(Aggregate), aggregate=self.aggregate)
        if self.must_visit:
            raise ValueError(
                "oss_ave agrees on each step's node, and may agree on none of must_visit; use oss_shared"
            )
        require_range(at_least=1, chunk=self.chunk)

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        budgets = check_num_steps(num_steps, problem.num_nodes)
        alone = OSS(
            self.start,
            self.band,
            False,
            self.chunk,
            max_order=self.max_order,
            first_sigmas=self.first_sigmas,
        )
        plans = {}
        for k, path in alone.sample_paths(problem, budgets).items():
            nodes = strictly_monotone(self._agree(path.nodes), problem.num_nodes)
            agreed = SolverPath(nodes[:, None], self._agree(path.orders)[:, None], path.costs)
            if self.refine:
                required = self._required(problem, k)
                agreed = refine(
                    problem.at_most(self.max_order),
                    agreed,
                    self.start,
                    Shared("mean"),
                    required=required,
                )
            plans[k] = path_schedule(problem, agreed, self.start)
        return plans

    def _agree(self, values: Tensor) -> Tensor:
        """(k, B) -> (k,)"""
        if self.aggregate == "median":
            return values.double().quantile(0.5, dim=1).ceil().long()
        return values.double().mean(1).round().long()


@dataclass(frozen=True)
class OSSShared(Search):
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
        return {k: path_schedule(problem, path, self.start) for k, path in paths.items()}


@dataclass(frozen=True)
class OSSFit(Search):
    """Path first, coefficients after (ours): the path of `OSSShared`, and along it steps with fitted coefficients.

    The nodes are those of Algorithm 2 with the solver's own steps; then every step's coefficients over the state, the
    noise, the mean and the full history of predictions are fitted in closed form (`coefficients.Fit`); then `refine`
    moves the nodes, and fits anew for every move. See `Fit` for history and ridge. `polish`, so many iterations at
    most, then improves weights and times together (`polish.polish`), at times off the grid too.
    """

    start: StartKind = "analytic"
    band: Band | None = field(default_factory=Band)
    refine: bool = True
    objective: Mean = "log_mean"
    history: int | None = None
    ridge: float = 1e-6
    polish: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(at_least=0, polish=self.polish)
        Shared(self.objective)  # its checks
        Fit(self.history, self.ridge)  # its checks

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        """Calls per sample of the recursion, of a fit, of a typical refinement, and of all polishing."""
        calls = self._recursion_calls(num_nodes, num_steps, edge_calls) + sum(set(num_steps))
        calls += sum(polish_calls(k, self.polish, self.history) for k in set(num_steps))
        return calls + (
            sum(min(8 * k * k, FIT_CALLS) for k in set(num_steps)) if self.refine else 0
        )

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        if not problem.distance.quadratic:
            raise ValueError(
                f"oss_fit solves least squares on the states: {problem.distance} is not one; use xt_mse"
            )
        if self.ridge < 1e-7 and problem.noise.dtype == torch.float32:
            raise ValueError(
                f"oss_fit.ridge={self.ridge} allows weights that float32 states cannot carry; use 1e-7 or more"
            )
        objective, budgets = Shared(self.objective), check_num_steps(num_steps, problem.num_nodes)
        required = self._required(problem, budgets[0])
        student = FittedStudent(problem, self.start, objective, Fit(self.history, self.ridge))
        plans = {}
        for k, path in replace(self, refine=False).paths(problem, budgets, objective).items():
            with torch.no_grad():
                fitted, *_ = student.run(path)
            if self.refine:
                fitted = refine_fitted(student, fitted, required)
            plans[k] = path_schedule(problem, fitted, self.start)
            if self.polish:
                fixed = None if required is None else problem.grid[required.nodes]
                plans[k] = polish(problem, plans[k], self.polish, self.objective, fixed)
        return plans


def with_required(grid: Tensor, strategies: Iterable[object]) -> Tensor:
    """Return the teacher's grid (N+1,) with a node at every time that one of the strategies must visit."""
    return with_nodes(
        grid,
        [time for each in strategies if isinstance(each, Search) for time in each.required_times],
    )


def visiting(
    strategy: object, must_visit: Sequence[float] | None, first_sigmas: Sequence[float] | None
) -> StepsizeStrategy:
    """Return the strategy with these required times. ValueError where it does not search."""
    if not isinstance(strategy, Search) or not isinstance(strategy, StepsizeStrategy):
        raise ValueError(
            f"must_visit and first_sigmas are of searches such as OSSBest(), got {strategy!r}"
        )
    return replace(strategy, must_visit=must_visit, first_sigmas=first_sigmas)


def _closed(nodes: Tensor, problem: Problem) -> Tensor:
    """(..., k) -> (..., k+1), node N appended."""
    return torch.nn.functional.pad(nodes, (0, 1), value=problem.num_nodes)


def path_schedule(
    problem: Problem,
    path: SolverPath | FittedPath,
    start: StartKind,
    samples: Sequence[int] | None = None,
) -> StepSchedule:
    """Return the schedule of a path of b = 1 for all samples, or of one for each of these.

    Its provenance says what the recursion's cost was after each of its rounds, before anything was agreed or refined.
    """
    times = problem.grid[_closed(path.nodes.T, problem)].cpu()
    steps: Steps = SolverSteps()
    if isinstance(path, FittedPath):
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
