"""Step schedules for the schedulers of diffusers: arguments with which one runs exactly the times of a schedule."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import JsonValue, TypeAdapter

from oss_exp.export.base import Exporter
from oss_exp.export.sigmas import flow_sigmas, ratio_sigmas
from oss_exp.files import load_record, write_atomically
from oss_exp.noise import EDMPath, flux_shift, shift_time
from oss_exp.schedule import StepSchedule

TOLERANCE = 2e-6  # of times: diffusers counts in float32, and its UniPC begins at 1 - 1e-6


@dataclass(frozen=True)
class Diffusers(Exporter):
    """The arguments of a pipeline's call, tried on the scheduler that they are for.

    scheduler:     a scheduler_config.json, the folder of a pipeline, or the name of a class of diffusers.
    mu:            of a scheduler with use_dynamic_shifting.
    height, width: pixels, both in place of mu, as FLUX pipelines have it.
    """

    scheduler: str | None = None
    mu: float | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None):
            raise ValueError("task.exporter.height and task.exporter.width belong together; give both, or neither")
        if self.mu is not None and self.height is not None:
            raise ValueError("task.exporter.height and task.exporter.width stand for task.exporter.mu; give either")

    def write(self, steps: StepSchedule, path: Path) -> str:
        scheduler = self.own_scheduler()
        mu = self.mu
        if mu is None and self.height is not None and self.width is not None:
            mu = math.log(flux_shift(self.height, self.width))
        arguments = diffusers_arguments(steps, scheduler, mu)
        write_atomically(path, json.dumps({"scheduler": type(scheduler).__name__, **arguments}, indent=2) + "\n")
        return f"pipe(..., {', '.join(f'{key}={value}' for key, value in arguments.items() if key != 'mu')})"

    def own_scheduler(self) -> Any:
        """Return a scheduler of diffusers as `scheduler` names it. ValueError where it names none."""
        import diffusers

        if self.scheduler is None:
            raise ValueError(
                "exporter=diffusers needs task.exporter.scheduler: a scheduler_config.json, the folder of a pipeline, "
                "or a class such as FlowMatchEulerDiscreteScheduler"
            )
        name, config, path = self.scheduler, {}, Path(self.scheduler)
        if path.exists():
            folder = next((place for place in (path / "scheduler", path) if place.is_dir()), path.parent)
            file = path if path.is_file() else folder / "scheduler_config.json"
            config = load_record(file, TypeAdapter(dict[str, JsonValue]), "config of a scheduler", "get it again")
            name = config.get("_class_name")
        kind = getattr(diffusers, str(name), None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
            raise ValueError(
                f"task.exporter.scheduler={self.scheduler} is neither a class of diffusers' schedulers nor a file of "
                "one"
            )
        try:
            return kind.from_config(config)
        except (TypeError, ValueError, ArithmeticError, RuntimeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"task.exporter.scheduler={self.scheduler}: its config makes no {name} ({reason:.200}); get it again"
            ) from None


def diffusers_sigmas(steps: StepSchedule, config: Mapping[str, Any], mu: float | None = None) -> list[float]:
    """The K `sigmas` with which a scheduler of diffusers runs exactly these times of a flow model.

    config: the scheduler's; FlowMatchEulerDiscreteScheduler's, or with use_flow_sigmas UniPC's and others'.
    mu:     that the pipeline passes with use_dynamic_shifting; for FLUX `math.log(flux_shift(height, width))`.
    ValueError for a scheduler that puts times of its own in place of those it is given.
    """
    _refuse_own_times(config)
    if config.get("use_flow_sigmas") is False:
        raise ValueError("a scheduler without use_flow_sigmas has no flow times; build it with use_flow_sigmas=True")
    if not config.get("use_dynamic_shifting"):
        shift = config.get("shift") or config.get("flow_shift") or 1.0
    elif mu is None:
        raise ValueError("a scheduler with use_dynamic_shifting shifts by the pipeline's mu; give it")
    else:
        shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    times = steps.times.new_tensor(flow_sigmas(steps)[:-1])
    return shift_time(times, 1 / shift).tolist()


def diffusers_arguments(steps: StepSchedule, scheduler: Any, mu: float | None = None) -> dict[str, Any]:
    """What makes `scheduler.set_timesteps` run exactly these times, tried on a scheduler like it.

    `sigmas` or `timesteps`, for a pipeline's call too, and mu where there is one. ValueError for a scheduler that takes
    no times, or from which others come out.
    """
    config, name = scheduler.config, type(scheduler).__name__
    takes = inspect.signature(scheduler.set_timesteps).parameters
    flow = config.get("use_flow_sigmas", "beta_schedule" not in config)
    _refuse_own_times(config)
    if "sigmas" in takes and (flow or "use_flow_sigmas" in config):
        given = {"sigmas": diffusers_sigmas(steps, config, mu)}
    elif "sigmas" in takes:
        given = {"sigmas": ratio_sigmas(steps)}
    elif "timesteps" in takes and not flow:
        ratios = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).double().sqrt()
        index = np.interp(np.log(ratio_sigmas(steps)[:-1]), ratios.log().numpy(), np.arange(len(ratios)))
        given = {"timesteps": index.round().astype(int).tolist()}
    else:
        with_ = " with use_flow_sigmas" if config.get("use_flow_sigmas") else ""
        raise ValueError(f"{name}{with_} takes no times; export to oss_scheduler")
    if mu is not None and "mu" in takes:
        given["mu"] = mu
    trial = type(scheduler).from_config(config)
    trial.set_timesteps(**{key: np.array(value) if key == "sigmas" else value for key, value in given.items()})
    found = trial.sigmas.double()
    if not flow:
        found = EDMPath().canonical(found)
    if len(found) != len(steps.times):
        raise ValueError(
            f"{name} takes {len(found) - 1} steps where the schedule has {steps.num_steps}; choose another"
        )
    off = float((found - steps.times).abs().max())
    if off > TOLERANCE:
        reason = "it knows whole timesteps only" if "timesteps" in given else "it changes the times it is given"
        raise ValueError(
            f"{name} would run times that are up to {off:.2g} beside the schedule's: {reason}; choose another, such as "
            f"{'FlowMatch' if flow else ''}EulerDiscreteScheduler, or export to oss_scheduler"
        )
    return given


def _refuse_own_times(config: Mapping[str, Any]) -> None:
    own = [f"use_{kind}_sigmas" for kind in ("karras", "exponential", "beta")]
    own += ["use_lu_lambdas", "shift_terminal", "invert_sigmas"]
    if replaced := [name for name in own if config.get(name)]:
        raise ValueError(f"a scheduler with {replaced[0]} does not run the sigmas it is given; build it without")
