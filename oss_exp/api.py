"""The three main functions: search a step schedule, sample with it, compare it with others.

They take a model, a pipeline of diffusers (`search` and `compare`), or a plain velocity
v(x (M, *E), t (M,)) -> (M, *E) in canonical time: x_t = (1 - t) x0 + t eps and
v = eps - x0, with noise at t = 1 and data at t = 0. Noises are standard normal; a
teacher or a schedule that begins below t = 1 scales them. Legend: B noises, M rows of a
call, C conditions, K steps, N teacher steps, *E event dims.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, overload

from rich.console import Console
from rich.table import Table
from torch import Tensor

from oss_exp import solvers
from oss_exp.data.noise import HELD_OUT
from oss_exp.distances import Distance, XtMSE
from oss_exp.evaluation.comparison import Line, Result, html, measured, terminal, with_gains
from oss_exp.models.base import Model
from oss_exp.noise import DDIMSchedule, EDMSchedule, FlowSchedule, LogSNRSchedule, NoiseSchedule
from oss_exp.planner import (
    Planner,
    SampledSource,
    distinct_budgets,
    require_count,
    require_finite,
    require_kind,
    shown,
)
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Solver
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.stepsize import ClosedForm, OSSBest, Problem, StepsizeStrategy
from oss_exp.stepsize.base import DoesNotFit
from oss_exp.stepsize.baselines.gits import GITS
from oss_exp.stepsize.oss.strategies import visiting
from oss_exp.velocity import BoundVelocity, VelocityFn

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
else:
    DiffusionPipeline = Any  # diffusers is not imported for its name

PER_SAMPLE = 32  # most held-out noises for strategies that plan a schedule for each sample


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
    guidance: Sequence[float] | None = ...,
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
    guidance: Sequence[float] | None = ...,
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
    guidance: Sequence[float] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> StepSchedule | dict[int, StepSchedule]:
    """Search the step schedule of `num_steps` steps that ends closest to a teacher.

    The teacher is a run of many steps. The schedule's times are chosen from the
    teacher's times so that few steps end as close to it as possible. The defaults suit
    `sample` and `OSSScheduler`. For programs that take only a list of times
    (ComfyUI, k-diffusion) pass `solver=Euler(), strategy=OSSShared(start="pinned")`.

    Args:
        velocity_or_model: A function v(x (M, *E), t (M,)) -> (M, *E), a
            `BoundVelocity`, a `Model`, or a pipeline of diffusers. A size or guidance
            scale for a pipeline goes into `Pipeline(pipe, prompts, guidance_scale=3)`,
            which is a `Model`.
        noise: Standard normal noises (B, *E), float32 or float64. For a model also how
            many to draw; None draws 32, or one for each prompt of a pipeline.
        num_steps: K, the number of steps, or several numbers, which one search serves.
            A step is one network call with most solvers.
        prompts: Prompts of a pipeline of diffusers; required for one.
        solver: Solver of teacher and student. It searches without its calibration. The
            default, DPM-Solver++ of order up to 2, is far better than Euler at few
            steps.
        teacher: Where the teacher's times lie. None uses a pipeline's own times, else
            `FlowSchedule()`.
        num_teacher_steps: N, the number of steps of the teacher.
        strategy: How schedules are planned. None uses `OSSBest()`. For a pipeline,
            which draws its noise itself, it uses `OSSBest(start="pinned")`, and
            `OSSShared(start="pinned")` if the pipeline starts at an image
            (`strength` below 1). A schedule of a strategy that plans for each sample,
            such as `OSS`, is for these noises only.
        must_visit: Times t at which the schedule must call the network, such as the
            switch between two experts. The teacher gets nodes there.
        first_sigmas: First times of the schedule, where a distilled model prescribes
            them. The search chooses the remaining ones.
        distance: What the search minimises between student and teacher.
        condition: Conditions (C, ...) of a model, such as classes (C,); the noises take
            them in turn. None uses every class in turn for a model that needs one.
        guidance: Scales of classifier-free guidance, such as [1, 3, 7]: one schedule is
            searched for all of them, each noise at each scale. None searches at the
            model's own scale, and the schedule is best used at that scale.
        seed: Seed of drawn noises.
        progress: Whether to draw a progress bar on stderr. None draws one on a
            terminal.

    Returns:
        The schedule. If `num_steps` is a sequence, a dict {K: schedule}.

    Raises:
        ValueError: If an argument has a wrong type, shape or range, or the velocity
            gives NaN or infinity.

    Example:
        >>> steps = oss_exp.search(velocity, torch.randn(32, 3, 32, 32), num_steps=5)
        >>> steps.save("steps.json")
    """
    source = SampledSource.of(velocity_or_model, prompts)
    budgets = distinct_budgets(num_steps, num_teacher_steps)

    # Strategy.
    strategy = source.strategy if strategy is None else strategy
    require_kind("strategy", strategy, StepsizeStrategy, "OSSBest()")
    if must_visit is not None or first_sigmas is not None:
        strategy = visiting(strategy, must_visit, first_sigmas)

    # Problem.
    planner = Planner(
        source, budgets, solver, teacher, num_teacher_steps, [strategy], distance, progress
    )
    x = source.noises(noise, "noise", seed, 0)
    problem = planner.problem(x, condition, guidance=guidance)
    about = planner.about(condition, None if isinstance(noise, Tensor) else seed, guidance)

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
    """Run a step schedule from noise to data.

    Args:
        velocity_or_model: A function v(x (M, *E), t (M,)) -> (M, *E), a `BoundVelocity`
            or a `Model`.
        noise: Standard normal noises (B, *E), float32 or float64. For a model also how
            many to draw; they differ from those that `search` draws.
        steps: The schedule.
        solver: Solver of the steps. None uses the one that the schedule was searched
            with, and Euler for times set by hand.
        condition: Conditions (C, ...) of a model, such as classes (C,); the noises take
            them in turn. None uses every class in turn for a model that needs one.
        seed: Seed of drawn noises.

    Returns:
        The clean samples x0 (B, *E). `model.decode(x0)` gives a model's pixels.

    Raises:
        ValueError: If an argument has a wrong type or shape, or x0 holds NaN or
            infinity.

    Example:
        >>> steps = oss_exp.StepSchedule.load("steps.json")
        >>> x0 = oss_exp.sample(velocity, torch.randn(16, 3, 32, 32), steps)
    """
    source = SampledSource.of(velocity_or_model)
    if not isinstance(steps, StepSchedule):
        hint = ""
        if isinstance(steps, Mapping):
            hint = "; choose one of its schedules, such as steps[5]"
        raise ValueError(f"steps must be a StepSchedule, got {shown(steps)}{hint}")
    if solver is None:
        solver = solvers.solver_of(steps)
    require_kind("solver", solver, Solver, "Euler()")

    x = source.noises(noise, "noise", seed, HELD_OUT)
    x0 = source.sample(solver, steps, x * steps.start_time, source.conditions(condition, len(x)))
    return require_finite(x0, "the samples")


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
    """Plan with several strategies and measure all schedules on held-out noises.

    Every schedule samples the same held-out noises. Its samples are compared with the
    teacher's samples of these noises. A strategy that plans for each sample (`OSS`)
    plans, and is measured, on the first 32 held-out noises.

    Args:
        velocity_or_model: A function v(x (M, *E), t (M,)) -> (M, *E), a
            `BoundVelocity`, a `Model`, or a pipeline of diffusers.
        noise: Standard normal noises (B, *E) that strategies plan on. For a model also
            how many to draw; None draws 32, or one for each prompt of a pipeline.
        num_steps: K, the number of steps, or several numbers.
        prompts: Prompts of a pipeline of diffusers; required for one.
        strategies: {label: strategy}. None uses those of `standard_strategies()` of
            this module that fit the teacher, with the default strategy of `search` as
            "oss_best".
        held_out: Standard normal noises (n, *E) that the search does not see, or how
            many to draw.
        solver: Solver of teacher and students. Searches use it without its calibration.
        teacher: Where the teacher's times lie. None uses a pipeline's own times, else
            `FlowSchedule()`.
        num_teacher_steps: N, the number of steps of the teacher.
        distance: What searches minimise between student and teacher.
        condition: Conditions (C, ...) of a model, such as classes (C,); the noises take
            them in turn. None uses every class in turn for a model that needs one.
        held_out_condition: Conditions that the held-out noises take in turn. None uses
            `condition`.
        decode: Maps x0 (B, *E) to pixels in [0, 1]. None uses a model's own decoder.
            For a function x0 is taken as it is, so its PSNR is 10 log10(1 / MSE).
        seed: Seed of drawn noises.
        batch_size: Number of held-out noises that are sampled at a time. A plain
            function gets all of them at once.
        progress: Whether to draw a progress bar on stderr. None draws one on a
            terminal.

    Returns:
        The comparison. It prints itself as a table.

    Raises:
        ValueError: If an argument has a wrong type, shape or range, or the velocity
            gives NaN or infinity.

    Example:
        >>> table = oss_exp.compare(velocity, torch.randn(32, 3, 32, 32), [5, 10])
        >>> print(table)
    """
    source = SampledSource.of(velocity_or_model, prompts)
    budgets = distinct_budgets(num_steps, num_teacher_steps)

    # Strategies.
    standard = strategies is None
    if strategies is None:
        strategies = standard_strategies() | {"oss_best": source.strategy}
    if not isinstance(strategies, Mapping) or not strategies:
        raise ValueError(
            f"strategies must be a dict such as {{'mine': OSSBest()}}, got {shown(strategies)}"
        )
    for label, strategy in strategies.items():
        require_kind(f"strategies[{label!r}]", strategy, StepsizeStrategy, "OSSBest()")
    planner = Planner(
        source,
        budgets,
        solver,
        teacher,
        num_teacher_steps,
        list(strategies.values()),
        distance,
        progress,
    )
    require_count("batch_size", batch_size)

    # Noises.
    x = source.noises(noise, "noise", seed, 0)
    held_out_noise = source.noises(held_out, "held_out", seed, HELD_OUT, like=x)
    held_out_condition = condition if held_out_condition is None else held_out_condition
    rows = source.conditions(held_out_condition, len(held_out_noise))
    shared_problem = planner.problem(x, condition)
    # A pipeline's guidance is known once its velocity is bound.
    about = planner.about(condition, None if isinstance(noise, Tensor) else seed)
    per_sample_problem: Problem | None = None

    with planner.counter.progress:
        # Schedules.
        schedules: dict[str, dict[int, StepSchedule]] = {}
        runs: dict[tuple[str, int], StepSchedule] = {}
        for label, strategy in strategies.items():
            problem = shared_problem
            if strategy.per_sample:
                per_sample_problem = per_sample_problem or planner.problem(
                    held_out_noise[:PER_SAMPLE], held_out_condition, HELD_OUT
                )
                problem = per_sample_problem
            try:
                schedules[label] = planner.plan(label, strategy, problem, about)
            except DoesNotFit:
                if not standard:
                    raise
                continue
            for k, steps in schedules[label].items():
                runs[label, k] = steps

        # Held-out samples.
        values = planner.measure(runs, held_out_noise, rows, decode or source.decode, batch_size)

    velocity = source.velocity(rows, len(held_out_noise))
    records: list[dict[str, Any]] = []
    for (label, k), steps in runs.items():
        record = _record(values[label, k], steps, solvers.nfe(solver, steps, velocity))
        baseline = strategies[label].baseline
        records.append({"strategy": label, "num_steps": k, "baseline": baseline, **record})
    return Comparison(about, schedules, records)


def _record(values: Tensor, steps: StepSchedule, nfe: int) -> dict[str, Any]:
    """Return a schedule's record from its values (n, 3) or (n, 4) of `Planner.measure`."""
    metrics: dict[str, float] = {}
    if values.shape[1] > 3:
        metrics["spectral, dB"] = float(values[:, 3].mean())
    return {
        "start": steps.start.kind,
        "planning": dict(steps.about("planning")),
        "nfe": nfe,
        **measured(*values[:, :3].T.numpy()),
        "metrics": metrics,
    }


def standard_strategies() -> dict[str, StepsizeStrategy]:
    """Return the default strategies of `compare`: four baselines, GITS, and `OSSBest`."""
    return {
        "fm": ClosedForm(FlowSchedule()),
        "ddim": ClosedForm(DDIMSchedule()),
        "edm": ClosedForm(EDMSchedule()),
        "logsnr": ClosedForm(LogSNRSchedule()),
        "gits": GITS(),
        "oss_best": OSSBest(),
    }


class Comparison:
    """The result of `compare`: a table that prints itself, in notebooks too.

    Attributes:
        about: Model, teacher, solver, distance and versions.
        schedules: {label: {K: StepSchedule}}.
        lines: The lines of the printed table.
        rows: One dict for each schedule, sorted by network calls, then best first. It
            holds the mean PSNR with its 95 % interval over the n held-out noises, the
            PSNR of every image, `gain` (the paired difference to the best baseline at
            the same number of calls; None for that baseline), the spread, and the cost
            of planning.
    """

    def __init__(
        self,
        about: Mapping[str, Any],
        schedules: Mapping[str, Mapping[int, StepSchedule]],
        records: Sequence[Mapping[str, Any]],
    ):
        self.about = about
        self.schedules = schedules
        results = [Result.of(record, str(record["nfe"])) for record in records]
        self.lines: list[Line] = with_gains(results)

        # Rows in the order of the lines.
        by_key = {(record["strategy"], record["num_steps"]): record for record in records}
        self.rows: list[dict[str, Any]] = []
        for line in self.lines:
            record = by_key[line.result.strategy, line.result.num_steps]
            gain = None if line.gain is None else line.gain.to_dict()
            self.rows.append({**record, "gain": gain})

    @property
    def title(self) -> str:
        """The title of the table: the model and its teacher."""
        model = self.about["model"]["name"]
        num_steps = self.about["teacher"]["num_steps"]
        return f"{model}: students against the {num_steps}-step teacher"

    def to_dict(self) -> dict[str, Any]:
        """Return `about` and `rows` as one JSON object."""
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
