"""What takes a step schedule to another program: an `Exporter`, chosen as `oss-exp task=export exporter=NAME`."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from oss_exp.export.samplers import Network, network_of, sampler_of
from oss_exp.export.sigmas import flow_sigmas, ratio_sigmas
from oss_exp.files import write_atomically
from oss_exp.schedule import StepSchedule


class Exporter(abc.ABC):
    """A program that step schedules are written for. A new one is one file, one yaml in conf/exporter and one test."""

    suffix: ClassVar[str] = ".json"  # of what it writes; "": a folder

    @abc.abstractmethod
    def write(self, steps: StepSchedule, path: Path) -> str:
        """Write the schedule to `path`, and return the text that there is to paste.

        Raises ValueError where the program cannot run the schedule.
        """


@dataclass(frozen=True)
class SigmaList(Exporter):
    """A list of sigmas, which holds times alone: its program's sampler has to take the schedule's steps.

    network:  `flow`, or `eps` for any model whose sigma is sigma / alpha; None: as the schedule's file says.
    samplers: of the program, names of `samplers.SAMPLERS` -> its own.
    """

    samplers: ClassVar[Mapping[str, str]]

    network: Network | None = None

    @abc.abstractmethod
    def texts(self, sigmas: list[float], sampler: str) -> tuple[str, str]:
        """Return the text of the file, and the text to paste."""

    def write(self, steps: StepSchedule, path: Path) -> str:
        network, planned = self.network, network_of(steps)
        if network is None and planned is None:
            raise ValueError(
                "the schedule's file does not name a kind of network; set task.exporter.network=flow|eps"
            )
        if network is not None and planned not in (network, None):
            raise ValueError(
                f"the schedule was planned for a network of kind {planned}, task.exporter.network={network} is "
                "another; leave it out, or plan a schedule on that network"
            )
        network = network or planned
        assert network is not None
        sigmas = flow_sigmas(steps) if network == "flow" else ratio_sigmas(steps)
        content, advice = self.texts(sigmas, sampler_of(steps, network, self.samplers))
        write_atomically(path, f"{content}\n")

        ratio = steps.start_time / float(steps.times[0])
        if ratio > 1.001:
            advice += (
                f"\nThere the noise is times the first sigma: {ratio:.3f} times less than in the search, which "
                "start=pinned would have kept."
            )
        return advice
