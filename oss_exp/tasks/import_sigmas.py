"""Make a step schedule of a list of sigmas that another program runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from omegaconf import DictConfig

from oss_exp.escaping import PlainConsole
from oss_exp.export.sigmas import from_flow_sigmas, from_ratio_sigmas, read_sigmas
from oss_exp.tasks.task import Task

SCHEDULES = {"flow": from_flow_sigmas, "eps": from_ratio_sigmas}  # of the kinds of networks


@dataclass(frozen=True, kw_only=True)
class ImportSigmas(Task):
    """Write `output` (.json): the step schedule of the list `sigmas`, or of the file or text that holds one.

    network: what the list is for, flow or eps (any model of sigma / alpha).
    """

    sigmas: list[float] | str
    network: Literal["flow", "eps"]
    output: str

    def __call__(self, cfg: DictConfig) -> None:
        imported = {"sigmas": self.sigmas, "network": self.network}
        steps = SCHEDULES[self.network](read_sigmas(self.sigmas), imported=imported)
        steps.save(self.output)
        PlainConsole().print(f"{self.output}: {steps.num_steps} steps, start={steps.start.kind}", soft_wrap=True)
