"""What takes a step schedule to another program: an `Exporter`, chosen as `oss-exp task=export exporter=NAME`."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from oss_exp.export.sigmas import flow_sigmas, ratio_sigmas
from oss_exp.files import write_atomically
from oss_exp.schedule import StepSchedule


class Exporter(abc.ABC):
    """A program that step schedules are written for. A new one is one file, one yaml in conf/exporter and one test."""

    @abc.abstractmethod
    def write(self, steps: StepSchedule, path: Path) -> str:
        """Write the schedule to `path` (.json), and return the text that there is to paste.

        Raises ValueError where the program cannot run the schedule.
        """


@dataclass(frozen=True)
class SigmaList(Exporter):
    """A list of sigmas, which holds times alone.

    network: `flow`, or `eps` for any model whose sigma is sigma / alpha; None: as the schedule's file says.
    """

    network: Literal["flow", "eps"] | None = None

    @abc.abstractmethod
    def texts(self, sigmas: list[float]) -> tuple[str, str]:
        """Return the text of the file, and the text to paste."""

    def write(self, steps: StepSchedule, path: Path) -> str:
        sigmas = self._sigmas(steps)
        content, advice = self.texts(sigmas)
        write_atomically(path, f"{content}\n")

        ratio = steps.start_time / float(steps.times[0])
        if ratio > 1.001:
            advice += (
                f"\nThere the noise is times the first sigma: {ratio:.3f} times less than in the search, which "
                "start=pinned would have kept."
            )
        return advice

    def _sigmas(self, steps: StepSchedule) -> list[float]:
        network = self.network
        if network is None and (clock := steps.about("native").get("clock")):
            network = "flow" if clock == "flow time" else "eps"
        if network is None:
            raise ValueError("the schedule's file does not name a kind of network; set task.exporter.network=flow|eps")
        return flow_sigmas(steps) if network == "flow" else ratio_sigmas(steps)
