"""Make a step schedule of a list of sigmas that another program runs."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig
from rich.console import Console

from oss_exp.export.reading import read_sigmas
from oss_exp.export.samplers import Network
from oss_exp.export.sigmas import from_flow_sigmas, from_ratio_sigmas
from oss_exp.tasks.task import Task

SCHEDULES = {"flow": from_flow_sigmas, "eps": from_ratio_sigmas}  # of the kinds of networks


@dataclass(frozen=True, kw_only=True)
class ImportSigmas(Task):
    """Write `output` (.json): the step schedule of the list `sigmas`, or of the file or text that holds one.

    network: what the list is for, flow or eps (any model of sigma / alpha).
    node:    id of the node, where a ComfyUI file has several lists.
    """

    sigmas: list[float] | str
    network: Network
    node: int | str | None = None
    output: str

    def __call__(self, cfg: DictConfig) -> None:
        imported = {"sigmas": self.sigmas, "network": self.network} | ({} if self.node is None else {"node": self.node})
        steps = SCHEDULES[self.network](read_sigmas(self.sigmas, self.network, self.node), imported=imported)
        steps.save(self.output)
        advice = f"{self.output}: {steps.num_steps} steps, start={steps.start.kind}"
        if (first := float(steps.times[0])) < 0.9:
            advice += (
                f"\nThe list begins at flow time {first:.3g}, as lists that change an image do (denoise < 1). Here it "
                "begins with noise alone."
            )
        Console().print(advice, soft_wrap=True, markup=False)
