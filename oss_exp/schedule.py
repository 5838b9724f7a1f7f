"""The step schedule: the few canonical times at which a student calls the network, how it starts and how it steps.

This is what every strategy returns, what a sampler runs and what is published as JSON with its provenance
(docs/schedule_format.md).

Legend: B samples, K network calls, G conditions, *E event dims. Times are canonical (1 noise, 0 data), float64.
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


# --------------------------------------------------------------------------------------------------------------
# How a student starts
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pinned:
    """A start at the time of the initial noise: the first network call is made there."""

    kind: ClassVar[StartKind] = "pinned"

    def state(self, noise: Tensor, t: Tensor, group: Tensor | None) -> Tensor:
        """Return the state (B, *E) at the first time t, () or (B,): the noise itself."""
        return noise


@dataclass(frozen=True)
class Free:
    """A start that uses the noise of `start_time`, unchanged, as the state at a later first time (OSS, Alg. 1)."""

    kind: ClassVar[StartKind] = "free"

    start_time: float = 1.0

    def state(self, noise: Tensor, t: Tensor, group: Tensor | None) -> Tensor:
        """Return the state (B, *E) at the first time t, () or (B,): the noise itself."""
        return noise


@dataclass(frozen=True, eq=False)
class Analytic:
    """A start by one jump without a network call, along the line from the noise at `start_time` to the mean.

    mean: (G, *E) mean clean sample of each of G conditions at pure noise, or (G,) where it is the same everywhere.
    """

    kind: ClassVar[StartKind] = "analytic"

    mean: Tensor = field(default_factory=lambda: torch.zeros(1))
    start_time: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", _checked_mean(self.mean))

    def state(self, noise: Tensor, t: Tensor, group: Tensor | None) -> Tensor:
        """Return the state (B, *E) at the first time t, () or (B,), for samples of conditions `group` (B,)."""
        return analytic_jump(noise, group_mean(self.mean, noise, group), self.start_time, t)


Start = Pinned | Free | Analytic


# --------------------------------------------------------------------------------------------------------------
# How a student steps
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SolverSteps:
    """Steps of a solver. orders: (K,) or (B, K) order of each step, where a search chose them; None: the solver's own.

    Raises ValueError where an order is below 1 or above the number of calls made so far.
    """

    orders: Tensor | None = None

    def __post_init__(self) -> None:
        if self.orders is None:
            return
        orders = torch.as_tensor(self.orders).clone()
        object.__setattr__(self, "orders", orders)
        if orders.is_floating_point() or orders.ndim not in (1, 2) or bool((orders < 1).any()):
            raise ValueError(f"steps need whole orders of at least 1, got {_listed(orders)}")
        if bool((orders > torch.arange(1, orders.shape[-1] + 1)).any()):
            raise ValueError(
                f"a step's order cannot exceed the calls made so far, got {_listed(orders)}"
            )


@dataclass(frozen=True, eq=False)
class FittedSteps:
    """Steps with coefficients of their own, for all samples.

    weights: (K, P) fitted coefficients of each step, over x, noise, mean and the predictions of x0, newest first
             (see `solvers.sampling.FittedSolver`).
    mean:    (G, *E) as that of `Analytic`.
    Raises ValueError where the weights are not finite or not of this shape.
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
    """The numbers of a message; of many their shape alone."""
    return (
        str(values.tolist()) if values.numel() < 64 else f"a tensor of shape {tuple(values.shape)}"
    )


def _checked_mean(mean: Tensor) -> Tensor:
    """Return the mean as a tensor. ValueError unless it is finite and has a row for each of one or more conditions."""
    mean = torch.as_tensor(mean)
    if (
        not mean.is_floating_point()
        or mean.ndim < 1
        or mean.numel() == 0
        or not bool(mean.isfinite().all())
    ):
        raise ValueError(
            f"a mean needs finite numbers of shape (G, *E) or (G,), got {mean.dtype} {tuple(mean.shape)}"
        )
    return mean


# --------------------------------------------------------------------------------------------------------------
# The schedule
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, init=False)
class StepSchedule:
    """K + 1 strictly decreasing times ending at 0; the network is called at the first K of them.

    times:      (K+1,), or (B, K+1) when every sample has its own (then `samples` names the B sample indices).
    start:      how the first state comes from the initial noise.
    steps:      how each step is taken.
    provenance: what made it: model and weights hash, teacher, solver, strategy, search samples, versions.
    range:      where it was measured to hold, by task=certify.
    Raises ValueError when the times are not finite, in [0, 1], strictly decreasing and closed by 0, or when start or
    steps do not fit them.
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
        times = torch.as_tensor(times, dtype=torch.float64).clone()  # nobody else's to change
        provenance = {} if provenance is None else provenance
        values = {
            "times": times,
            "start": start,
            "steps": steps,
            "samples": samples,
            "provenance": provenance,
        }
        for name, value in (values | {"range": range}).items():
            object.__setattr__(self, name, value)
        shown = f"got {_listed(times)}"

        # Times.
        if times.ndim not in (1, 2) or times.shape[-1] < 2:
            raise ValueError(f"a step schedule needs at least two times, {shown}")
        if not bool(times.isfinite().all()):
            raise ValueError(f"step times must be finite numbers, {shown}")
        if not bool((times.diff(dim=-1) < 0).all()):
            raise ValueError(
                f"step times must strictly decrease (noise to data), {shown}; sort them so, each time once"
            )
        if bool((times[..., -1] != 0).any()):
            raise ValueError(f"the last step time must be 0 (clean data), {shown}")
        if self.samples is not None if times.ndim == 1 else len(times) != len(self.samples or ()):
            raise ValueError(
                "times of shape (B, K+1) need the B indices of their samples, times of shape (K+1,) none"
            )

        if self.samples is not None and (
            len({*self.samples}) < len(self.samples) or min(self.samples, default=0) < 0
        ):
            raise ValueError("samples must be different indices of at least 0")

        # Start and steps are of a kind.
        if not isinstance(self.start, Pinned | Free | Analytic):
            raise ValueError(
                f"start must be Pinned(), Free(time) or Analytic(mean, time), got {self.start!r}"
            )
        if not isinstance(self.steps, SolverSteps | FittedSteps):
            raise ValueError(
                f"steps must be SolverSteps(orders) or FittedSteps(weights, mean), got {self.steps!r}"
            )

        # Start.
        first = times[..., 0]
        if isinstance(self.start, Pinned) and bool((first != first.max()).any()):
            raise ValueError(
                f"samples that start pinned have one first time, {shown}; use start=Free(start_time)"
            )
        if not 0 < self.start_time <= 1 or bool((first > self.start_time).any()):
            raise ValueError(
                f"step times must not exceed start_time={self.start_time} (at most 1), {shown}"
            )

        # Steps.
        if isinstance(self.steps, FittedSteps):
            count = len(self.steps.weights)
            if count != self.num_steps or times.ndim == 2:
                raise ValueError(
                    f"{count} fitted steps are for {count + 1} times of all samples, {shown}"
                )
        elif self.steps.orders is not None and self.steps.orders.shape != times[..., 1:].shape:
            raise ValueError(
                f"the {self.num_steps} steps need an order each, got {_listed(self.steps.orders)}"
            )
        means = [
            part.mean
            for part in (self.start, self.steps)
            if isinstance(part, Analytic | FittedSteps)
        ]
        if len(means) == 2 and not torch.equal(*means):
            raise ValueError("an analytic start and fitted steps need the same mean")

    @property
    def num_steps(self) -> int:
        """K, the number of jumps that call the network."""
        return self.times.shape[-1] - 1

    @property
    def start_time(self) -> float:
        """The time of the initial noise, the teacher's first node."""
        return float(self.times.max()) if isinstance(self.start, Pinned) else self.start.start_time

    @property
    def per_sample(self) -> bool:
        """Whether every sample has times of its own."""
        return self.samples is not None

    @property
    def orders(self) -> Tensor | None:
        """The searched order of each step, (K,) or (B, K); None where steps are fitted or have the solver's own."""
        return self.steps.orders if isinstance(self.steps, SolverSteps) else None

    @property
    def kind(self) -> str:
        """The start and the steps in words, such as "analytic start, fitted steps"."""
        return f"{self.start.kind} start" + ", fitted steps" * isinstance(self.steps, FittedSteps)

    @property
    def mean(self) -> Tensor | None:
        """The (G, *E) mean that an analytic start or fitted steps use, None where there is neither."""
        parts = (self.start, self.steps)
        return next((part.mean for part in parts if isinstance(part, Analytic | FittedSteps)), None)

    def about(self, section: str) -> Mapping[str, Any]:
        """Return a section of the provenance, such as "model" or "strategy"; empty where there is none."""
        content = self.provenance.get(section)
        return content if isinstance(content, Mapping) else {}

    def initial_state(self, noise: Tensor, group: Tensor | None = None) -> Tensor:
        """Return the state (B, *E) at times[0] for noise (B, *E) at start_time.

        group: (B,) the condition of each sample, default all 0.
        """
        return self.start.state(noise, self.times[..., 0].to(noise.device), group)

    def with_own_orders(self) -> StepSchedule:
        """Return the schedule with steps of the solver's own orders, whatever a search chose; fitted steps stay."""
        return replace(self, steps=SolverSteps()) if isinstance(self.steps, SolverSteps) else self

    def with_mean(self, mean: Tensor) -> StepSchedule:
        """Return the schedule with another mean in its analytic start and its fitted steps, whichever it has."""
        start = replace(self.start, mean=mean) if isinstance(self.start, Analytic) else self.start
        steps = (
            replace(self.steps, mean=mean) if isinstance(self.steps, FittedSteps) else self.steps
        )
        return replace(self, start=start, steps=steps)

    def rows(self, samples: list[int]) -> StepSchedule:
        """Return the per-sample schedule cut to these sample indices, in their order."""
        position = {sample: row for row, sample in enumerate(self.samples or ())}
        if missing := [sample for sample in samples if sample not in position]:
            raise ValueError(f"the schedule has no times of its own for samples {missing[:5]}")
        rows = [position[sample] for sample in samples]
        steps = self.steps
        if isinstance(steps, SolverSteps) and steps.orders is not None:
            steps = SolverSteps(steps.orders[rows])
        return replace(self, times=self.times[rows], samples=tuple(samples), steps=steps)

    def scheduler(self, own: Any) -> OSSScheduler:
        """Return a scheduler of diffusers that runs these steps, in place of a pipeline's `own`.

        `pipe.scheduler = steps.scheduler(pipe.scheduler)`, then `pipe(..., num_inference_steps=steps.num_steps)`.
        Raises ValueError where `own` does not say how the network was trained, or what it says is not known.
        """
        module = import_module(
            "oss_exp.export.oss_scheduler"
        )  # which is above: schedules themselves need no diffusers
        if isinstance(own, module.OSSScheduler):
            raise ValueError(
                "the pipeline's scheduler is an OSSScheduler already; give the one that it came with"
            )
        if isinstance(own, type) or not hasattr(own, "config") or not hasattr(own, "set_timesteps"):
            raise ValueError(
                f"own must be a scheduler of diffusers, such as pipe.scheduler, got {own!r:.80}"
            )
        made = module.OSSScheduler.from_schedule(
            self, {**own.config, "_class_name": type(own).__name__}
        )
        clock = self.about("native").get("clock")
        if clock is not None and (clock == "flow time") != made.flow:
            kinds = {True: "flow matching", False: "noise prediction"}
            raise ValueError(
                f"the schedule was searched on a network of {kinds[not made.flow]}, and {type(own).__name__} is of one "
                f"of {kinds[made.flow]}; use it in the pipeline that it was searched in, or search again"
            )
        return made

    def save(self, path: str | Path) -> Path:
        """Write JSON (and, where there is a mean, `<name>.mean.safetensors` first), each file whole or not at all."""
        path = Path(path)
        mean = None
        if self.mean is not None:
            mean_path = beside(path, ".mean.safetensors")
            digest = save_asset(mean_path, {"mean": self.mean.cpu()}, {"made_by": path.name})
            mean = MeanFile(file=mean_path.name, sha256=digest)
        start: dict[str, Any] = {"kind": self.start.kind}
        if not isinstance(self.start, Pinned):
            start["start_time"] = self.start.start_time
        if isinstance(self.start, Analytic):
            start["mean"] = mean
        if isinstance(self.steps, FittedSteps):
            steps = {"kind": "fitted", "weights": self.steps.weights.tolist(), "mean": mean}
        else:
            orders = self.steps.orders
            steps = {"kind": "solver", "orders": None if orders is None else orders.tolist()}
        content = {
            "times": self.times.tolist(),
            "samples": self.samples,
            "start": start,
            "steps": steps,
        }
        content |= {"provenance": dict(self.provenance), "range": self.range}
        try:
            record = ScheduleFile.model_validate(content)
        except ValidationError as error:
            reason = describe(error, given=content)
            raise ValueError(
                f"the step schedule cannot be saved as {path}: field {reason}"
            ) from None
        written = record.model_dump(exclude={"range"} if record.range is None else None)
        return write_atomically(path, json.dumps(written, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> StepSchedule:
        """Read what `save` wrote, in this version or version 2. Errors name the file, the fault and the remedy.

        Raises FileNotFoundError where the file or its mean is missing, ValueError where one is damaged.
        """
        path = Path(path)
        record, mean = read_schedule_file(path)
        try:
            if record.start.kind == "analytic":
                assert mean is not None
                start: Start = Analytic(mean, record.start.start_time)
            else:
                start = Pinned() if record.start.kind == "pinned" else Free(record.start.start_time)
            if record.steps.kind == "fitted":
                assert mean is not None
                steps: Steps = FittedSteps(
                    torch.tensor(record.steps.weights, dtype=torch.float64), mean
                )
            else:
                orders = record.steps.orders
                steps = SolverSteps(None if orders is None else torch.tensor(orders))
            times = torch.tensor(record.times, dtype=torch.float64)
            return cls(times, start, steps, record.samples, record.provenance, record.range)
        except (TypeError, ValueError) as error:
            raise ValueError(f"step schedule {path}: {error}") from None


def group_mean(mean: Tensor, noise: Tensor, group: Tensor | None) -> Tensor:
    """Return the mean of each sample's condition, (B, *E) like the noise, from means (G, *E) or (G,).

    group: (B,) condition of each sample; None: all have condition 0, and there must be only one.
    """
    shape = tuple(mean.shape[1:])
    if shape and shape != tuple(noise.shape[1:]):
        raise ValueError(
            f"the schedule's mean has shape {shape}, the noise {tuple(noise.shape[1:])}; plan it for this model"
        )
    conditions = 1 if group is None else int(group.max()) + 1
    if conditions > len(mean) or (group is None and len(mean) > 1):
        raise ValueError(
            f"the schedule has means for {len(mean)} condition(s), the run "
            f"{'has no conditions' if group is None else f'asks for condition {conditions - 1}'}; "
            "plan it with the same classes (data.classes)"
        )
    rows = mean.to(noise)[torch.zeros(len(noise), dtype=torch.long) if group is None else group]
    return rows if shape else rowwise(rows, noise).expand_as(noise)


def analytic_jump(noise: Tensor, mean: Tensor, start_time: float, t: Tensor) -> Tensor:
    """Return the Euler jump from the noise at start_time to t when the clean prediction is `mean`.

    noise and mean (B, *E), t () or (B,). x_t = (t / t_N) z + (1 - t / t_N) mean: what a network call at pure noise,
    which can only answer the mean, gives.
    """
    ratio = rowwise(t / start_time, noise)
    return ratio * noise + (1 - ratio) * mean
