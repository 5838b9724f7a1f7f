"""Write a step schedule for another program: `task=export`."""

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
    """Write a step schedule in the format of `exporter`, and print what to do with it.

    Attributes:
        schedule: Path of the step schedule.
        exporter: The format.
        output: Path of the exported file or folder.
        workflow: A workflow of ComfyUI, of which exporter=comfyui_nodes writes a copy.
    """

    schedule: str
    exporter: Exporter
    output: str
    workflow: str | None = None

    def __call__(self, cfg: DictConfig) -> None:
        path = shipped_schedule(self.schedule)
        steps = StepSchedule.load(path)
        exporter = self.exporter
        if self.workflow is not None:
            if not isinstance(exporter, ComfyUINodes):
                raise ValueError(
                    "task.workflow is for exporter=comfyui_nodes; choose it, or leave it out"
                )
            exporter = replace(exporter, workflow=self.workflow)

        # A folder or a file.
        output = Path(self.output)
        suffix = self.exporter.suffix
        if output.suffix == ".json":  # the default output ends so
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
