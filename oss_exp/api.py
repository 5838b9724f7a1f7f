"""The verbs of the front door: search a step schedule, sample with it, compare it with others.

What is sampled is a model, or its velocity v(x (M, *E), t (M,)) -> (M, *E) in canonical time: x_t = (1 - t) x0 + t eps,
v = eps - x0, t = 1 noise and t = 0 data. Noises are standard normal; a teacher or a schedule that begins below t = 1
scales them. Legend: B noises, C conditions, K steps, N teacher steps, *E event dims.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from numbers import Integral
from typing import TYPE_CHECKING, Any, overload

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from oss_exp import solvers
from oss_exp.call_counter import CallCounter
from oss_exp.data.noise import HELD_OUT, NoiseDataset
from oss_exp.distances import Distance, XtMSE
from oss_exp.evaluation.comparison import Line, Result, html, measured, spread, terminal, with_gains
from oss_exp.evaluation.psnr import psnr
from oss_exp.evaluation.spectral import spectral_distance
from oss_exp.models.base import Model
from oss_exp.models.pipeline import Pipeline, is_pipeline
from oss_exp.noise import DDIMSchedule, EDMSchedule, FlowSchedule, LogSNRSchedule, NoiseSchedule
from oss_exp.provenance import configuration, model_record, provenance
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Solver
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.stepsize import ClosedForm, OSSBest, OSSShared, Problem, Profile, StepsizeStrategy
from oss_exp.stepsize.base import DoesNotFit, check_num_steps, edge_calls
from oss_exp.stepsize.baselines.gits import GITS
from oss_exp.stepsize.oss.strategies import visiting, with_required
from oss_exp.velocity import BoundVelocity, VelocityFn

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
else:
    DiffusionPipeline = Any  # diffusers is not imported for its name

PER_SAMPLE = 32  # held-out noises for strategies that plan a schedule for each of them


@overload
def search(
    velocity_or_model: VelocityFn | BoundVelocity | Model | DiffusionPipeline,
    noise: Tensor | int | None = ...,
    num_steps: int = ...,
    *,
    prompts: Sequence[Any] | None = ...,
    solver: Solver = ...,
    teacher: NoiseSchedule | None = ...,
    num_teacher_steps: int = ...,
    strategy: StepsizeStrategy | None = ...,
    must_visit: Sequence[float] | None = ...,
    first_sigmas: Sequence[float] | None = ...,
    distance: Distance = ...,
    condition: Tensor | None = ...,
    seed: int = ...,
    progress: bool | None = ...,
) -> StepSchedule: ...


@overload
def search(
    velocity_or_model: VelocityFn | BoundVelocity | Model | DiffusionPipeline,
    noise: Tensor | int | None = ...,
    *,
    num_steps: Sequence[int],
    prompts: Sequence[Any] | None = ...,
    solver: Solver = ...,
    teacher: NoiseSchedule | None = ...,
    num_teacher_steps: int = ...,
    strategy: StepsizeStrategy | None = ...,
    must_visit: Sequence[float] | None = ...,
    first_sigmas: Sequence[float] | None = ...,
    distance: Distance = ...,
    condition: Tensor | None = ...,
    seed: int = ...,
    progress: bool | None = ...,
) -> dict[int, StepSchedule]: ...


def search(
    velocity_or_model: VelocityFn | BoundVelocity | Model | DiffusionPipeline,
    noise: Tensor | int | None = None,
    num_steps: int | Sequence[int] = 10,
    *,
    prompts: Sequence[Any] | None = None,
    solver: Solver = DPMSolverPP(),
    teacher: NoiseSchedule | None = None,
    num_teacher_steps: int = 100,
    strategy: StepsizeStrategy | None = None,
    must_visit: Sequence[float] | None = None,
    first_sigmas: Sequence[float] | None = None,
    distance: Distance = XtMSE(),
    condition: Tensor | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> StepSchedule | dict[int, StepSchedule]:
    """Search the step schedule of num_steps network calls that stays closest to a many-step teacher.

    The default solver, DPM-Solver++ of order up to 2, is far better than Euler at few steps, and `sample` and
    `OSSScheduler` run its steps. For programs that take a list of times alone (ComfyUI, k-diffusion) choose
    `solver=Euler(), strategy=OSSShared(start="pinned")`.

    Args:
        velocity_or_model: a function v(x, t), a `BoundVelocity`, a `Model`, or a pipeline of diffusers with `prompts`.
            What else its call is given, its size or guidance, goes into `Pipeline(pipe, prompts, guidance_scale=3)`.
        noise: (B, *E) standard normal, float32 or float64; or, for a model, how many to draw; None: 32, or one for each
            prompt of a pipeline.
        num_steps: K, or several: one search serves all, and a dict {K: schedule} is returned.
        prompts: of a pipeline.
        solver: of teacher and student; it searches without its calibration.
        teacher, num_teacher_steps: the teacher's times. A student's are chosen from these. None: a pipeline's own
            times, else `FlowSchedule()`.
        strategy: what plans. One that plans per sample (`OSS`) has a schedule for each of these noises alone. None:
            `OSSBest()`, with a pinned start for pipelines, which draw their noise themselves; `OSSShared()` for those
            that begin at an image (`strength` below 1).
        must_visit: times t at which the schedule must call the network, such as the switch between two experts. The
            teacher gets nodes there.
        first_sigmas: the schedule's first times, where they are given, as a distilled model's are; the search chooses
            the rest.
        distance: what is small between student and teacher.
        condition: classes (C,) or other conditions (C, ...) of a model, which the noises take in turn. None: all
            classes in turn for a model that needs them, none for others.
        seed: of drawn noises.
        progress: draw a bar with the time left on stderr; None: if that is a terminal.

    Raises ValueError for an argument of another type, shape or range, and for a velocity with NaN or infinity.
    """
    source = _Source.of(velocity_or_model, prompts)
    budgets = _budgets(num_steps, num_teacher_steps)
    strategy = source.strategy if strategy is None else strategy
    _require("strategy", strategy, StepsizeStrategy, "OSSBest()")
    if must_visit is not None or first_sigmas is not None:
        strategy = visiting(strategy, must_visit, first_sigmas)
    planner = _Planner(
        source, budgets, solver, teacher, num_teacher_steps, [strategy], distance, progress
    )
    x = source.noises(noise, "noise", seed, 0)
    problem = planner.problem(x, condition)
    about = planner.about(condition, None if isinstance(noise, Tensor) else seed)
    with planner.counter.progress:
        plans = planner.plan(type(strategy).__name__, strategy, problem, about)
    return plans[budgets[0]] if isinstance(num_steps, Integral) else plans


def sample(
    velocity_or_model: VelocityFn | BoundVelocity | Model,
    noise: Tensor | int,
    steps: StepSchedule,
    *,
    solver: Solver | None = None,
    condition: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Run a step schedule from noise to data, and return x0 (B, *E). `model.decode(x0)` gives a model's pixels.

    Args:
        velocity_or_model: a function v(x, t), a `BoundVelocity` or a `Model`.
        noise: (B, *E) standard normal; or, for a model, how many to draw, none of which a search has drawn.
        steps: the schedule.
        solver: None: the one that the schedule was searched with, Euler for times by hand.
        condition: as in `search`.
        seed: of drawn noises.

    Raises ValueError for an argument of another type or shape, and where x0 holds NaN or infinity.
    """
    source = _Source.of(velocity_or_model)
    if not isinstance(steps, StepSchedule):
        several = (
            "; choose one of its schedules, such as steps[5]" if isinstance(steps, Mapping) else ""
        )
        raise ValueError(f"steps must be a StepSchedule, got {_shown(steps)}{several}")
    if solver is None:
        solver = solvers.solver_of(steps)
    _require("solver", solver, Solver, "Euler()")
    x = source.noises(noise, "noise", seed, HELD_OUT)
    x0 = source.sample(solver, steps, x * steps.start_time, source.conditions(condition, len(x)))
    return _finite(x0, "the samples")


def compare(
    velocity_or_model: VelocityFn | BoundVelocity | Model | DiffusionPipeline,
    noise: Tensor | int | None = None,
    num_steps: int | Sequence[int] = 10,
    *,
    prompts: Sequence[Any] | None = None,
    strategies: Mapping[str, StepsizeStrategy] | None = None,
    held_out: Tensor | int = 256,
    solver: Solver = DPMSolverPP(),
    teacher: NoiseSchedule | None = None,
    num_teacher_steps: int = 100,
    distance: Distance = XtMSE(),
    condition: Tensor | None = None,
    held_out_condition: Tensor | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool | None = None,
) -> Comparison:
    """Plan every strategy on `noise`, measure all of their schedules on held-out noises, and return the table.

    Strategies that plan a schedule per sample (`OSS`) plan, and are measured, on the first 32 held-out noises.

    Args:
        noise, num_steps, prompts, solver, teacher, num_teacher_steps, distance, condition, seed, progress: as in
            `search`.
        strategies: {label: strategy}; None: those of `oss_exp.api.standard_strategies()` that have
            schedules for this teacher and these num_steps.
        held_out: (n, *E) standard normal noises that the search does not see, or how many to draw.
        held_out_condition: conditions that the held-out noises take in turn; None: `condition`.
        decode: x0 (B, *E) -> pixels in [0, 1]; None: a model's own, of a function x0 itself, so that its PSNR is
            10 log10(1 / MSE).
        batch_size: held-out noises that are sampled at a time; a plain function gets all of them at once.

    Raises ValueError for an argument of another type, shape or range, and for a velocity with NaN or infinity.
    """
    source = _Source.of(velocity_or_model, prompts)
    budgets = _budgets(num_steps, num_teacher_steps)
    standard = strategies is None
    if strategies is None:
        strategies = standard_strategies() | {"oss_best": source.strategy}
    if not isinstance(strategies, Mapping) or not strategies:
        raise ValueError(
            f"strategies must be a dict such as {{'mine': OSSBest()}}, got {_shown(strategies)}"
        )
    for label, strategy in strategies.items():
        _require(f"strategies[{label!r}]", strategy, StepsizeStrategy, "OSSBest()")
    searches = list(strategies.values())
    planner = _Planner(
        source, budgets, solver, teacher, num_teacher_steps, searches, distance, progress
    )
    _require_count("batch_size", batch_size)

    # Noises.
    x = source.noises(noise, "noise", seed, 0)
    fresh = source.noises(held_out, "held_out", seed, HELD_OUT, like=x)
    held_out_condition = condition if held_out_condition is None else held_out_condition
    rows = source.conditions(held_out_condition, len(fresh))
    shared = planner.problem(x, condition)
    alone: Problem | None = None
    about = planner.about(condition, None if isinstance(noise, Tensor) else seed)

    # Schedules, and what they are worth.
    with planner.counter.progress:
        schedules: dict[str, dict[int, StepSchedule]] = {}
        for label, strategy in strategies.items():
            problem = shared
            if strategy.per_sample:
                alone = alone or planner.problem(fresh[:PER_SAMPLE], held_out_condition, HELD_OUT)
                problem = alone
            try:
                schedules[label] = planner.plan(label, strategy, problem, about)
            except DoesNotFit:
                if not standard:
                    raise
        runs = {
            (label, k): steps for label, plans in schedules.items() for k, steps in plans.items()
        }
        values = planner.measure(runs, fresh, rows, decode or source.decode, batch_size)

    velocity = source.velocity(rows, len(fresh))
    records = [
        {
            "strategy": label,
            "num_steps": k,
            "baseline": strategies[label].baseline,
            "start": steps.start.kind,
            "planning": dict(steps.about("planning")),
            "nfe": solvers.nfe(solver, steps, velocity),
            **measured(*values[label, k].T[:3].numpy()),
            "metrics": dict(
                zip(["spectral, dB"], values[label, k].T[3:].mean(1).tolist(), strict=False)
            ),
        }
        for (label, k), steps in runs.items()
    ]
    return Comparison(about, schedules, records)


def standard_strategies() -> dict[str, StepsizeStrategy]:
    """Return the strategies of `compare`: schedules by hand, GITS, and the search that is the default of `search`."""
    return {
        "fm": ClosedForm(FlowSchedule()),
        "ddim": ClosedForm(DDIMSchedule()),
        "edm": ClosedForm(EDMSchedule()),
        "logsnr": ClosedForm(LogSNRSchedule()),
        "gits": GITS(),
        "oss_best": OSSBest(),
    }


class Comparison:
    """What `compare` found. It prints itself as a table, in notebooks too.

    about:     model, teacher, solver, distance and versions.
    schedules: {label: {K: StepSchedule}}.
    rows:      one dict a schedule in the table's order, by network calls, then best first: PSNR and its 95 % interval
               over the n held-out noises, every image's PSNR, `gain` (the paired difference to the best baseline at the
               same number of calls; None for that baseline itself), spread, and what planning cost.
    """

    def __init__(
        self,
        about: Mapping[str, Any],
        schedules: Mapping[str, Mapping[int, StepSchedule]],
        records: Sequence[Mapping[str, Any]],
    ):
        self.about, self.schedules = about, schedules
        self.lines: list[Line] = with_gains(
            [Result.of(record, str(record["nfe"])) for record in records]
        )
        by_key = {(record["strategy"], record["num_steps"]): record for record in records}
        self.rows = [
            {
                **by_key[line.result.strategy, line.result.num_steps],
                "gain": None if line.gain is None else line.gain.to_dict(),
            }
            for line in self.lines
        ]

    @property
    def title(self) -> str:
        """What was compared, in a line."""
        return f"{self.about['model']['name']}: students against the {self.about['teacher']['num_steps']}-step teacher"

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the schedules, as JSON takes it."""
        return {**self.about, "rows": self.rows}

    def __rich__(self) -> Table:
        return terminal(self.lines, self.title)

    def __str__(self) -> str:
        width = Console(width=10_000).measure(self.__rich__()).maximum
        text = io.StringIO()
        Console(file=text, width=max(width, 80)).print(self)
        return text.getvalue().rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html(self.lines, self.title)


# --------------------------------------------------------------------------------------------------------------
# What is sampled
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Source:
    """A model or a velocity, and its name."""

    name: str
    sampled: Model | BoundVelocity

    @classmethod
    def of(
        cls,
        given: VelocityFn | BoundVelocity | Model | DiffusionPipeline,
        prompts: Sequence[Any] | None = None,
    ) -> _Source:
        if is_pipeline(given):
            if prompts is None:
                raise ValueError(f"a {type(given).__name__} needs prompts=['...', ...]")
            return cls(type(given).__name__, Pipeline(given, prompts))
        if prompts is not None:
            raise ValueError(f"prompts are for pipelines of diffusers, got {_shown(given)}")
        if isinstance(given, Model):
            return cls(given.name, given)
        if isinstance(given, type) or not callable(given):
            raise ValueError(
                f"velocity_or_model must be a function v(x, t) or a Model, got {_shown(given)}"
            )
        name = getattr(given, "__name__", type(given).__name__)
        return cls(
            name,
            given if isinstance(given, BoundVelocity) else BoundVelocity.of(_same_shape(given)),
        )

    @property
    def record(self) -> dict[str, Any]:
        """What the provenance says of it."""
        if isinstance(self.sampled, Model):
            return model_record(self.sampled)
        guidance = {"guidance": {"scale": self.sampled.mix[0]}} if len(self.sampled.mix) > 1 else {}
        return {"name": self.name, **guidance}

    @property
    def strategy(self) -> StepsizeStrategy:
        """What plans where nobody chose. A pipeline draws its noise itself, and takes no analytic start."""
        if not isinstance(self.sampled, Pipeline):
            return OSSBest()
        # Fitted steps would need the image that a strength below 1 begins at, and its scheduler does not know it.
        return OSSBest(start="pinned") if self.sampled.strength == 1 else OSSShared(start="pinned")

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The teacher's where nobody chose."""
        return self.sampled.noise_schedule if isinstance(self.sampled, Pipeline) else FlowSchedule()

    def noises(
        self,
        noise: Tensor | int | None,
        name: str,
        seed: int,
        first: int,
        like: Tensor | None = None,
    ) -> Tensor:
        """(B, *E): these, or so many drawn from sample number `first` on, of the model's or the other noises' shape."""
        if noise is None:
            noise = len(self.sampled.prompts) if isinstance(self.sampled, Pipeline) else 32
        shape = self.sampled.event_shape if isinstance(self.sampled, Model) else None
        if like is not None:
            shape = tuple(like.shape[1:])
        if not isinstance(noise, Tensor):
            _require_count(name, noise, "or a tensor (B, ...)")
            _require_seed(seed)
            if shape is None:
                raise ValueError(
                    f"{name}={noise}: a function does not tell the shape of its noises; give a tensor (B, ...)"
                )
            dataset = NoiseDataset(seed, first, noise, shape, None)
            noise = torch.stack([dataset[i]["noise"] for i in range(noise)])
            noise = noise if like is None else noise.to(like)
        if (
            noise.ndim < 2
            or len(noise) == 0
            or (shape is not None and tuple(noise.shape[1:]) != tuple(shape))
        ):
            wanted = "..." if shape is None else ", ".join(str(size) for size in shape)
            raise ValueError(
                f"{name} must have the shape (B, {wanted}), B at least 1, got {tuple(noise.shape)}"
            )
        if noise.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 or float64, got {noise.dtype}")
        return self.on_device(_finite(noise, name))

    def on_device(self, tensor: Tensor) -> Tensor:
        """The tensor on the model's device; a function's stays where it is."""
        if isinstance(self.sampled, BoundVelocity):
            return tensor
        return tensor.to(
            next(chain(self.sampled.parameters(), self.sampled.buffers()), tensor).device
        )

    def conditions(self, condition: Tensor | None, count: int) -> Tensor | None:
        """A row of `condition` (C, ...) for each of so many noises, in turn."""
        if isinstance(self.sampled, BoundVelocity):
            if condition is not None:
                raise ValueError(
                    "condition is for models; a function, or a BoundVelocity, has its own bound"
                )
            return None
        classes = self.sampled.num_classes
        if condition is None and isinstance(self.sampled, Pipeline):
            condition = torch.arange(len(self.sampled.prompts))
        if condition is None:
            if classes is None or not self.sampled.needs_classes:
                return None
            condition = torch.arange(classes)
        if not isinstance(condition, Tensor) or condition.ndim < 1 or len(condition) == 0:
            raise ValueError(
                f"condition must be a tensor with a row for each condition, got {_shown(condition)}"
            )
        if classes is not None:
            known = (
                condition.ndim == 1
                and not condition.is_floating_point()
                and condition.dtype != torch.bool
            )
            if not known or not bool(((condition >= 0) & (condition < classes)).all()):
                raise ValueError(
                    f"condition must be classes (C,) from 0 to {classes - 1}, got {condition.tolist()}"
                )
        return self.on_device(condition[torch.arange(count) % len(condition)])

    def velocity(self, condition: Tensor | None, count: int) -> BoundVelocity:
        """The velocity of so many samples, which have these conditions."""
        if isinstance(self.sampled, Model):
            return self.sampled.velocity(condition)
        if self.sampled.condition is None:
            return self.sampled
        return self.sampled.subset(torch.arange(count) % len(self.sampled.condition))

    @property
    def num_classes(self) -> int | None:
        """Of a model that has classes."""
        return self.sampled.num_classes if isinstance(self.sampled, Model) else None

    def groups(self, condition: Tensor | None) -> Tensor | None:
        """(B,) which of a schedule's means is each sample's; None: they share one."""
        return None if self.num_classes is None else condition

    def sample(
        self, solver: Solver, steps: StepSchedule, noise: Tensor, condition: Tensor | None
    ) -> Tensor:
        """noise (B, *E) at steps.start_time -> x0."""
        if isinstance(self.sampled, BoundVelocity):
            return solvers.sample(solver, self.velocity(None, len(noise)), noise, steps)
        return self.sampled.sample(solver, steps, noise, condition, self.groups(condition))

    def teacher(
        self, solver: Solver, steps: StepSchedule, noise: Tensor, condition: Tensor | None
    ) -> Tensor:
        """The same by the model that this one was finetuned from, where it was."""
        if isinstance(self.sampled, BoundVelocity):
            return self.sample(solver, steps, noise, None)
        return self.sampled.original.sample(solver, steps, noise, condition)

    def decode(self, x0: Tensor) -> Tensor:
        """x0 (B, *E) -> pixels of a model; what a function samples as it is."""
        return self.sampled.decode(x0) if isinstance(self.sampled, Model) else x0


def _same_shape(function: VelocityFn) -> VelocityFn:
    """The same function; ValueError where it does not return a tensor of x's shape."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v = function(x, t)
        if not isinstance(v, Tensor) or v.shape != x.shape:
            raise ValueError(
                f"the velocity must return a tensor of the shape of x, {tuple(x.shape)}, got {_shown(v)}; "
                "t has a row for each row of x, (M,), and no other dims"
            )
        return v

    return velocity


# --------------------------------------------------------------------------------------------------------------
# Planning and measuring
# --------------------------------------------------------------------------------------------------------------


class _Planner:
    """What all strategies of a search or a comparison share, checked; it plans and measures."""

    def __init__(
        self,
        source: _Source,
        budgets: list[int],
        solver: Solver,
        teacher: NoiseSchedule | None,
        num_teacher_steps: int,
        strategies: Sequence[StepsizeStrategy],
        distance: Distance,
        progress: bool | None,
    ):
        teacher = source.noise_schedule if teacher is None else teacher
        _require("solver", solver, Solver, "Euler()")
        _require("teacher", teacher, NoiseSchedule, "FlowSchedule()")
        _require("distance", distance, Distance, "XtMSE()")
        self.source, self.budgets, self.solver = source, budgets, solver
        self.noise_schedule, self.grid = (
            teacher,
            with_required(teacher.nodes(num_teacher_steps), strategies),
        )
        self.distance = (
            distance.bind(source.sampled) if isinstance(source.sampled, Model) else distance
        )
        self.described_distance = distance
        self.counter = CallCounter(show=sys.stderr.isatty() if progress is None else progress)
        self.taught: list[Problem] = []

    def about(self, condition: Tensor | None, seed: int | None) -> dict[str, Any]:
        """The provenance that all schedules share."""
        classes = None
        if self.source.groups(self.source.conditions(condition, 1)) is not None:
            classes = "all" if condition is None else condition.unique().tolist()
        return provenance(
            model={**self.source.record, "classes": classes},
            teacher={
                "noise_schedule": configuration(self.noise_schedule),
                "num_steps": len(self.grid) - 1,
            },
            solver=configuration(replace(self.solver, calibration=None)),
            distance=configuration(self.described_distance),
            seed=seed,
        )

    def problem(self, noise: Tensor, condition: Tensor | None, first: int = 0) -> Problem:
        """The search on these noises (B, *E), which are samples `first` and following."""
        rows = self.source.conditions(condition, len(noise))
        groups, num_classes = self.source.groups(rows), self.source.num_classes
        return Problem(
            velocity=self.counter.counted(self.source.velocity(rows, len(noise))),
            noise=noise * self.grid[0].to(noise),
            grid=self.grid,
            solver=self.solver,
            distance=self.distance,
            samples=first + torch.arange(len(noise)),
            group=groups,
            num_groups=1 if groups is None or num_classes is None else num_classes,
        )

    def plan(
        self, label: str, strategy: StepsizeStrategy, problem: Problem, about: Mapping[str, Any]
    ) -> dict[int, StepSchedule]:
        """{K: schedule}, with their provenance. The teacher runs before the first strategy that needs it."""
        count = len(problem.noise)
        calls = strategy.network_calls(
            problem.num_nodes, self.budgets, edge_calls(self.solver, self.distance)
        )
        with torch.no_grad():
            if (calls or isinstance(strategy, Profile)) and problem not in self.taught:
                self.taught.append(problem)
                teacher_calls = problem.num_nodes * (
                    self.solver.evals_per_step + self.distance.calls
                )
                with self.counter.measure("teacher", teacher_calls, count):
                    problem.teacher.run()
            with self.counter.measure(label, calls, count):
                plans = strategy.plan(problem, self.budgets)

        cost = self.counter.cost(self.budgets, count, self.counter.rows)
        described = {"name": label, "baseline": strategy.baseline, **configuration(strategy)}
        model = self.source.sampled
        return {
            k: replace(
                steps,
                provenance={
                    **about,
                    **({"native": model.native(steps.times)} if isinstance(model, Model) else {}),
                    "strategy": described,
                    "planning": {**cost, **steps.about("planning")},
                },
            )
            for k, steps in plans.items()
        }

    def measure(
        self,
        runs: Mapping[tuple[str, int], StepSchedule],
        noise: Tensor,
        condition: Tensor | None,
        decode: Callable[[Tensor], Tensor],
        batch_size: int,
    ) -> dict[tuple[str, int], Tensor]:
        """{run: (n, 3) float64}: the number, PSNR and relative spread of the held-out samples that the run is for.

        Of waveforms (n, 4): their spectral distance too.
        """
        grid = StepSchedule(self.grid)
        plain = replace(self.solver, calibration=None)
        noise = noise * self.grid[0].to(noise)
        index = HELD_OUT + torch.arange(len(noise))
        whole = isinstance(self.source.sampled, BoundVelocity) and not self.source.sampled.divisible
        waves = isinstance(
            self.source.sampled, Pipeline
        )  # whose decoded samples have three dims where they are sound
        calls = {run: solvers.nfe(self.solver, steps) for run, steps in runs.items()}
        teacher_calls = solvers.nfe(plain, grid)
        values: dict[tuple[str, int], list[Tensor]] = {run: [] for run in runs}

        with self.counter.measure("held-out", teacher_calls + sum(calls.values()), len(noise)):
            for rows in torch.arange(len(noise)).split(len(noise) if whole else batch_size):
                conditions = None if condition is None else condition[rows]
                part = self._part(rows)
                reference = _finite(
                    part.teacher(plain, grid, noise[rows], conditions), "the teacher's samples"
                )
                images, width = decode(reference), spread(reference)
                self.counter.add(teacher_calls * len(rows))
                for run, steps in runs.items():
                    known = torch.arange(len(rows))
                    if steps.per_sample:
                        known = torch.isin(index[rows], torch.tensor(steps.samples)).nonzero()[:, 0]
                        if len(known) == 0:
                            continue
                        steps = steps.rows(index[rows][known].tolist())
                    own = None if conditions is None else conditions[known]
                    x0 = self._part(rows[known]).sample(self.solver, steps, noise[rows][known], own)
                    x0 = _finite(x0, f"the samples of {run[0]} with {run[1]} steps")
                    ratio = spread(x0) / width[known]
                    decoded = decode(x0)
                    entries = [
                        index[rows][known].double(),
                        psnr(decoded, images[known]).double().cpu(),
                        ratio.cpu(),
                    ]
                    if waves and decoded.ndim == 3:
                        entries.append(spectral_distance(decoded, images[known]).cpu())
                    values[run].append(torch.stack(entries, dim=1))
                    self.counter.add(calls[run] * len(known))
        return {run: torch.cat(parts) for run, parts in values.items()}

    def _part(self, rows: Tensor) -> _Source:
        """The source for these of the held-out samples."""
        bound = self.source.sampled
        if isinstance(bound, Model) or bound.condition is None:
            return self.source
        return replace(self.source, sampled=bound.subset(rows % len(bound.condition)))


# --------------------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------------------


def _budgets(num_steps: int | Sequence[int], num_teacher_steps: int) -> list[int]:
    """Sorted distinct K."""
    _require_count("num_teacher_steps", num_teacher_steps)
    given = num_steps if isinstance(num_steps, list | tuple | range) else [num_steps]
    budgets = [int(k) for k in given if isinstance(k, Integral) and not isinstance(k, bool)]
    if len(budgets) < len(given):
        raise ValueError(
            f"num_steps must be a whole number or a list of them, 5 or [5, 10], got {num_steps!r}"
        )
    return check_num_steps(budgets, num_teacher_steps)


def _require(name: str, value: Any, kind: type, example: str) -> None:
    """ValueError unless value is an instance of this kind, and no class."""
    if isinstance(value, type):
        raise ValueError(
            f"{name} must be an object such as {example}, got the class {value.__name__}; call it"
        )
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__} such as {example}, got {_shown(value)}")


def _require_count(name: str, value: Any, otherwise: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        choices = f"a whole number of at least 1 {otherwise}".rstrip()
        raise ValueError(f"{name} must be {choices}, got {_shown(value)}")


def _require_seed(seed: Any) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0, got {_shown(seed)}")


def _finite(x: Tensor, name: str) -> Tensor:
    """x; ValueError where it holds NaN or infinity."""
    if not bool(x.isfinite().all()):
        raise ValueError(
            f"{name} hold NaN or infinity; check the velocity's dtype, and its values at t = 1 and near 0"
        )
    return x


def _shown(value: Any) -> str:
    """A value for a message: a tensor by its shape."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
