"""Make a step schedule of another program's list of sigmas: `task=import_sigmas`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from oss_exp.escaping import PlainConsole
from oss_exp.export.reading import read_list
from oss_exp.export.samplers import SAMPLERS, Network, solver_record
from oss_exp.export.sigmas import from_flow_sigmas, from_ratio_sigmas
from oss_exp.solvers import Euler
from oss_exp.tasks.task import Task

SCHEDULES = {"flow": from_flow_sigmas, "eps": from_ratio_sigmas}  # by kind of network


@dataclass(frozen=True, kw_only=True)
class ImportSigmas(Task):
    """Write the step schedule of a list of sigmas.

    Attributes:
        sigmas: The list, a text that holds one, or the path of a file that does.
        network: The kind of network that the list is for: flow, or eps (any model of
            sigma / alpha).
        node: Id of the node, for a ComfyUI file with several lists.
        output: Path of the schedule, .json.
    """

    sigmas: list[float] | str
    network: Network
    node: int | str | None = None
    output: str

    def __call__(self, cfg: DictConfig) -> None:
        # The list and its sampler.
        source = read_list(self.sigmas, self.network, self.node)
        provenance: dict[str, Any] = {"imported": {"sigmas": self.sigmas, "network": self.network}}
        if self.node is not None:
            provenance["imported"]["node"] = self.node
        solver = SAMPLERS[self.network].get(source.sampler or "euler")
        if solver is not None and solver != Euler():
            provenance["solver"] = solver_record(solver)

        # The schedule.
        steps = SCHEDULES[self.network](source.sigmas, **provenance)
        steps.save(self.output)

        # Advice.
        advice = f"{self.output}: {steps.num_steps} steps, start={steps.start.kind}"
        if solver is None:
            advice += (
                f"\nThe file runs it with {source.sampler:.50}, which has no name here; it is "
                "imported for Euler."
            )
        if (first := float(steps.times[0])) < 0.9:
            advice += (
                f"\nThe list begins at flow time {first:.3g}, as lists that change an image do "
                "(denoise < 1). Here it begins with noise alone."
            )
        PlainConsole().print(advice, soft_wrap=True)
