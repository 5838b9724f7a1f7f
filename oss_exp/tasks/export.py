"""Take a step schedule to other programs, and make one of their lists of sigmas."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import JsonValue, TypeAdapter
from rich.console import Console

import oss_exp
from oss_exp.export.diffusers import diffusers_arguments
from oss_exp.export.numbers import save_in_numbers
from oss_exp.export.sigmas import (
    comfyui_nodes,
    flow_sigmas,
    from_flow_sigmas,
    from_ratio_sigmas,
    ratio_sigmas,
    read_sigmas,
    sigma_text,
    webui_text,
)
from oss_exp.files import load_record, write_atomically
from oss_exp.models.families.flux import flux_shift
from oss_exp.schedule import StepSchedule

CODE = "oss_scheduler.py"  # without which its schedules run nowhere
NETWORKS = {"flow": (flow_sigmas, from_flow_sigmas), "eps": (ratio_sigmas, from_ratio_sigmas)}


def export(cfg: DictConfig) -> None:
    """Write task.schedule as task.to wants it, and print what there is to paste."""
    task = cfg.task
    if task.to not in TARGETS:
        raise ValueError(f"task.to must be one of {', '.join(TARGETS)}, got {task.to!r}")
    steps, output = StepSchedule.load(task.schedule), Path(task.output)
    if output.suffix != ".json":
        raise ValueError(f"task.output must end in .json, got {output}")
    if output.resolve() == Path(task.schedule).resolve():
        raise ValueError(f"task.output and task.schedule are the same file {output}; choose another output")
    said = TARGETS[task.to](steps, task, output)
    Console().print(f"{output}: {steps.num_steps} steps for {task.to}\n{said}", soft_wrap=True, markup=False)


def import_sigmas(cfg: DictConfig) -> None:
    """Write task.output (.json): the step schedule of the list task.sigmas."""
    task = cfg.task
    given = OmegaConf.to_object(task.sigmas) if OmegaConf.is_list(task.sigmas) else str(task.sigmas)
    _, make = _network(task.network, "the list")
    steps = make(read_sigmas(given), imported={"sigmas": given, "network": task.network})
    steps.save(task.output)
    Console().print(f"{task.output}: {steps.num_steps} steps, start={steps.start}", soft_wrap=True)


def _to_diffusers(steps: StepSchedule, task: DictConfig, output: Path) -> str:
    scheduler = _scheduler(task.scheduler)
    mu = task.mu
    if mu is None and task.height is not None and task.width is not None:
        mu = math.log(flux_shift(task.height, task.width))
    given = diffusers_arguments(steps, scheduler, mu)
    write_atomically(output, json.dumps({"scheduler": type(scheduler).__name__, **given}, indent=2) + "\n")
    return f"pipe(..., {', '.join(f'{key}={value}' for key, value in given.items() if key != 'mu')})"


def _to_oss_scheduler(steps: StepSchedule, task: DictConfig, output: Path) -> str:
    save_in_numbers(steps, output)
    write_atomically(output.with_name(CODE), (Path(oss_exp.__file__).parent / "export" / CODE).read_text())
    return f'from oss_scheduler import OSSScheduler\nOSSScheduler.from_schedule("{output.name}", pipe.scheduler.config)'


def _listed(make: Callable[[list[float]], tuple[str, str]]) -> Callable[[StepSchedule, DictConfig, Path], str]:
    """make: sigmas -> the text of the file, what is said."""

    def target(steps: StepSchedule, task: DictConfig, output: Path) -> str:
        sigmas, _ = _network(task.network or _network_of(steps), "the schedule")
        text, said = make(sigmas(steps))
        write_atomically(output, f"{text}\n")
        more = steps.start_time / float(steps.times[0])
        if more > 1.001:
            said += (
                f"\nThere the noise is times the first sigma: {more:.3f} times less than in the search, which "
                "start=pinned would have kept."
            )
        return said

    return target


TARGETS = {
    "diffusers": _to_diffusers,
    "oss_scheduler": _to_oss_scheduler,
    "comfyui": _listed(
        lambda sigmas: (json.dumps(comfyui_nodes(sigmas), indent=2), f"ManualSigmas: {sigma_text(sigmas)}, with euler")
    ),
    "k_diffusion": _listed(
        lambda sigmas: (json.dumps(sigmas), f"sample_euler(model, noise * {sigmas[0]:.6g}, torch.tensor(sigmas))")
    ),
    "webui": _listed(
        lambda sigmas: (webui_text(sigmas), f"webUI_ExtraSchedulers, custom, with Euler: {webui_text(sigmas)}")
    ),
}


def _network(name: str | None, what: str) -> tuple[Callable, Callable]:
    if name not in NETWORKS:
        raise ValueError(f"task.network must be one of {', '.join(NETWORKS)}: what {what} is for; got {name!r}")
    return NETWORKS[name]


def _network_of(steps: StepSchedule) -> str | None:
    """By the clock that the schedule's file says its network has."""
    clock = steps.about("native").get("clock")
    return clock and ("flow" if clock == "flow time" else "eps")


def _scheduler(given: str | None) -> Any:
    """A class of diffusers by name, or the scheduler of a pipeline's folder or of a scheduler_config.json."""
    import diffusers

    if given is None:
        raise ValueError(
            "task.to=diffusers needs task.scheduler: a scheduler_config.json, the folder of a pipeline, or a class "
            "such as FlowMatchEulerDiscreteScheduler"
        )
    name, config, path = given, {}, Path(given)
    if path.exists():
        folder = next((place for place in (path / "scheduler", path) if place.is_dir()), path.parent)
        file = path if path.is_file() else folder / "scheduler_config.json"
        config = load_record(file, TypeAdapter(dict[str, JsonValue]), "config of a scheduler", "get it again")
        name = config.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ValueError(f"task.scheduler={given} is neither a class of diffusers' schedulers nor a file of one")
    try:
        return kind.from_config(config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"task.scheduler={given}: its config makes no {name} ({reason:.200}); get it again") from None
