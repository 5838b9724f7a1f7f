"""Noise schedules as strategies: their K-step versions, from the teacher's first node on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch

from oss_exp.checks import require_choice
from oss_exp.noise import FlowSchedule, NoiseSchedule
from oss_exp.schedule import StepSchedule
from oss_exp.stepsize.base import begin_at, check_num_steps, student_start
from oss_exp.stepsize.problem import Problem

ClosedFormStart = Literal["pinned", "analytic"]


@dataclass(frozen=True)
class ClosedForm:
    """The nodes of a noise schedule.

    The first one is moved to the teacher's first node, so that all students share one
    noise.

    Args:
        schedule: gives the nodes.
        start: "analytic" gives the baseline the same free first jump that OSS can have,
            which makes K + 1 nodes for K network calls.
    """

    per_sample: ClassVar[bool] = False
    baseline: ClassVar[bool] = True

    schedule: NoiseSchedule = field(default_factory=FlowSchedule)
    start: ClosedFormStart = "pinned"

    def __post_init__(self) -> None:
        require_choice(get_args(ClosedFormStart), start=self.start)

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        start_time = float(problem.grid[0])
        start = student_start(problem, self.start)
        plans = {}
        for k in check_num_steps(num_steps, problem.num_nodes):
            if self.start == "analytic":
                times = self._from(start_time, k + 1)[1:]
            else:
                times = self._from(start_time, k)
            plans[k] = StepSchedule(times, start)
        return plans

    def _from(self, start_time: float, num_steps: int) -> torch.Tensor:
        remedy = "choose a noise schedule that reaches at least as far into the noise"
        return begin_at(self.schedule.nodes(num_steps), start_time, str(self.schedule), remedy)

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        return 0
