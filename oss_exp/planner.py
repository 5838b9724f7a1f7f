"""The work behind `search`, `sample` and `compare`: check arguments, plan and measure schedules.

`SampledSource` hides whether a model, a diffusers pipeline or a plain velocity is
sampled. `Planner` holds what all strategies of one search or comparison share. Legend:
B noises, n held-out noises, C conditions, K steps, *E event dims.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oss_exp import solvers
from oss_exp.call_counter import CallCounter
from oss_exp.data.noise import HELD_OUT, NoiseDataset
from oss_exp.distances import Distance
from oss_exp.evaluation.comparison import spread
from oss_exp.evaluation.psnr import psnr
from oss_exp.evaluation.spectral import spectral_distance
from oss_exp.models.base import Model
from oss_exp.models.pipeline import Pipeline, is_pipeline
from oss_exp.noise import FlowSchedule, NoiseSchedule
from oss_exp.provenance import configuration, model_record, provenance
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Solver
from oss_exp.stepsize import OSSBest, OSSShared, Problem, Profile, StepsizeStrategy
from oss_exp.stepsize.base import check_num_steps, edge_calls
from oss_exp.stepsize.oss.strategies import with_required
from oss_exp.velocity import BoundVelocity, VelocityFn, joined

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
else:
    DiffusionPipeline = Any  # diffusers is not imported for its name


# --------------------------------------------------------------------------------------------------
# What is sampled
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SampledSource:
    """A model (a pipeline is wrapped as one) or a bound velocity, which is sampled.

    Attributes:
        name: Its name in messages and files.
        sampled: The model or the velocity.
    """

    name: str
    sampled: Model | BoundVelocity

    @classmethod
    def of(
        cls,
        source: VelocityFn | BoundVelocity | Model | DiffusionPipeline,
        prompts: Sequence[Any] | None = None,
    ) -> SampledSource:
        """Wrap what a user passes to `search`, `sample` or `compare`."""
        # A pipeline needs prompts, and only a pipeline.
        if is_pipeline(source):
            if prompts is None:
                raise ValueError(f"a {type(source).__name__} needs prompts=['...', ...]")
            return cls(type(source).__name__, Pipeline(source, prompts))
        if prompts is not None:
            raise ValueError(f"prompts are for pipelines of diffusers, got {shown(source)}")

        # A model.
        if isinstance(source, Model):
            return cls(source.name, source)
        if isinstance(source, type) or not callable(source):
            raise ValueError(
                f"velocity_or_model must be a function v(x, t) or a Model, got {shown(source)}"
            )

        # A function.
        name = getattr(source, "__name__", type(source).__name__)
        if isinstance(source, BoundVelocity):
            return cls(name, source)
        return cls(name, BoundVelocity.of(_with_checked_shape(source)))

    @property
    def record(self) -> dict[str, Any]:
        """The `model` section of the provenance."""
        if isinstance(self.sampled, Model):
            return model_record(self.sampled)
        record: dict[str, Any] = {"name": self.name}
        if len(self.sampled.mix) > 1:
            record["guidance"] = {"scale": self.sampled.mix[0]}
        return record

    @property
    def strategy(self) -> StepsizeStrategy:
        """The default strategy."""
        if not isinstance(self.sampled, Pipeline):
            return OSSBest()
        # A pipeline draws its noise itself, so it cannot start analytically. With a strength
        # below 1 it starts at an image, which fitted steps would need and its scheduler lacks.
        return OSSBest(start="pinned") if self.sampled.strength == 1 else OSSShared(start="pinned")

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The default noise schedule of the teacher."""
        return self.sampled.noise_schedule if isinstance(self.sampled, Pipeline) else FlowSchedule()

    @property
    def num_classes(self) -> int | None:
        """The number of classes of a model that has classes, else None."""
        return self.sampled.num_classes if isinstance(self.sampled, Model) else None

    def noises(
        self,
        noise: Tensor | int | None,
        name: str,
        seed: int,
        first: int,
        like: Tensor | None = None,
    ) -> Tensor:
        """Return noises (B, *E) on the model's device: the given ones, checked, or drawn ones.

        Args:
            noise: The noises, or how many to draw. None draws one for each prompt of a
                pipeline, else 32.
            name: Name of the argument in error messages.
            seed: Seed of drawn noises.
            first: Index of the first drawn sample.
            like: Noises whose event shape and dtype the result must have.
        """
        # Number and shape.
        if noise is None:
            noise = len(self.sampled.prompts) if isinstance(self.sampled, Pipeline) else 32
        shape = self.sampled.event_shape if isinstance(self.sampled, Model) else None
        if like is not None:
            shape = tuple(like.shape[1:])

        # Draw.
        if not isinstance(noise, Tensor):
            require_count(name, noise, "or a tensor (B, ...)")
            _require_seed(seed)
            if shape is None:
                raise ValueError(
                    f"{name}={noise}: a function does not tell the shape of its noises; "
                    "give a tensor (B, ...)"
                )

            dataset = NoiseDataset(seed, first, noise, shape, None)
            noise = torch.stack([dataset[i]["noise"] for i in range(noise)])
            noise = noise if like is None else noise.to(like)

        # Check.
        has_shape = shape is None or tuple(noise.shape[1:]) == tuple(shape)
        if noise.ndim < 2 or len(noise) == 0 or not has_shape:
            event = "..." if shape is None else ", ".join(map(str, shape))
            raise ValueError(
                f"{name} must have the shape (B, {event}), B at least 1, got {tuple(noise.shape)}"
            )
        if noise.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 or float64, got {noise.dtype}")

        return self.on_device(require_finite(noise, name))

    def on_device(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the model's device; for a function, where it is."""
        if isinstance(self.sampled, BoundVelocity):
            return tensor
        weight = next(chain(self.sampled.parameters(), self.sampled.buffers()), tensor)
        return tensor.to(weight.device)

    def conditions(self, condition: Tensor | None, count: int) -> Tensor | None:
        """Return one row of `condition` (C, ...) for each of `count` noises, in turn."""
        # A function takes no conditions.
        if isinstance(self.sampled, BoundVelocity):
            if condition is not None:
                raise ValueError(
                    "condition is for models; a function, or a BoundVelocity, has its own bound"
                )
            return None

        # Default: every prompt, or every class where the model needs one.
        classes = self.sampled.num_classes
        if condition is None and isinstance(self.sampled, Pipeline):
            condition = torch.arange(len(self.sampled.prompts))
        if condition is None:
            if classes is None or not self.sampled.needs_classes:
                return None
            condition = torch.arange(classes)

        # Check.
        if not isinstance(condition, Tensor) or condition.ndim < 1 or len(condition) == 0:
            raise ValueError(
                f"condition must be a tensor with a row for each condition, got {shown(condition)}"
            )
        if classes is not None and not _are_classes(condition, classes):
            raise ValueError(
                f"condition must be classes (C,) from 0 to {classes - 1}, got {condition.tolist()}"
            )

        return self.on_device(condition[torch.arange(count) % len(condition)])

    def velocity(self, condition: Tensor | None, count: int) -> BoundVelocity:
        """Return the velocity of `count` samples with these conditions."""
        if isinstance(self.sampled, Model):
            return self.sampled.velocity(condition)
        if self.sampled.condition is None:
            return self.sampled
        return self.sampled.subset(torch.arange(count) % len(self.sampled.condition))

    def velocity_at_scales(
        self, condition: Tensor | None, scales: Sequence[float]
    ) -> BoundVelocity:
        """Return one velocity of all samples at all scales of guidance, as `joined` orders them."""
        model = self.sampled
        if not isinstance(model, Model) or isinstance(model, Pipeline) or condition is None:
            raise ValueError(
                "guidance is for models that are guided here: a network with classes or prompts; "
                f"{self.name} is none, so search at each scale and keep the schedules apart"
            )
        if isinstance(scales, str) or not isinstance(scales, Sequence) or not len(scales):
            raise ValueError(f"guidance must be scales such as [1, 3, 7], got {shown(scales)}")
        guidances = [replace(model.guidance, scale=scale) for scale in scales]
        return joined([model.velocity(condition, guidance) for guidance in guidances])

    def groups(self, condition: Tensor | None) -> Tensor | None:
        """Return each sample's index into a schedule's means, (B,); None where all share one."""
        return None if self.num_classes is None else condition

    def sample(
        self, solver: Solver, steps: StepSchedule, noise: Tensor, condition: Tensor | None
    ) -> Tensor:
        """Return x0 (B, *E) of noise (B, *E) at steps.start_time."""
        if isinstance(self.sampled, BoundVelocity):
            return solvers.sample(solver, self.velocity(None, len(noise)), noise, steps)
        return self.sampled.sample(solver, steps, noise, condition, self.groups(condition))

    def teacher(
        self, solver: Solver, steps: StepSchedule, noise: Tensor, condition: Tensor | None
    ) -> Tensor:
        """Return the teacher's x0 (B, *E); a finetuned model's teacher is the one before that."""
        if isinstance(self.sampled, BoundVelocity):
            return self.sample(solver, steps, noise, None)
        return self.sampled.original.sample(solver, steps, noise, condition)

    def decode(self, x0: Tensor) -> Tensor:
        """Return a model's pixels of x0 (B, *E); for a function, x0 itself."""
        return self.sampled.decode(x0) if isinstance(self.sampled, Model) else x0

    def part(self, rows: Tensor) -> SampledSource:
        """Return the source for some samples, the rows (b,) of those that it is bound to."""
        bound = self.sampled
        if isinstance(bound, Model) or bound.condition is None:
            return self
        return replace(self, sampled=bound.subset(rows % len(bound.condition)))


def _with_checked_shape(function: VelocityFn) -> VelocityFn:
    """Return the function with a check that its result has the shape of x."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v = function(x, t)
        if not isinstance(v, Tensor) or v.shape != x.shape:
            raise ValueError(
                f"the velocity must return a tensor of the shape of x, {tuple(x.shape)}, "
                f"got {shown(v)}; t has a row for each row of x, (M,), and no other dims"
            )
        return v

    return velocity


def _are_classes(condition: Tensor, num_classes: int) -> bool:
    """Return whether the condition is a vector of class indices."""
    whole = not condition.is_floating_point() and condition.dtype != torch.bool
    if condition.ndim != 1 or not whole:
        return False
    return bool(((condition >= 0) & (condition < num_classes)).all())


# --------------------------------------------------------------------------------------------------
# Planning and measuring
# --------------------------------------------------------------------------------------------------


class Planner:
    """The teacher, solver, distance and call counter that all strategies of a search share.

    Args:
        source: What is sampled.
        budgets: Sorted distinct numbers of steps K.
        solver: Solver of teacher and student.
        teacher: Noise schedule of the teacher. None uses the source's default.
        num_teacher_steps: Number of steps of the teacher. The nodes that strategies
            must visit are added.
        strategies: Strategies that will be planned.
        distance: What a search minimises.
        progress: Whether to draw a progress bar. None draws one on a terminal.
    """

    def __init__(
        self,
        source: SampledSource,
        budgets: list[int],
        solver: Solver,
        teacher: NoiseSchedule | None,
        num_teacher_steps: int,
        strategies: Sequence[StepsizeStrategy],
        distance: Distance,
        progress: bool | None,
    ):
        teacher = source.noise_schedule if teacher is None else teacher
        require_kind("solver", solver, Solver, "Euler()")
        require_kind("teacher", teacher, NoiseSchedule, "FlowSchedule()")
        require_kind("distance", distance, Distance, "XtMSE()")

        self.source = source
        self.budgets = budgets
        self.solver = solver
        self.noise_schedule = teacher
        self.grid = with_required(teacher.nodes(num_teacher_steps), strategies)

        # A distance may look at the model.
        self.unbound_distance = distance
        self.distance = distance
        if isinstance(source.sampled, Model):
            self.distance = distance.bind(source.sampled)

        self.counter = CallCounter(show=sys.stderr.isatty() if progress is None else progress)
        self.taught: list[Problem] = []  # problems whose teacher has run

    def about(
        self, condition: Tensor | None, seed: int | None, guidance: Sequence[float] | None = None
    ) -> dict[str, Any]:
        """Return the provenance that all schedules share."""
        classes = None
        if self.source.groups(self.source.conditions(condition, 1)) is not None:
            classes = "all" if condition is None else condition.unique().tolist()
        at_scales = {} if guidance is None else {"guidance_scales": list(guidance)}
        return provenance(
            model={**self.source.record, **at_scales, "classes": classes},
            teacher={
                "noise_schedule": configuration(self.noise_schedule),
                "num_steps": len(self.grid) - 1,
            },
            solver=configuration(replace(self.solver, calibration=None)),
            distance=configuration(self.unbound_distance),
            seed=seed,
        )

    def problem(
        self,
        noise: Tensor,
        condition: Tensor | None,
        first: int = 0,
        guidance: Sequence[float] | None = None,
    ) -> Problem:
        """Return the search problem of standard normal noises.

        Args:
            noise: (B, *E).
            condition: Conditions (C, ...), which the noises take in turn.
            first: Index of the first sample.
            guidance: G scales. Every noise is then G samples in a row, one at each.
        """
        rows = self.source.conditions(condition, len(noise))
        velocity = self.source.velocity(rows, len(noise))
        if guidance is not None:
            velocity = self.source.velocity_at_scales(rows, guidance)
            noise = noise.repeat_interleave(len(guidance), 0)
            rows = None if rows is None else rows.repeat_interleave(len(guidance), 0)

        groups = self.source.groups(rows)
        num_classes = self.source.num_classes
        return Problem(
            velocity=self.counter.counted(velocity),
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
        """Return {K: schedule} with provenance. Runs the teacher when it is first needed."""
        count = len(problem.noise)
        edge_cost = edge_calls(self.solver, self.distance)
        calls = strategy.network_calls(problem.num_nodes, self.budgets, edge_cost)

        with torch.no_grad():
            # Teacher trajectory.
            needs_teacher = calls or isinstance(strategy, Profile)
            if needs_teacher and problem not in self.taught:
                self.taught.append(problem)
                node_calls = self.solver.evals_per_step + self.distance.calls
                with self.counter.measure("teacher", problem.num_nodes * node_calls, count):
                    problem.teacher.run()

            # Schedules.
            with self.counter.measure(label, calls, count):
                plans = strategy.plan(problem, self.budgets)

        # Provenance.
        description = {"name": label, "baseline": strategy.baseline, **configuration(strategy)}
        cost = self.counter.cost(self.budgets, count, self.counter.rows)
        schedules: dict[int, StepSchedule] = {}
        for k, steps in plans.items():
            record = dict(about)
            if isinstance(self.source.sampled, Model):
                record["native"] = self.source.sampled.native(steps.times)
            record["strategy"] = description
            record["planning"] = {**cost, **steps.about("planning")}
            schedules[k] = replace(steps, provenance=record)
        return schedules

    def measure(
        self,
        runs: Mapping[tuple[str, int], StepSchedule],
        noise: Tensor,
        condition: Tensor | None,
        decode: Callable[[Tensor], Tensor],
        batch_size: int,
    ) -> dict[tuple[str, int], Tensor]:
        """Sample every schedule on held-out noises and compare it with the teacher.

        Args:
            runs: {(label, K): schedule}.
            noise: (n, *E) standard normal held-out noises.
            condition: Condition of each noise, (n, ...), or None.
            decode: Maps x0 (B, *E) to pixels in [0, 1].
            batch_size: Noises sampled at a time. A plain function gets all of them at
                once.

        Returns:
            {(label, K): (n, 3) float64}: sample index, PSNR, and spread relative to the
            teacher's. Waveforms have a fourth column, the spectral distance. A
            per-sample schedule has rows for its own samples only.
        """
        grid = StepSchedule(self.grid)
        teacher_solver = replace(self.solver, calibration=None)
        noise = noise * self.grid[0].to(noise)
        sampled = self.source.sampled
        if isinstance(sampled, BoundVelocity) and not sampled.divisible:
            batch_size = len(noise)

        # Network calls.
        calls = {run: solvers.nfe(self.solver, steps) for run, steps in runs.items()}
        teacher_calls = solvers.nfe(teacher_solver, grid)
        total = teacher_calls + sum(calls.values())

        values: dict[tuple[str, int], list[Tensor]] = {run: [] for run in runs}
        with self.counter.measure("held-out", total, len(noise)):
            for rows in torch.arange(len(noise)).split(batch_size):
                # Teacher.
                conditions = None if condition is None else condition[rows]
                x0 = self.source.part(rows).teacher(teacher_solver, grid, noise[rows], conditions)
                reference = decode(require_finite(x0, "the teacher's samples"))
                width = spread(x0)
                self.counter.add(teacher_calls * len(rows))

                # Students.
                for run, steps in runs.items():
                    positions = _planned_positions(steps, HELD_OUT + rows)
                    if len(positions) == 0:
                        continue
                    part = rows[positions]
                    conditions = None if condition is None else condition[part]
                    x0 = self._student(run, steps, part, noise, conditions)
                    columns = self._columns(
                        x0, decode, part, reference[positions], width[positions]
                    )
                    values[run].append(columns)
                    self.counter.add(calls[run] * len(part))
        return {run: torch.cat(parts) for run, parts in values.items()}

    def _student(
        self,
        run: tuple[str, int],
        steps: StepSchedule,
        rows: Tensor,
        noise: Tensor,
        condition: Tensor | None,
    ) -> Tensor:
        """Return x0 (b, *E) of rows (b,) of the held-out noises (n, *E), by a schedule."""
        if steps.per_sample:
            steps = steps.rows((HELD_OUT + rows).tolist())
        x0 = self.source.part(rows).sample(self.solver, steps, noise[rows], condition)
        return require_finite(x0, f"the samples of {run[0]} with {run[1]} steps")

    def _columns(
        self,
        x0: Tensor,
        decode: Callable[[Tensor], Tensor],
        rows: Tensor,
        reference: Tensor,
        width: Tensor,
    ) -> Tensor:
        """Return the measured values of a batch, (b, 3), or (b, 4) for waveforms."""
        pixels = decode(x0)
        columns = [
            (HELD_OUT + rows).double(),
            psnr(pixels, reference).double().cpu(),
            (spread(x0) / width).cpu(),
        ]
        # Only a pipeline of sounds decodes to three dims, (B, channels, samples).
        if isinstance(self.source.sampled, Pipeline) and pixels.ndim == 3:
            columns.append(spectral_distance(pixels, reference).cpu())
        return torch.stack(columns, dim=1)


def _planned_positions(steps: StepSchedule, index: Tensor) -> Tensor:
    """Return the positions in `index` of the samples that a schedule has times for."""
    if not steps.per_sample:
        return torch.arange(len(index))
    return torch.isin(index, torch.tensor(steps.samples)).nonzero()[:, 0]


# --------------------------------------------------------------------------------------------------
# Checks of arguments
# --------------------------------------------------------------------------------------------------


def distinct_budgets(num_steps: int | Sequence[int], num_teacher_steps: int) -> list[int]:
    """Return the sorted distinct numbers of steps, checked."""
    require_count("num_teacher_steps", num_teacher_steps)
    values = num_steps if isinstance(num_steps, list | tuple | range) else [num_steps]
    budgets: list[int] = []
    for k in values:
        if not isinstance(k, Integral) or isinstance(k, bool):
            raise ValueError(
                "num_steps must be a whole number or a list of them, 5 or [5, 10], "
                f"got {num_steps!r}"
            )
        budgets.append(int(k))
    return check_num_steps(budgets, num_teacher_steps)


def require_kind(name: str, value: Any, kind: type, example: str) -> None:
    """Raise ValueError unless `value` is an instance of `kind`."""
    if isinstance(value, type):
        raise ValueError(
            f"{name} must be an object such as {example}, got the class {value.__name__}; call it"
        )
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__} such as {example}, got {shown(value)}")


def require_count(name: str, value: Any, otherwise: str = "") -> None:
    """Raise ValueError unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        choices = f"a whole number of at least 1 {otherwise}".rstrip()
        raise ValueError(f"{name} must be {choices}, got {shown(value)}")


def _require_seed(seed: Any) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0, got {shown(seed)}")


def require_finite(x: Tensor, name: str) -> Tensor:
    """Return x. Raises ValueError where it holds NaN or infinity."""
    if not bool(x.isfinite().all()):
        raise ValueError(
            f"{name} hold NaN or infinity; "
            "check the velocity's dtype, and its values at t = 1 and near 0"
        )
    return x


def shown(value: Any) -> str:
    """Return a value as text for an error message; a tensor by its shape."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
