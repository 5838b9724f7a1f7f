"""Published times and coefficients of differentiable solver search (Wang et al. 2025).

"Differentiable Solver Search for Fast Diffusion Sampling" (arXiv 2505.21114). A step
goes along a sum, of weight 1, of the newest velocity and all earlier ones. Times and
weights were found on ImageNet; here they are run on any model.

Legend: K steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from oss_exp.checks import require_choice
from oss_exp.files import ASSETS
from oss_exp.schedule import StepSchedule
from oss_exp.stepsize.base import begin_at, check_num_steps
from oss_exp.stepsize.baselines.linear_steps import linear_steps
from oss_exp.stepsize.problem import Problem

Table = Literal["flowdcn", "sit"]


@dataclass(frozen=True)
class NeuralSolver:
    """The released tables of one model.

    The first time becomes the teacher's first node. The last step ends at exactly 0,
    because the rounded steps add up to 1 only within 0.0002.

    Args:
        table: "flowdcn" is FlowDCN-B (5 to 10 and 15 steps), "sit" is SiT-XL/2
            (5 to 10 steps).
    """

    per_sample: ClassVar[bool] = False
    baseline: ClassVar[bool] = True

    table: Table = "flowdcn"

    def __post_init__(self) -> None:
        require_choice(get_args(Table), table=self.table)

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        """Return the tables' schedules.

        Raises ValueError for a K without a table, or where the second time is not below
        the teacher's first.
        """
        tables = released_tables(self.table)
        budgets = check_num_steps(num_steps, problem.num_nodes)
        if missing := [k for k in budgets if k not in tables]:
            raise ValueError(
                f"neural_solver has tables of {self.table} for num_steps {[*tables]}, "
                f"not for {missing}"
            )
        plans = {}
        for k in budgets:
            times, mixing = tables[k]
            remedy = "choose a noise schedule that reaches at least as far into the noise"
            times = begin_at(times, float(problem.grid[0]), "neural_solver", remedy)

            # x_k is the noise and all steps so far.
            over_velocities = (times.diff()[:, None] * mixing).cumsum(0)
            over_noise = torch.ones(k, dtype=torch.float64)
            plans[k] = linear_steps(problem, times, over_noise, over_velocities)
        return plans

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        return 0


@cache
def released_tables(name: Table) -> dict[int, tuple[Tensor, Tensor]]:
    """Return, for each K, times (K+1,) from 1 to 0 and weights (K, K) of each step's velocities.

    They are float64.
    """
    tables = {}
    for k, table in json.loads((ASSETS / "neural_solver.json").read_text())[name].items():
        # Times.
        steps = torch.tensor(table["steps"], dtype=torch.float64)
        times = torch.cat([torch.ones(1), 1 - steps[:-1].cumsum(0), torch.zeros(1)])

        # Weights: what the earlier velocities leave of 1 is the newest one's.
        mixing = torch.zeros(len(steps), len(steps), dtype=torch.float64)
        for step, earlier in enumerate(table["earlier"]):
            mixing[step, :step] = torch.tensor(earlier, dtype=torch.float64)
            mixing[step, step] = 1 - sum(earlier)
        tables[int(k)] = times.double(), mixing
    return tables
