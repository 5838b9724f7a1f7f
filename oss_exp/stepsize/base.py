"""The protocol of step-size strategies, and helpers that several of them use.

Legend: B samples, N+1 grid nodes from the noise (node 0) to the data (node N), K steps.
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
    """Anything that plans a step schedule.

    A strategy is made from its yaml. `plan` has no effects besides the network calls.

    Attributes:
        per_sample: its schedules have one row for each sample, so they must be planned
            on the noises that they will run on.
        baseline: it is not a search of ours, but one of those that gains are measured
            against.
    """

    per_sample: ClassVar[bool]
    baseline: ClassVar[bool]

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        """Return one schedule for every K of `num_steps`, from one search.

        Raises ValueError where a K does not fit the grid.
        """
        ...

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        """Return the network calls per sample of `plan`, without the teacher's.

        The number is exact, or an estimate where the strategy adapts. Raises ValueError
        where a K does not fit the grid.

        Args:
            num_nodes: N, the teacher's steps.
            num_steps: the K to plan for.
            edge_calls: calls that scoring one edge takes, see the function of that
                name.
        """
        ...


def student_start(problem: Problem, kind: StartKind) -> Start:
    """Return a start of this kind; an analytic one has the teacher's mean."""
    start_time = float(problem.grid[0])
    match kind:
        case "pinned":
            return Pinned()
        case "free":
            return Free(start_time)
        case "analytic":
            return Analytic(problem.teacher.mean.cpu(), start_time)


class DoesNotFit(ValueError):
    """A strategy has no schedule for this teacher, or none of so many steps."""


def begin_at(times: Tensor, start_time: float, planner: str, remedy: str) -> Tensor:
    """Return times (K+1,) whose first one is the teacher's, so that all students share one noise.

    Args:
        times: (K+1,) decreasing times.
        start_time: the teacher's first time.
        planner: name of the strategy that planned them, for the message.
        remedy: what to do where they do not fit, for the message.

    Raises:
        DoesNotFit: the second time is not below the teacher's first.
    """
    if len(times) > 2 and times[1] >= start_time:
        raise DoesNotFit(
            f"{planner} puts its second time, {float(times[1]):.4f}, above the teacher's first, "
            f"{start_time:.4f}; {remedy}"
        )
    return torch.cat([times.new_tensor([start_time]), times[1:]])


@torch.no_grad()
def teacher_velocities(problem: Problem) -> Iterator[Tensor]:
    """Yield the network's velocity (B, *E) at the teacher's states at nodes 0 to N-1.

    This makes N - 1 network calls: a teacher keeps its first outputs only.
    """
    teacher = problem.teacher
    yield problem.velocity.combine(teacher.first_outputs)
    for x, t in zip(teacher.states[1:-1], problem.grid[1:-1], strict=True):
        yield problem.velocity(x, t.expand(len(x)))


def edge_calls(solver: Solver, distance: Distance) -> int:
    """Return the network calls that a search makes for every edge.

    They are the further calls of a singlestep solver and those of the distance.
    """
    candidates = solver.order if isinstance(solver, LinearMultistep) else 1
    return solver.evals_per_step - 1 + candidates * distance.calls


def check_num_steps(num_steps: Sequence[int], num_nodes: int) -> list[int]:
    """Return the distinct numbers of steps in ascending order.

    Raises ValueError unless all of them are whole numbers from 1 to N.
    """
    if not num_steps or any(not isinstance(k, int) or not 1 <= k <= num_nodes for k in num_steps):
        raise ValueError(
            f"num_steps must be whole numbers from 1 to {num_nodes} (the teacher's steps), got "
            f"{list(num_steps)}; choose fewer steps or a longer teacher (num_teacher_steps)"
        )
    return sorted(set(num_steps))
