"""The protocol of step-size strategies, and what all of them share.

Legend: N+1 grid nodes from the noise (node 0) to the data (node N), K steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from oss_exp.distances import Distance
from oss_exp.schedule import Analytic, Free, Pinned, Start, StartKind, StepSchedule
from oss_exp.solvers.base import LinearMultistep, Solver
from oss_exp.stepsize.problem import Problem


@runtime_checkable
class StepsizeStrategy(Protocol):
    """Anything that plans a step schedule. Construct it from its yaml; `plan` is pure but for the network's calls.

    per_sample: the schedules have one row per sample, so they must be planned on the noises they will run on.
    baseline:   not a search of ours: what the tables measure gains against.
    """

    per_sample: ClassVar[bool]
    baseline: ClassVar[bool]

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        """One schedule for every K of num_steps, from one search. ValueError when a K does not fit the grid."""
        ...

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        """Network calls per sample that `plan` makes, the teacher's aside: exact, or an estimate where it adapts.

        edge_calls: what scoring one edge costs, see the function of that name. ValueError when a K does not fit.
        """
        ...


def student_start(problem: Problem, kind: StartKind) -> Start:
    """Return the start of this kind from the problem's noise; an analytic one has the teacher's mean."""
    start_time = float(problem.grid[0])
    match kind:
        case "pinned":
            return Pinned()
        case "free":
            return Free(start_time)
        case "analytic":
            return Analytic(problem.teacher.mean.cpu(), start_time)


class DoesNotFit(ValueError):
    """A strategy has no schedule for this teacher, or of so many steps."""


def begin_at(times: Tensor, start_time: float, planner: str, remedy: str) -> Tensor:
    """times (K+1,) with the first moved to the teacher's, so that all students share one noise.

    DoesNotFit, naming who planned them and what to do, when the second time is not below it.
    """
    if len(times) > 2 and times[1] >= start_time:
        raise DoesNotFit(
            f"{planner} puts its second time, {float(times[1]):.4f}, above the teacher's first, {start_time:.4f}; "
            f"{remedy}"
        )
    return torch.cat([times.new_tensor([start_time]), times[1:]])


@torch.no_grad()
def teacher_velocities(problem: Problem) -> Iterator[Tensor]:
    """Yield the network's velocity (B, *E) at the teacher's states at nodes 0 .. N-1.

    N - 1 network calls: the first is the teacher's own, and a teacher keeps no others.
    """
    teacher = problem.teacher
    yield problem.velocity.combine(teacher.first_outputs)
    for x, t in zip(teacher.states[1:-1], problem.grid[1:-1], strict=True):
        yield problem.velocity(x, t.expand(len(x)))


def edge_calls(solver: Solver, distance: Distance) -> int:
    """Network calls that a search makes for every edge: a singlestep solver's further ones, and the distance's."""
    candidates = solver.order if isinstance(solver, LinearMultistep) else 1
    return solver.evals_per_step - 1 + candidates * distance.calls


def check_num_steps(num_steps: Sequence[int], num_nodes: int) -> list[int]:
    """Sorted distinct budgets; ValueError unless all are whole numbers in 1 .. N."""
    if not num_steps or any(not isinstance(k, int) or not 1 <= k <= num_nodes for k in num_steps):
        raise ValueError(
            f"num_steps must be whole numbers from 1 to {num_nodes} (the teacher's steps), got {list(num_steps)}; "
            "choose fewer steps or a longer teacher (num_teacher_steps)"
        )
    return sorted(set(num_steps))
