"""The base classes of exporters, which write step schedules for other programs.

An exporter is chosen with `oss-exp task=export exporter=NAME`. A new one is a file
here, a yaml in conf/exporter and a test.
"""

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
    """A program that step schedules are written for.

    Attributes:
        suffix: Suffix of the file that the exporter writes; empty for a folder.
    """

    suffix: ClassVar[str] = ".json"

    @abc.abstractmethod
    def write(self, steps: StepSchedule, path: Path) -> str:
        """Write the schedule to `path`, and return the text for the user to paste.

        Raises:
            ValueError: The program cannot run the schedule.
        """


@dataclass(frozen=True)
class SigmaList(Exporter):
    """A list of sigmas.

    It holds times alone, so the program needs a sampler that takes the schedule's steps.

    Attributes:
        samplers: The program's samplers: names in `samplers.SAMPLERS` -> its names.
        network: "flow", or "eps" for any model whose sigma is sigma / alpha; None: as
            the schedule's file says.
    """

    samplers: ClassVar[Mapping[str, str]]

    network: Network | None = None

    @abc.abstractmethod
    def texts(self, sigmas: list[float], sampler: str) -> tuple[str, str]:
        """Return the text of the file, and the text to paste."""

    def write(self, steps: StepSchedule, path: Path) -> str:
        """Write the list, and return advice on its use."""
        # The file.
        network = self._network(steps)
        sigmas = flow_sigmas(steps) if network == "flow" else ratio_sigmas(steps)
        content, advice = self.texts(sigmas, sampler_of(steps, network, self.samplers))
        write_atomically(path, f"{content}\n")

        # A start that is lost.
        ratio = steps.start_time / float(steps.times[0])
        if ratio > 1.001:
            advice += (
                f"\nThere the noise is times the first sigma: {ratio:.3f} times less than in the "
                "search, which start=pinned would have kept."
            )
        return advice

    def _network(self, steps: StepSchedule) -> Network:
        """Return the kind of network, from the option or the schedule's file."""
        planned = network_of(steps)
        network = self.network or planned
        if network is None:
            raise ValueError(
                "the schedule's file does not name a kind of network; "
                "set task.exporter.network=flow|eps"
            )
        if planned not in (network, None):
            raise ValueError(
                f"the schedule was planned for a network of kind {planned}, "
                f"task.exporter.network={network} is another; leave it out, or plan a schedule on "
                "that network"
            )
        return network
