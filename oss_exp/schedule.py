"""Step schedules: the times of a few-step student, and how it starts and takes its steps.

Every strategy returns a `StepSchedule`, and every sampler runs one. It is saved as JSON
with its provenance (docs/schedule_format.md). Legend: B samples, K steps, G conditions,
P weights of a fitted step, *E event dims. Times are canonical (1 noise, 0 data) and float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from oss_exp.files import beside, save_asset, write_atomically
from oss_exp.schedule_file import Certificate, MeanFile, ScheduleFile, read_schedule_file
from oss_exp.tensors import rowwise
from oss_exp.validation import describe

if TYPE_CHECKING:
    from oss_exp.export.oss_scheduler import OSSScheduler

StartKind = Literal["free", "pinned", "analytic"]


# --------------------------------------------------------------------------------------------------
# Starts
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pinned:
    """A start at the time of the initial noise, where the first network call is made."""

    kind: ClassVar[StartKind] = "pinned"

    def state(self, noise: Tensor, t: Tensor, group: Tensor | None) -> Tensor:
        """Return the noise, which is the state (B, *E) at the first time t, () or (B,)."""
        return noise


@dataclass(frozen=True)
class Free:
    """A start that uses the initial noise unchanged as the state at a later time (OSS, Alg. 1).

    Attributes:
        start_time: Time of the initial noise.
    """

    kind: ClassVar[StartKind] = "free"

    start_time: float = 1.0

    def state(self, noise: Tensor, t: Tensor, group: Tensor | None) -> Tensor:
        """Return the noise, which is the state (B, *E) at the first time t, () or (B,)."""
        return noise


@dataclass(frozen=True, eq=False)
class Analytic:
    """A start by one jump towards the mean, which needs no network call.

    Attributes:
        mean: (G, *E) mean clean sample of each of G conditions at pure noise; (G,)
            where it is the same in every element.
        start_time: Time of the initial noise.
    """

    kind: ClassVar[StartKind] = "analytic"

    mean: Tensor = field(default_factory=lambda: torch.zeros(1))
    start_time: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", _checked_mean(self.mean))

    def state(self, noise: Tensor, t: Tensor, group: Tensor | None) -> Tensor:
        """Return the state (B, *E) at the first time.

        Args:
            noise: (B, *E) initial noise at `start_time`.
            t: First time, () or (B,).
            group: (B,) condition of each sample; None where there is only one.
        """
        return analytic_jump(noise, group_mean(self.mean, noise, group), self.start_time, t)


Start = Pinned | Free | Analytic


# --------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SolverSteps:
    """Steps of a solver, each with its own order where a search chose one.

    Attributes:
        orders: (K,) or (B, K) order of each step; None uses the solver's own orders.

    Raises:
        ValueError: If an order is below 1 or above the number of calls made before the
            step ends.
    """

    orders: Tensor | None = None

    def __post_init__(self) -> None:
        if self.orders is None:
            return
        orders = torch.as_tensor(self.orders).clone()
        object.__setattr__(self, "orders", orders)
        if orders.is_floating_point() or orders.ndim not in (1, 2) or bool((orders < 1).any()):
            raise ValueError(f"steps need whole orders of at least 1, got {_listed(orders)}")
        calls = torch.arange(1, orders.shape[-1] + 1)
        if bool((orders > calls).any()):
            raise ValueError(
                f"a step's order cannot exceed the calls made so far, got {_listed(orders)}"
            )


@dataclass(frozen=True, eq=False)
class FittedSteps:
    """Steps with their own fitted coefficients, the same for all samples.

    Attributes:
        weights: (K, P) coefficients of each step: of the state x, the initial noise,
            the mean, and the predictions of x0, newest first (see
            `solvers.sampling.FittedSolver`).
        mean: (G, *E) or (G,), as in `Analytic`.

    Raises:
        ValueError: If the weights are not finite or not a matrix with at least 4
            columns.
    """

    weights: Tensor = field(default_factory=lambda: torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    mean: Tensor = field(default_factory=lambda: torch.zeros(1))

    def __post_init__(self) -> None:
        weights = torch.as_tensor(self.weights, dtype=torch.float64).clone()
        object.__setattr__(self, "weights", weights)
        if weights.ndim != 2 or weights.shape[1] < 4 or not bool(weights.isfinite().all()):
            raise ValueError(
                f"fitted steps need a row of at least 4 finite weights each, got {_listed(weights)}"
            )
        object.__setattr__(self, "mean", _checked_mean(self.mean))


Steps = SolverSteps | FittedSteps


def _listed(values: Tensor) -> str:
    """Return the values for an error message; only the shape of a large tensor."""
    if values.numel() < 64:
        return str(values.tolist())
    return f"a tensor of shape {tuple(values.shape)}"


def _checked_mean(mean: Tensor) -> Tensor:
    """Return the mean as a tensor. Raises ValueError unless it is finite, (G, *E) or (G,)."""
    mean = torch.as_tensor(mean)
    has_shape = mean.ndim >= 1 and mean.numel() > 0
    if not (mean.is_floating_point() and has_shape and bool(mean.isfinite().all())):
        raise ValueError(
            "a mean needs finite numbers of shape (G, *E) or (G,), "
            f"got {mean.dtype} {tuple(mean.shape)}"
        )
    return mean


# --------------------------------------------------------------------------------------------------
# The schedule
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, init=False, repr=False)
class StepSchedule:
    """K + 1 strictly decreasing times that end at 0; the network is called at the first K.

    A schedule is frozen and checked when it is made. `save` writes it as JSON, `load`
    reads it.

    Attributes:
        times: (K+1,), or (B, K+1) where every sample has its own times.
        start: How the first state comes from the initial noise.
        steps: How each step is taken.
        samples: Indices of the B samples for times (B, K+1), else None.
        provenance: Model and hash of its weights, teacher, solver, strategy, search
            samples and versions.
        range: Where the schedule was measured to hold, by task=certify.

    Raises:
        ValueError: If the times are not finite, in [0, 1] and strictly decreasing to 0,
            or start or steps do not fit them.
    """

    times: Tensor
    start: Start
    steps: Steps
    samples: tuple[int, ...] | None
    provenance: Mapping[str, Any]
    range: Certificate | None

    def __init__(
        self,
        times: Tensor | Sequence[float] | Sequence[Sequence[float]] = (1.0, 0.0),
        start: Start = Pinned(),
        steps: Steps = SolverSteps(),
        samples: tuple[int, ...] | None = None,
        provenance: Mapping[str, Any] | None = None,
        range: Certificate | None = None,
    ):
        # The schedule has a copy of the times, which the caller cannot change.
        copied_times = torch.as_tensor(times, dtype=torch.float64).clone()
        values = {
            "times": copied_times,
            "start": start,
            "steps": steps,
            "samples": samples,
            "provenance": {} if provenance is None else provenance,
            "range": range,
        }
        for name, value in values.items():  # the dataclass is frozen
            object.__setattr__(self, name, value)

        # Checks, in the order in which they build on one another.
        self._check_times()
        self._check_samples()
        self._check_kinds()
        self._check_start()
        self._check_steps()

    def _check_times(self) -> None:
        """Raise ValueError unless the times are finite and strictly decrease to 0."""
        times = self.times
        if times.ndim not in (1, 2) or times.shape[-1] < 2:
            raise ValueError(f"a step schedule needs at least two times, got {_listed(times)}")
        if not bool(times.isfinite().all()):
            raise ValueError(f"step times must be finite numbers, got {_listed(times)}")
        if not bool((times.diff(dim=-1) < 0).all()):
            raise ValueError(
                f"step times must strictly decrease (noise to data), got {_listed(times)}; "
                "sort them in decreasing order, each once"
            )
        if bool((times[..., -1] != 0).any()):
            raise ValueError(f"the last step time must be 0 (clean data), got {_listed(times)}")

    def _check_samples(self) -> None:
        """Raise ValueError unless times (B, K+1) have B sample indices, and times (K+1,) none."""
        samples = () if self.samples is None else self.samples
        are_shared = self.times.ndim == 1
        if are_shared != (self.samples is None) or (
            not are_shared and len(samples) != len(self.times)
        ):
            raise ValueError(
                "times of shape (B, K+1) need the B indices of their samples, "
                "times of shape (K+1,) none"
            )
        if len({*samples}) < len(samples) or min(samples, default=0) < 0:
            raise ValueError("samples must be different indices of at least 0")

    def _check_kinds(self) -> None:
        """Raise ValueError unless start and steps are of the known kinds."""
        if not isinstance(self.start, Pinned | Free | Analytic):
            raise ValueError(
                f"start must be Pinned(), Free(time) or Analytic(mean, time), got {self.start!r}"
            )
        if not isinstance(self.steps, SolverSteps | FittedSteps):
            raise ValueError(
                "steps must be SolverSteps(orders) or FittedSteps(weights, mean), "
                f"got {self.steps!r}"
            )

    def _check_start(self) -> None:
        """Raise ValueError unless the first times fit the start."""
        first = self.times[..., 0]
        if isinstance(self.start, Pinned) and bool((first != first.max()).any()):
            raise ValueError(
                f"samples that start pinned have one first time, got {_listed(self.times)}; "
                "use start=Free(start_time)"
            )
        if not 0 < self.start_time <= 1 or bool((first > self.start_time).any()):
            raise ValueError(
                f"step times must not exceed start_time={self.start_time} (at most 1), "
                f"got {_listed(self.times)}"
            )

    def _check_steps(self) -> None:
        """Raise ValueError unless there is one order or row of weights for every step."""
        # Fitted steps.
        if isinstance(self.steps, FittedSteps):
            count = len(self.steps.weights)
            if count != self.num_steps or self.times.ndim == 2:
                raise ValueError(
                    f"{count} fitted steps are for {count + 1} times of all samples, "
                    f"got {_listed(self.times)}"
                )
            if isinstance(self.start, Analytic) and not torch.equal(
                self.start.mean, self.steps.mean
            ):
                raise ValueError("an analytic start and fitted steps need the same mean")

        # Steps of a solver.
        elif self.steps.orders is not None and self.steps.orders.shape != self.times[..., 1:].shape:
            raise ValueError(
                f"the {self.num_steps} steps need an order each, got {_listed(self.steps.orders)}"
            )

    def __repr__(self) -> str:
        """Return the times to four digits, or their shape, and the kinds of start and steps."""
        times = f"shape {tuple(self.times.shape)}"
        if self.times.ndim == 1:
            times = "[" + ", ".join(f"{t:.4g}" for t in self.times.tolist()) + "]"
        parts = [f"times={times}", f"start={self.start.kind}"]
        if isinstance(self.steps, FittedSteps):
            parts.append("steps=fitted")
        elif self.orders is not None and self.orders.ndim == 1:
            parts.append(f"orders={self.orders.tolist()}")
        return f"StepSchedule({', '.join(parts)})"

    @property
    def num_steps(self) -> int:
        """K, the number of steps; the jump of an analytic start is none."""
        return self.times.shape[-1] - 1

    @property
    def start_time(self) -> float:
        """The time of the initial noise, which is the teacher's first node."""
        return float(self.times.max()) if isinstance(self.start, Pinned) else self.start.start_time

    @property
    def per_sample(self) -> bool:
        """True where every sample has its own times."""
        return self.samples is not None

    @property
    def orders(self) -> Tensor | None:
        """The searched order of each step, (K,) or (B, K).

        None where the steps are fitted or have the solver's own orders.
        """
        return self.steps.orders if isinstance(self.steps, SolverSteps) else None

    @property
    def kind(self) -> str:
        """The start and the steps in words, such as "analytic start, fitted steps"."""
        return f"{self.start.kind} start" + ", fitted steps" * isinstance(self.steps, FittedSteps)

    @property
    def mean(self) -> Tensor | None:
        """The mean (G, *E) that an analytic start or fitted steps use, else None."""
        if isinstance(self.start, Analytic):
            return self.start.mean
        return self.steps.mean if isinstance(self.steps, FittedSteps) else None

    def about(self, section: str) -> Mapping[str, Any]:
        """Return a section of the provenance, such as "model", or an empty mapping."""
        content = self.provenance.get(section)
        return content if isinstance(content, Mapping) else {}

    def initial_state(self, noise: Tensor, group: Tensor | None = None) -> Tensor:
        """Return the state (B, *E) at times[0].

        Args:
            noise: (B, *E) initial noise at start_time.
            group: (B,) condition of each sample; None where there is only one.
        """
        return self.start.state(noise, self.times[..., 0].to(noise.device), group)

    def with_own_orders(self) -> StepSchedule:
        """Return the schedule with the solver's own orders; fitted steps stay as they are."""
        return replace(self, steps=SolverSteps()) if isinstance(self.steps, SolverSteps) else self

    def with_mean(self, mean: Tensor) -> StepSchedule:
        """Return the schedule with another mean in its analytic start and its fitted steps."""
        start = self.start
        if isinstance(start, Analytic):
            start = replace(start, mean=mean)
        steps = self.steps
        if isinstance(steps, FittedSteps):
            steps = replace(steps, mean=mean)
        return replace(self, start=start, steps=steps)

    def rows(self, samples: list[int]) -> StepSchedule:
        """Return the per-sample schedule of these sample indices, in their order.

        Raises:
            ValueError: If the schedule has no times for one of the samples.
        """
        position = {sample: row for row, sample in enumerate(self.samples or ())}
        if missing := [sample for sample in samples if sample not in position]:
            raise ValueError(f"the schedule has no times for samples {missing[:5]}")
        rows = [position[sample] for sample in samples]
        steps = self.steps
        if isinstance(steps, SolverSteps) and steps.orders is not None:
            steps = SolverSteps(steps.orders[rows])
        return replace(self, times=self.times[rows], samples=tuple(samples), steps=steps)

    def scheduler(self, own: Any) -> OSSScheduler:
        """Return a diffusers scheduler that runs these steps.

        Assign it with `pipe.scheduler = steps.scheduler(pipe.scheduler)`, then call
        `pipe(..., num_inference_steps=steps.num_steps)`.

        Args:
            own: The scheduler that the pipeline came with.

        Raises:
            ValueError: If `own` does not say how the network was trained, or says
                something that is not supported.
        """
        # This module lies below `export`, and schedules themselves do not need diffusers.
        module = import_module("oss_exp.export.oss_scheduler")
        if isinstance(own, module.OSSScheduler):
            raise ValueError(
                "the pipeline's scheduler is an OSSScheduler already; "
                "give the one that it came with"
            )
        if isinstance(own, type) or not hasattr(own, "config") or not hasattr(own, "set_timesteps"):
            raise ValueError(
                f"own must be a scheduler of diffusers, such as pipe.scheduler, got {own!r:.80}"
            )

        config = {**own.config, "_class_name": type(own).__name__}
        scheduler = module.OSSScheduler.from_schedule(self, config)

        # The schedule and the pipeline must be of the same kind of network.
        clock = self.about("native").get("clock")
        if clock is not None and (clock == "flow time") != scheduler.flow:
            kinds = {True: "flow matching", False: "noise prediction"}
            raise ValueError(
                f"the schedule was searched on a network of {kinds[not scheduler.flow]}, "
                f"and {type(own).__name__} is for {kinds[scheduler.flow]}; "
                "use it in the pipeline that it was searched in, or search again"
            )
        return scheduler

    def save(self, path: str | Path) -> Path:
        """Write the schedule as JSON, each file whole or not at all.

        A mean goes into `<name>.mean.safetensors` beside it, which is written first.

        Returns:
            The path of the JSON file.

        Raises:
            ValueError: If the schedule does not fit the file format, such as too many
                steps.
            OSError: If a file cannot be written.
        """
        path = Path(path)

        # Mean.
        mean = None
        if self.mean is not None:
            mean_path = beside(path, ".mean.safetensors")
            digest = save_asset(mean_path, {"mean": self.mean.cpu()}, {"made_by": path.name})
            mean = MeanFile(file=mean_path.name, sha256=digest)

        # Record.
        content = {
            "times": self.times.tolist(),
            "samples": self.samples,
            "start": self._start_content(mean),
            "steps": self._steps_content(mean),
            "provenance": dict(self.provenance),
            "range": self.range,
        }
        try:
            record = ScheduleFile.model_validate(content)
        except ValidationError as error:
            reason = describe(error, given=content)
            raise ValueError(
                f"the step schedule cannot be saved as {path}: field {reason}"
            ) from None

        fields = record.model_dump(exclude={"range"} if record.range is None else None)
        return write_atomically(path, json.dumps(fields, indent=2) + "\n")

    def _start_content(self, mean: MeanFile | None) -> dict[str, Any]:
        """Return the `start` field of the file."""
        content: dict[str, Any] = {"kind": self.start.kind}
        if not isinstance(self.start, Pinned):
            content["start_time"] = self.start.start_time
        if isinstance(self.start, Analytic):
            content["mean"] = mean
        return content

    def _steps_content(self, mean: MeanFile | None) -> dict[str, Any]:
        """Return the `steps` field of the file."""
        if isinstance(self.steps, FittedSteps):
            return {"kind": "fitted", "weights": self.steps.weights.tolist(), "mean": mean}
        orders = self.steps.orders
        return {"kind": "solver", "orders": None if orders is None else orders.tolist()}

    @classmethod
    def load(cls, path: str | Path) -> StepSchedule:
        """Read a file that `save` wrote, of this version or version 2.

        Raises:
            FileNotFoundError: If the file or its mean is missing.
            ValueError: If one of them is damaged. The message names the file, the fault
                and the remedy.
        """
        path = Path(path)
        record, mean = read_schedule_file(path)
        try:
            # Start.
            if record.start.kind == "analytic":
                assert mean is not None
                start: Start = Analytic(mean, record.start.start_time)
            else:
                start = Pinned() if record.start.kind == "pinned" else Free(record.start.start_time)

            # Steps.
            if record.steps.kind == "fitted":
                assert mean is not None
                weights = torch.tensor(record.steps.weights, dtype=torch.float64)
                steps: Steps = FittedSteps(weights, mean)
            else:
                orders = record.steps.orders
                steps = SolverSteps(None if orders is None else torch.tensor(orders))

            times = torch.tensor(record.times, dtype=torch.float64)
            return cls(times, start, steps, record.samples, record.provenance, record.range)
        except (TypeError, ValueError) as error:
            raise ValueError(f"step schedule {path}: {error}") from None


def group_mean(mean: Tensor, noise: Tensor, group: Tensor | None) -> Tensor:
    """Return the mean of each sample's condition.

    Args:
        mean: Means of the G conditions, (G, *E) or (G,).
        noise: (B, *E), whose shape and dtype the result has.
        group: (B,) condition of each sample; None where there is only one.

    Raises:
        ValueError: If the means have another shape, there are too few of them, or there
            are several and no group chooses among them.
    """
    # Shape.
    event_shape = tuple(mean.shape[1:])
    if event_shape and event_shape != tuple(noise.shape[1:]):
        raise ValueError(
            f"the schedule's mean has shape {event_shape}, the noise {tuple(noise.shape[1:])}; "
            "plan it for this model"
        )

    # Number of conditions.
    conditions = 1 if group is None else int(group.max()) + 1
    if conditions > len(mean) or (group is None and len(mean) > 1):
        request = "has no conditions" if group is None else f"asks for condition {conditions - 1}"
        raise ValueError(
            f"the schedule has means for {len(mean)} condition(s), the run {request}; "
            "plan it with the same classes (data.classes)"
        )

    # Rows.
    if group is None:
        group = torch.zeros(len(noise), dtype=torch.long)
    rows = mean.to(noise)[group]
    return rows if event_shape else rowwise(rows, noise).expand_as(noise)


def analytic_jump(noise: Tensor, mean: Tensor, start_time: float, t: Tensor) -> Tensor:
    """Return the state (B, *E) at t after an Euler step from noise towards the mean.

    At pure noise the best prediction of the clean sample is the mean, so the step needs
    no network call: x = (t / t_0) z + (1 - t / t_0) mean.

    Args:
        noise: z, (B, *E), at start_time.
        mean: (B, *E) mean clean sample of each sample's condition.
        start_time: t_0, the time of the noise.
        t: time to reach, () or (B,).
    """
    ratio = rowwise(t / start_time, noise)
    return ratio * noise + (1 - ratio) * mean
