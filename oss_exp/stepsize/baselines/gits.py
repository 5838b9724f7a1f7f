"""GITS: the steps whose single jumps from a teacher's states cost least in sum (Chen et al. 2024, arXiv 2405.11326).

A teacher of its own is run once, and every jump from one of its states along the noise predicted there, to every later
time, is compared with the teacher's state at that time. Dynamic programming then picks the exactly K jumps of least
total cost. Unlike OSS it never sees a student's own error. All is in EDM coordinates: x_edm = x / (1 - t),
sigma = t / (1 - t), eps = x + (1 - t) v, in which the ODE is dx_edm / dsigma = eps.
Legend: B samples, N+1 own nodes from the noise (node 0) to the data (node N), K steps, *E event dims, D = prod(E).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from oss_exp.checks import require_choice, require_range
from oss_exp.noise import EDMPath, EDMSchedule, NoiseSchedule
from oss_exp.schedule import Analytic, StepSchedule
from oss_exp.solvers import Euler, Solver, nfe, trajectory, walk
from oss_exp.stepsize.base import DoesNotFit, begin_at, check_num_steps
from oss_exp.stepsize.problem import Collective, Problem
from oss_exp.tensors import rowwise
from oss_exp.velocity import VelocityFn

Metric = Literal["dev", "l1", "l2"]


@dataclass(frozen=True)
class GITS:
    """The paper's schedule, from a teacher that runs `solver` over the num_nodes steps of `schedule`.

    metric: `l1` or `l2` distance of a jump's end to the teacher's state, or `dev`: how much further than that state it
            is from the straight line between the teacher's ends.
    coeff:  every jump weighs coeff times the one before it; above 1 cares more for the end of the trajectory.
    afs:    the analytical first step: one more node, reached without a network call because d = x / sqrt(1 + sigma^2)
            predicts the noise there. It is written as an analytic start with mean 0, x_t = (t / t_N) z, which is the
            same at t_N = 1, where sigma is infinite, and differs by 1 / (2 sigma_N) of the noise below. Without an own
            node between the first two times there is nothing to insert, and the start stays pinned.
    Raises ValueError for another metric, a coeff outside of 0.1 to 10, or a schedule that starts at infinite sigma.
    """

    per_sample: ClassVar[bool] = False
    baseline: ClassVar[bool] = True

    schedule: NoiseSchedule = field(default_factory=EDMSchedule)
    num_nodes: int = 60
    solver: Solver = field(default_factory=Euler)
    metric: Metric = "dev"
    coeff: float = 1.05
    afs: bool = False

    def __post_init__(self) -> None:
        require_choice(get_args(Metric), metric=self.metric)
        require_range(at_least=0.1, at_most=10, coeff=self.coeff)
        require_range(at_least=1, at_most=10_000, num_nodes=self.num_nodes)
        if self.schedule.nodes(self.num_nodes)[0] >= 1:
            raise ValueError(
                f"{self.schedule} starts at t = 1, where sigma = t / (1 - t) is infinite; "
                "choose a schedule with a finite first sigma for GITS, such as edm"
            )

    @torch.no_grad()
    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        budgets = check_num_steps(num_steps, problem.num_nodes)
        if budgets[-1] > self.num_nodes:
            raise DoesNotFit(
                f"GITS chooses among its own {self.num_nodes} steps and is asked for {budgets[-1]}; raise its num_nodes"
            )
        times = self.schedule.nodes(self.num_nodes)
        first_state = problem.noise * float(times[0] / problem.grid[0])
        states, eps = edm_trajectory(self.solver, problem.velocity, first_state, times)
        cost = cost_matrix(states, eps, EDMPath().native(times), self.metric, problem.collective)
        if not bool(cost.isfinite().all()):
            raise ValueError(
                "the teacher of GITS met NaN or infinity; check the model's dtype and the noise schedule"
            )
        return {
            k: self._steps(problem, times, exact_steps(cost, k, self.coeff), states[-1])
            for k in budgets
        }

    def _steps(
        self, problem: Problem, times: Tensor, path: list[int], goal: Tensor
    ) -> StepSchedule:
        """times (N+1,), path of K+1 own nodes, goal (B, *E) the teacher's end -> K steps from the problem's noise."""
        start_time = float(problem.grid[0])
        remedy = "choose a noise schedule for it that reaches no further into the noise"
        pinned = begin_at(times[path], start_time, "GITS", remedy)

        def analytic(nodes: list[int]) -> StepSchedule:
            mean = torch.zeros(problem.num_groups, *problem.noise.shape[1:])
            return StepSchedule(times[nodes], Analytic(mean, start_time))

        def run(nodes: list[int]) -> Tensor:
            start = analytic(nodes).initial_state(problem.noise, problem.group)
            return trajectory(problem.solver, problem.velocity, start, times[nodes])[-1]

        free = [node for node in range(1, path[1]) if times[node] < start_time] if self.afs else []
        if free:
            return analytic([best_free_node(free, path, run, goal, problem.collective), *path[1:]])
        return StepSchedule(pinned)

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        """The teacher's own calls; with afs also those of the tries, an estimate: half of the nodes for every K."""
        tries = self.num_nodes // 2 if self.afs else 0
        teacher = StepSchedule(self.schedule.nodes(self.num_nodes))
        return nfe(self.solver, teacher) + tries * sum(set(num_steps)) * (1 + edge_calls)


# --------------------------------------------------------------------------------------------------------------
# The teacher and its jumps
# --------------------------------------------------------------------------------------------------------------

SAMPLES = (
    8  # compared at a time: all their jumps to all nodes would not fit, and these stay in the cache
)


def edm_trajectory(
    solver: Solver, velocity: VelocityFn, x: Tensor, times: Tensor
) -> tuple[Tensor, Tensor]:
    """x (B, *E) at times[0] < 1, times (N+1,) -> x_edm at all of them (N+1, B, *E), and eps at the first N.

    eps is what the network said when the solver last called it: at the node, or at the state that UniPC then corrects.
    """
    latest = x

    def watched(x: Tensor, t: Tensor) -> Tensor:
        nonlocal latest
        v = velocity(x, t)
        latest = x + rowwise(1 - t, x) * v
        return v

    states, eps = [], []
    for t, state in zip(times, walk(solver, watched, x, times), strict=True):
        states.append(state.x / float(1 - t))
        eps.append(latest)
    return torch.stack(states), torch.stack(eps[:-1])


def off_the_line(x: Tensor, line: Tensor) -> Tensor:
    """The part of x (..., B, D) that is orthogonal to line (B, D). Its length is the paper's deviation."""
    direction = torch.nn.functional.normalize(line, dim=-1)
    return x - (x * direction).sum(-1, keepdim=True) * direction


def unchanged(x: Tensor, line: Tensor) -> Tensor:
    return x


METRICS: dict[
    str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
] = {
    "dev": (off_the_line, lambda jump, goal: jump.norm(dim=-1) - goal.norm(dim=-1)),  # signed
    "l1": (unchanged, lambda jump, goal: (jump - goal).norm(p=1, dim=-1)),
    "l2": (unchanged, lambda jump, goal: (jump - goal).norm(dim=-1)),
}
"""What is seen of vectors (J, B, D) beside the teacher's line (B, D); the cost of landing at jump instead of goal."""


def cost_matrix(
    states: Tensor, eps: Tensor, sigmas: Tensor, metric: str, collective: Collective
) -> Tensor:
    """EDM states (N+1, B, *E), eps (N, B, *E), sigmas (N+1,) decreasing -> (N+1, N+1) float64 on the CPU.

    Entry (i, j > i): the jump states[i] + (sigma_j - sigma_i) eps[i] against states[j], mean over the samples of all
    ranks; 0 elsewhere.
    """
    seen, compare = METRICS[metric]
    count, sigmas = states.shape[1], sigmas.to(states.device, torch.float64)
    total = sigmas.new_zeros(len(states), len(states))
    for x, e in zip(
        states.flatten(2).split(SAMPLES, 1), eps.flatten(2).split(SAMPLES, 1), strict=True
    ):
        x, e = x.double(), e.double()
        line = x[-1] - x[0]
        x, e = seen(x - x[0], line), seen(e, line)
        for i in range(len(e)):
            jump = torch.addcmul(x[i], (sigmas[i + 1 :] - sigmas[i]).reshape(-1, 1, 1), e[i])
            total[i, i + 1 :] += compare(jump, x[i + 1 :]).sum(1)
    return (collective.sum(total) / collective.sum(sigmas.new_tensor(count))).cpu()


# --------------------------------------------------------------------------------------------------------------
# The choice
# --------------------------------------------------------------------------------------------------------------


def exact_steps(cost: Tensor, num_steps: int, coeff: float) -> list[int]:
    """cost (N+1, N+1) -> the num_steps + 1 nodes 0 = n_0 < ... < n_K = N of least total cost.

    The total is c(n_0, n_1) + coeff (c(n_1, n_2) + coeff (...)); between equals the smallest next node wins.
    """
    if not 1 <= num_steps < len(cost):
        raise ValueError(f"{len(cost)} nodes allow 1 to {len(cost) - 1} steps, got {num_steps}")
    jumps = cost.masked_fill(torch.ones_like(cost, dtype=torch.bool).tril(), math.inf)
    value, choices = jumps[:, -1], []
    for _ in range(num_steps - 1):
        value, choice = (jumps + coeff * value).min(dim=1)  # the first of equal minima
        choices.append(choice.tolist())
    path = [0]
    for choice in reversed(choices):
        path.append(choice[path[-1]])
    return [*path, len(cost) - 1]


def best_free_node(
    free: Sequence[int],
    path: Sequence[int],
    run: Callable[[list[int]], Tensor],
    goal: Tensor,
    collective: Collective,
) -> int:
    """The node of `free` to insert after path[0] for the lowest mean |final - goal|_2 over the samples of all ranks.

    run: the nodes from the inserted one on -> the student's final states (B, *E), like the goal.
    """
    errors = torch.stack(
        [(run([node, *path[1:]]) - goal).double().flatten(1).norm(dim=1).sum() for node in free]
    )
    return free[int(collective.sum(errors).argmin())]
