"""Optimal Stepsize (OSS, arXiv 2503.21774): search the schedule that stays closest to the teacher.

`OSS` gives every sample its own schedule (the paper's OSS). `OSSAve` takes the median
or mean of those, node by node (its OSS-ave). `OSSShared` (ours) chooses one schedule
for all samples inside the recursion, and `OSSFit` (ours) also fits the coefficients of
its steps. All of them can start freely, at the teacher's first node or by an analytic
jump, can search coarse to fine, and can refine the path of the recursion.

Legend: B samples, N+1 nodes counted from the noise, K steps, k one budget. Paths are
(k, b), b = B or 1.
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
    """The base of all OSS strategies: start, band, refinement and required times.

    Args:
        start: where a student begins: "free" at any node with the initial noise,
            "pinned" at the teacher's first node, "analytic" at any node by a jump
            without a network call.
        band: search coarse to fine; None searches the whole grid at once.
        refine: improve the path of the recursion by coordinate descent (`refine.py`).
        max_order: highest order of a multistep solver's steps; None means the solver's
            own.
        must_visit: canonical times at which every schedule calls the network, such as
            the switch between two experts. The grid's nearest nodes are taken.
        first_sigmas: the first canonical times of the schedule, as a distilled model
            requires them; the search chooses the others. The grid's nearest nodes are
            taken.
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
        require_choice(get_args(StartKind), start=self.start)
        for name in ("must_visit", "first_sigmas"):
            times = getattr(self, name)
            if times is None:
                continue
            if isinstance(times, int | float | str):
                raise ValueError(f"{name} must be a list of times, such as [{times}]")
            for time in times:
                require_range(above=0, at_most=1, **{name: time})
            # Plain numbers, for they are written into schedules.
            object.__setattr__(self, name, [float(time) for time in times])

    @property
    def required_times(self) -> list[float]:
        """Times that the teacher's grid should have among its nodes."""
        return [*(self.first_sigmas or ()), *(self.must_visit or ())]

    def paths(
        self, problem: Problem, budgets: Sequence[int], objective: Objective
    ) -> dict[int, SolverPath]:
        """Return the best path of the recursion for every budget, refined if `refine` is set."""
        problem = problem.at_most(self.max_order)
        required = self._required(problem, budgets[0])
        if self.band is None or not self.band.fits(problem.num_nodes):
            grid_layers = self._layers(problem, budgets, 1, required)
            solution = recurse(problem, grid_layers, budgets, self.start, objective, required)
            paths = solution.paths
        else:
            paths = self._coarse_to_fine(problem, budgets, objective, required)
        if not self.refine:
            return paths
        refined = {}
        for k, path in paths.items():
            refined[k] = refine(problem, path, self.start, objective, required)
        return refined

    def _required(self, problem: Problem, num_steps: int) -> Required | None:
        """Return the required nodes of paths of `num_steps` steps or more.

        Raises ValueError where no such path visits them all.
        """
        if not self.required_times:
            return None
        return Required.of(
            problem.grid, self.must_visit or (), self.first_sigmas or (), self.start, num_steps
        )

    def _layers(
        self, problem: Problem, budgets: Sequence[int], stride: int, required: Required | None
    ) -> list[Tensor]:
        """Return the layers of a search over every `stride`-th node."""
        return layers(problem.num_nodes, budgets, self.start, stride, problem.grid.device, required)

    def _coarse_to_fine(
        self,
        problem: Problem,
        budgets: Sequence[int],
        objective: Objective,
        required: Required | None,
    ) -> dict[int, SolverPath]:
        """Search a coarse grid, then finer and finer ones in a band around the path so far."""
        assert self.band is not None
        levels = {k: self._levels(k, problem.num_nodes, required) for k in budgets}

        # One pilot search serves all budgets.
        pilot_steps = sorted({level[0][1] for level in levels.values()})
        pilot_layers = self._layers(problem, pilot_steps, self.band.stride, required)
        pilots = recurse(problem, pilot_layers, pilot_steps, self.start, objective, required).paths

        # Finer levels, one budget after the other.
        paths = {}
        for k, ((_, pilot_budget), *finer) in levels.items():
            path = pilots[pilot_budget]
            for stride, steps in finer:
                nodes = stretch(path.nodes, steps, problem.num_nodes)
                if required is not None:
                    nodes = required.behind_the_head(nodes)
                path = self._in_band(problem, nodes, stride, objective, self.band.shifts, required)
            paths[k] = path
        return paths

    def _levels(
        self, num_steps: int, num_nodes: int, required: Required | None
    ) -> list[tuple[int, int]]:
        """Return (stride, steps) of the pilot and of all finer levels of one budget."""
        assert self.band is not None
        levels = self.band.levels(num_nodes, num_steps)
        if required is None:
            return levels
        return [(stride, required.steps(steps, stride, num_nodes)) for stride, steps in levels]

    def _in_band(
        self,
        problem: Problem,
        nodes: Tensor,
        stride: int,
        objective: Objective,
        shifts: int,
        required: Required | None = None,
    ) -> SolverPath:
        """Return the best path through every `stride`-th node of the band around a path.

        Where it touches the border of the band, the band is laid around it and searched
        again, at most `shifts` times.

        Args:
            problem: the problem that the path solves.
            nodes: (k, b) nodes of the path that the band is around.
            stride: distance between the nodes that are searched.
            objective: what the samples' costs become before the minimum is taken.
            shifts: how often the band may be laid anew.
            required: nodes that every path contains; they are added to the band.
        """
        limits = self._limits(len(nodes), problem.num_nodes, stride)
        windows = self._windows(nodes, stride, limits)
        window_layers = windows
        if required is not None:
            window_layers = [required.window(window, r) for r, window in enumerate(windows)]
        solution = recurse(problem, window_layers, [len(nodes)], self.start, objective, required)
        path = solution.paths[len(nodes)]

        touched = _touches_border(path.nodes, windows, stride, limits)
        if shifts == 0 or not bool(touched.any()):
            return path
        if path.nodes.shape[1] == 1:
            return self._in_band(problem, path.nodes, stride, objective, shifts - 1, required)

        # Search again for the samples that need it, where the velocity can be cut to them.
        rows = torch.ones_like(touched).nonzero()[:, 0]
        if problem.velocity.divisible:
            rows = touched.nonzero()[:, 0]
            problem = problem.subset(rows)
        shifted = self._in_band(
            problem, path.nodes[:, rows], stride, objective, shifts - 1, required
        )
        pairs = (
            (path.nodes, shifted.nodes),
            (path.orders, shifted.orders),
            (path.costs, shifted.costs),
        )
        for old, new in pairs:
            old[:, rows] = torch.where(touched[rows], new, old[:, rows])
        return path

    def _limits(self, num_steps: int, num_nodes: int, stride: int) -> list[tuple[int, int]]:
        """Return (lowest, highest) for each call: it is at a node between these times `stride`."""
        count = len(range(0, num_nodes, stride))
        limits = [(r, count - num_steps + r) for r in range(num_steps)]
        if self.start == "pinned":
            limits[0] = (0, 0)
        return limits

    def _windows(
        self, nodes: Tensor, stride: int, limits: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Return the nodes (W, b) of the band around each of the nodes (k, b) of a path.

        The limits are those of `_limits`.
        """
        assert self.band is not None
        width = self.band.reach(stride)
        windows = []
        for position, (lowest, highest) in zip(nodes // stride, limits, strict=True):
            size = min(2 * width + 1, highest - lowest + 1)
            first = (position - width).clamp(lowest, highest - size + 1)
            windows.append((first + torch.arange(size, device=nodes.device)[:, None]) * stride)
        return windows

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        """Return the calls per sample of the recursion and of a typical refinement."""
        calls = self._recursion_calls(num_nodes, num_steps, edge_calls)
        if self.refine:
            # Two sweeps at each of four sizes of moves, half a run for each try.
            calls += sum(8 * k * (k + 2) for k in set(num_steps))
        return calls

    def _recursion_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int) -> int:
        """Return the calls per sample of the recursion, without shifts of its band."""
        # Levels of the band.
        budgets = check_num_steps(num_steps, num_nodes)
        stride = 1
        steps = budgets
        finer: list[tuple[int, int]] = []  # (steps, width of the window)
        if self.band is not None and self.band.fits(num_nodes):
            stride = self.band.stride
            levels = [self.band.levels(num_nodes, k) for k in budgets]
            steps = sorted({level[0][1] for level in levels})
            for level in levels:
                for level_stride, level_steps in level[1:]:
                    finer.append((level_steps, 2 * self.band.reach(level_stride) + 1))

        # One call for each node, the first of which the teacher has made, and `edge_calls` for
        # each edge.
        sizes = [len(layer) for layer in layers(num_nodes, steps, self.start, stride, "cpu")]
        num_edges = sum(a * b // 2 for a, b in zip(sizes, [*sizes[1:], 0], strict=True))
        calls = sum(sizes) - 1 + edge_calls * num_edges
        for k, width in finer:
            calls += k * width * (1 + edge_calls * width)
        return calls


def _touches_border(
    nodes: Tensor, windows: Sequence[Tensor], stride: int, limits: Sequence[tuple[int, int]]
) -> Tensor:
    """Return (b,) whether each path of nodes (k, b) touches a border that its band could move."""
    touched = torch.zeros(nodes.shape[1], dtype=torch.bool, device=nodes.device)
    for node, window, (lowest, highest) in zip(nodes, windows, limits, strict=True):
        touched |= (node == window[0]) & (node > lowest * stride)
        touched |= (node == window[-1]) & (node < highest * stride)
    return touched


@dataclass(frozen=True)
class OSS(Search):
    """One schedule for each sample (Algorithm 1 of the paper, with exactly k steps).

    It shows how good a schedule can be that knows the noise.

    Args:
        chunk: samples that are searched at a time. It bounds the memory and changes
            nothing else. With a plain VelocityFn, which cannot be cut to some samples,
            all of them are searched at once.
    """

    per_sample: ClassVar[bool] = True

    chunk: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(at_least=1, chunk=self.chunk)

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        paths = self.sample_paths(problem, check_num_steps(num_steps, problem.num_nodes))

        # In the order of the samples' global indices.
        samples = problem.collective.gather(problem.samples)
        order = samples.argsort()
        plans = {}
        for k, path in paths.items():
            path = replace(path, nodes=path.nodes[:, order], orders=path.orders[:, order])
            plans[k] = path_schedule(problem, path, self.start, samples[order].tolist())
        return plans

    def sample_paths(self, problem: Problem, budgets: Sequence[int]) -> dict[int, SolverPath]:
        """Return the paths (k, B) of all ranks' samples, one rank after the other."""
        count = len(problem.noise)
        chunk = self.chunk if problem.velocity.divisible else count
        parts = []
        for rows in torch.arange(count, device=problem.noise.device).split(chunk):
            parts.append(self.paths(problem.subset(rows), budgets, PerSample()))

        def gather(tables: list[Tensor]) -> Tensor:
            by_sample = torch.cat(tables, dim=1).T.contiguous()
            return problem.collective.gather(by_sample).T

        gathered = {}
        for k in budgets:
            gathered[k] = SolverPath(
                nodes=gather([part[k].nodes for part in parts]),
                orders=gather([part[k].orders for part in parts]),
                costs=gather([part[k].costs for part in parts]),
            )
        return gathered


@dataclass(frozen=True)
class OSSAve(Search):
    """The paper's OSS-ave: the per-sample schedules' nodes, averaged and made strictly monotone.

    Args:
        refine: refine the averaged path, so that the samples' mean error at the end falls;
            off in the paper.
        aggregate: how the samples agree on a node, and on the order of a step. "median"
            rounds halves up, for nodes towards the data, as the released code does for
            an even number of samples.
        chunk: samples that are searched at a time, see `OSS`.
    """

    aggregate: Aggregate = "median"
    chunk: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(get_args(Aggregate), aggregate=self.aggregate)
        if self.must_visit:
            raise ValueError(
                "oss_ave averages each step's node, and its samples may agree on none of "
                "must_visit; use oss_shared"
            )
        require_range(at_least=1, chunk=self.chunk)

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        budgets = check_num_steps(num_steps, problem.num_nodes)
        per_sample = OSS(
            start=self.start,
            band=self.band,
            refine=False,
            chunk=self.chunk,
            max_order=self.max_order,
            first_sigmas=self.first_sigmas,
        )
        plans = {}
        for k, path in per_sample.sample_paths(problem, budgets).items():
            nodes = strictly_monotone(self._agree(path.nodes), problem.num_nodes)
            average = SolverPath(nodes[:, None], self._agree(path.orders)[:, None], path.costs)
            if self.refine:
                average = self._refined(problem, average)
            plans[k] = path_schedule(problem, average, self.start)
        return plans

    def _refined(self, problem: Problem, path: SolverPath) -> SolverPath:
        required = self._required(problem, len(path.nodes))
        problem = problem.at_most(self.max_order)
        return refine(problem, path, self.start, Shared("mean"), required=required)

    def _agree(self, values: Tensor) -> Tensor:
        """Return the median or mean (k,) over samples of values (k, B)."""
        if self.aggregate == "median":
            return values.double().quantile(0.5, dim=1).ceil().long()
        return values.double().mean(1).round().long()


@dataclass(frozen=True)
class OSSShared(Search):
    """One schedule for all samples, chosen inside the recursion (ours).

    Args:
        objective: minimise the samples' mean cost ("mean", MSE), the mean of its root
            ("root_mean", RMSE), or of its logarithm ("log_mean", which maximises PSNR).
            In this order, unusual samples of a large cost weigh less and less.
    """

    start: StartKind = "analytic"
    refine: bool = True
    objective: Mean = "log_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        Shared(self.objective)  # checks it

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        budgets = check_num_steps(num_steps, problem.num_nodes)
        paths = self.paths(problem, budgets, Shared(self.objective))
        return {k: path_schedule(problem, path, self.start) for k, path in paths.items()}


@dataclass(frozen=True)
class OSSFit(Search):
    """A path first, then fitted coefficients for its steps (ours).

    The nodes are searched as `OSSShared` does it, with the solver's own steps (Algorithm
    2). Then every step gets coefficients for the state, the noise, the mean and all
    predictions so far, fitted in closed form (`coefficients.Fit`). `refine` moves these
    nodes and fits the coefficients again for every move.

    Args:
        objective: as in `OSSShared`.
        history: calls whose predictions a step may use; None means all of them.
        ridge: regularisation of the fit, see `Fit`.
        polish: iterations, at most, that improve all weights and times together, also
            between the grid's nodes (`polish.polish`); 0 means none.
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
        Shared(self.objective)  # checks it
        Fit(self.history, self.ridge)  # checks them

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        """Return the calls per sample of the search, the fits, a typical refinement and polish."""
        budgets = set(num_steps)
        calls = self._recursion_calls(num_nodes, num_steps, edge_calls) + sum(budgets)
        for k in budgets:
            calls += polish_calls(k, self.polish, self.history)
            if self.refine:
                calls += min(8 * k * k, FIT_CALLS)
        return calls

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        self._check_fits(problem)
        budgets = check_num_steps(num_steps, problem.num_nodes)
        objective = Shared(self.objective)
        required = self._required(problem, budgets[0])

        student = FittedStudent(problem, self.start, objective, Fit(self.history, self.ridge))
        plans = {}
        for k, path in replace(self, refine=False).paths(problem, budgets, objective).items():
            # Coefficients along the path.
            with torch.no_grad():
                fitted, *_ = student.run(path)
            if self.refine:
                fitted = refine_fitted(student, fitted, required)
            plans[k] = path_schedule(problem, fitted, self.start)

            # Weights and times together.
            if self.polish:
                fixed = None if required is None else problem.grid[required.nodes]
                plans[k] = polish(problem, plans[k], self.polish, self.objective, fixed)
        return plans

    def _check_fits(self, problem: Problem) -> None:
        """Raise ValueError where least squares cannot be solved on this problem."""
        if not problem.distance.quadratic:
            raise ValueError(
                f"oss_fit solves least squares on the states, which {problem.distance} does not "
                "measure; use xt_mse"
            )
        if self.ridge < 1e-7 and problem.noise.dtype == torch.float32:
            raise ValueError(
                f"oss_fit.ridge={self.ridge} allows weights that float32 states cannot carry; "
                "use 1e-7 or more"
            )


def with_required(grid: Tensor, strategies: Iterable[object]) -> Tensor:
    """Return the grid (N+1,) with a node at every time that one of the strategies requires."""
    times = []
    for strategy in strategies:
        if isinstance(strategy, Search):
            times.extend(strategy.required_times)
    return with_nodes(grid, times)


def visiting(
    strategy: object, must_visit: Sequence[float] | None, first_sigmas: Sequence[float] | None
) -> StepsizeStrategy:
    """Return the strategy with these required times.

    Raises ValueError where the strategy is not a search.
    """
    if not isinstance(strategy, Search) or not isinstance(strategy, StepsizeStrategy):
        raise ValueError(
            f"must_visit and first_sigmas are of searches such as OSSBest(), got {strategy!r}"
        )
    return replace(strategy, must_visit=must_visit, first_sigmas=first_sigmas)


def path_schedule(
    problem: Problem,
    path: SolverPath | FittedPath,
    start: StartKind,
    samples: Sequence[int] | None = None,
) -> StepSchedule:
    """Return the schedule of a path.

    Its provenance has the mean of the path's costs after each step. With a solver's steps
    they are the recursion's, from before samples agreed on nodes and before refinement.

    Args:
        problem: the problem that the path solves.
        path: one path for all samples (b = 1), or one for each of `samples`.
        start: where the student begins.
        samples: (B,) global indices, for a schedule with one row for each sample.
    """
    shared = samples is None
    nodes = torch.nn.functional.pad(path.nodes.T, (0, 1), value=problem.num_nodes)
    times = problem.grid[nodes].cpu()

    # Steps.
    steps: Steps = SolverSteps()
    if isinstance(path, FittedPath):
        steps = FittedSteps(path.weights.cpu(), problem.teacher.mean.cpu())
    elif isinstance(problem.solver, LinearMultistep) and problem.solver.order > 1:
        steps = SolverSteps(path.orders[:, 0].cpu() if shared else path.orders.T.cpu())

    # Mean costs over all ranks, to four digits.
    total = problem.collective.sum(path.costs.double().sum(1))
    count = problem.collective.sum(total.new_tensor([path.costs.shape[1]]))
    costs = [float(f"{cost:.4g}") for cost in (total / count).tolist()]
    return StepSchedule(
        times[0] if shared else times,
        student_start(problem, start),
        steps,
        samples=None if samples is None else tuple(samples),
        provenance={"planning": {"cost_per_round": costs}},
    )
