"""Take a step schedule to other programs, and make one of their lists of sigmas."""

from __future__ import annotations

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from oss_exp.export.base import Exporter
from oss_exp.export.sigmas import from_flow_sigmas, from_ratio_sigmas, read_sigmas
from oss_exp.schedule import StepSchedule

READERS = {"flow": from_flow_sigmas, "eps": from_ratio_sigmas}


def export(cfg: DictConfig) -> None:
    """Write task.schedule as task.exporter has it, and print what there is to paste."""
    task = cfg.task
    exporter: Exporter = instantiate(task.exporter)
    steps, output = StepSchedule.load(task.schedule), Path(task.output)
    if output.suffix != ".json":
        raise ValueError(f"task.output must end in .json, got {output}")
    if output.resolve() == Path(task.schedule).resolve():
        raise ValueError(f"task.output and task.schedule are the same file {output}; choose another output")
    advice = exporter.write(steps, output)
    heading = f"{output}: {steps.num_steps} steps for {type(exporter).__name__}"
    Console().print(f"{heading}\n{advice}", soft_wrap=True, markup=False)


def import_sigmas(cfg: DictConfig) -> None:
    """Write task.output (.json): the step schedule of the list task.sigmas."""
    task = cfg.task
    given = OmegaConf.to_object(task.sigmas) if OmegaConf.is_list(task.sigmas) else str(task.sigmas)
    if task.network not in READERS:
        raise ValueError(f"task.network must be one of flow, eps: what the list is for; got {task.network!r}")
    steps = READERS[task.network](read_sigmas(given), imported={"sigmas": given, "network": task.network})
    steps.save(task.output)
    Console().print(f"{task.output}: {steps.num_steps} steps, start={steps.start}", soft_wrap=True)
