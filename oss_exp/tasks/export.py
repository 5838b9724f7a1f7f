"""Take a step schedule to another program."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig

from oss_exp.escaping import PlainConsole
from oss_exp.export.base import Exporter
from oss_exp.export.numbers import ComfyUINodes
from oss_exp.files import shipped_schedule
from oss_exp.schedule import StepSchedule
from oss_exp.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Export(Task):
    """Write the step schedule of a file as `exporter` has it, and print what there is to paste.

    workflow: of ComfyUI, for exporter=comfyui_nodes, which writes a copy of it.
    """

    schedule: str
    exporter: Exporter
    output: str
    workflow: str | None = None

    def __call__(self, cfg: DictConfig) -> None:
        path, output = shipped_schedule(self.schedule), Path(self.output)
        steps = StepSchedule.load(path)
        exporter = self.exporter
        if self.workflow is not None:
            if not isinstance(exporter, ComfyUINodes):
                raise ValueError(
                    "task.workflow is for exporter=comfyui_nodes, whose nodes its copy has"
                )
            exporter = replace(exporter, workflow=self.workflow)
        suffix = self.exporter.suffix
        if output.suffix == ".json":  # as the default ends
            output = output.with_suffix(suffix)
        elif suffix and output.suffix != suffix:
            raise ValueError(f"task.output must end in {suffix}, got {output}")
        if output.resolve() == path.resolve():
            raise ValueError(
                f"task.output and task.schedule are the same file {output}; choose another output"
            )
        advice = exporter.write(steps, output)
        heading = f"{output}: {steps.num_steps} steps for {type(self.exporter).__name__}"
        PlainConsole().print(f"{heading}\n{advice}", soft_wrap=True)
