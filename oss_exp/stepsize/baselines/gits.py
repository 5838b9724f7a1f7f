"""GITS: the steps whose single jumps from a teacher's states have the least total cost.

Chen et al. 2024, arXiv 2405.11326. A teacher of its own is run once. Every jump from
one of its states to every later time, along the noise predicted there, is compared with
the teacher's state at that time. Dynamic programming then picks exactly K jumps of the
least total cost. Unlike OSS it never sees a student's own error.

All is in EDM coordinates, x_edm = x / (1 - t), sigma = t / (1 - t) and
eps = x + (1 - t) v, in which the ODE is dx_edm / dsigma = eps.

Legend: B samples, N+1 nodes of its own teacher from the noise (node 0) to the data
(node N), K steps, *E event dims, D = prod(E).
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
    """The paper's schedule, from its own teacher.

    Args:
        schedule: the noise schedule of the teacher; its first sigma must be finite.
        num_nodes: N, the teacher's steps.
        solver: the teacher's solver.
        metric: "l1" or "l2" distance of a jump's end to the teacher's state, or "dev":
            how much further than that state it is from the straight line between the
            teacher's ends.
        coeff: weight of every jump relative to the one before it, from 0.1 to 10. Above
            1 it cares more for the end of the trajectory.
        afs: the analytical first step: one more node, reached without a network call,
            because d = x / sqrt(1 + sigma^2) predicts the noise there. It is written as
            an analytic start with mean 0, x_t = (t / t_N) z. That is the same at
            t_N = 1, where sigma is infinite, and differs by 1 / (2 sigma_N) of the
            noise below. Without a node between the first two times there is nothing to
            insert, and the start stays pinned.
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
                f"GITS chooses among its own {self.num_nodes} steps and is asked for "
                f"{budgets[-1]}; raise its num_nodes"
            )

        # The teacher and all its jumps.
        times = self.schedule.nodes(self.num_nodes)
        first_state = problem.noise * float(times[0] / problem.grid[0])
        states, eps = edm_trajectory(self.solver, problem.velocity, first_state, times)
        sigmas = EDMPath().native(times)
        cost = cost_matrix(states, eps, sigmas, self.metric, problem.collective)
        if not bool(cost.isfinite().all()):
            raise ValueError(
                "the teacher of GITS met NaN or infinity; check the model's dtype and the noise "
                "schedule"
            )

        # The choice.
        plans = {}
        for k in budgets:
            path = exact_steps(cost, k, self.coeff)
            plans[k] = self._steps(problem, times, path, states[-1])
        return plans

    def _steps(
        self, problem: Problem, times: Tensor, path: list[int], target: Tensor
    ) -> StepSchedule:
        """Return the schedule of a path, with the analytical first step if it has one.

        Args:
            problem: its noise is where students start.
            times: (N+1,) the teacher's times.
            path: K+1 nodes.
            target: (B, *E) the teacher's last states.
        """
        start_time = float(problem.grid[0])
        remedy = "choose a noise schedule for it that reaches no further into the noise"
        pinned = begin_at(times[path], start_time, "GITS", remedy)

        # Nodes to insert.
        between: list[int] = []
        if self.afs:
            between = [node for node in range(1, path[1]) if times[node] < start_time]
        if not between:
            return StepSchedule(pinned)

        def analytic(nodes: list[int]) -> StepSchedule:
            mean = torch.zeros(problem.num_groups, *problem.noise.shape[1:])
            return StepSchedule(times[nodes], Analytic(mean, start_time))

        def run(nodes: list[int]) -> Tensor:
            start = analytic(nodes).initial_state(problem.noise, problem.group)
            return trajectory(problem.solver, problem.velocity, start, times[nodes])[-1]

        node = best_free_node(between, path, run, target, problem.collective)
        return analytic([node, *path[1:]])

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        """Return the calls of its own teacher, and with afs those of the tries.

        The latter is an estimate: half of the nodes for every K.
        """
        tries = self.num_nodes // 2 if self.afs else 0
        teacher = StepSchedule(self.schedule.nodes(self.num_nodes))
        return nfe(self.solver, teacher) + tries * sum(set(num_steps)) * (1 + edge_calls)


# --------------------------------------------------------------------------------------------------
# The teacher and its jumps
# --------------------------------------------------------------------------------------------------

# Samples that are compared at a time: all their jumps to all nodes would not fit into memory.
SAMPLES = 8


def edm_trajectory(
    solver: Solver, velocity: VelocityFn, x: Tensor, times: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x_edm at all nodes, (N+1, B, *E), and eps at the first N.

    eps is the network's output when the solver last called it: at the node, or at the
    state that UniPC then corrects.

    Args:
        solver: takes the steps.
        velocity: the network.
        x: (B, *E) at times[0], which is below 1.
        times: (N+1,).
    """
    latest = x

    def watched(x: Tensor, t: Tensor) -> Tensor:
        nonlocal latest
        v = velocity(x, t)
        latest = x + rowwise(1 - t, x) * v
        return v

    states = []
    eps = []
    for t, state in zip(times, walk(solver, watched, x, times), strict=True):
        states.append(state.x / float(1 - t))
        eps.append(latest)
    return torch.stack(states), torch.stack(eps[:-1])


def off_the_line(x: Tensor, line: Tensor) -> Tensor:
    """Return the part of x (..., B, D) that is orthogonal to line (B, D).

    Its length is the paper's deviation.
    """
    direction = torch.nn.functional.normalize(line, dim=-1)
    return x - (x * direction).sum(-1, keepdim=True) * direction


def unchanged(x: Tensor, line: Tensor) -> Tensor:
    """Return x."""
    return x


METRICS: dict[
    str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
] = {
    "dev": (off_the_line, lambda jump, target: jump.norm(dim=-1) - target.norm(dim=-1)),  # signed
    "l1": (unchanged, lambda jump, target: (jump - target).norm(p=1, dim=-1)),
    "l2": (unchanged, lambda jump, target: (jump - target).norm(dim=-1)),
}
"""Each metric's projection of vectors (J, B, D), beside the teacher's line (B, D), and its cost of
landing at `jump` instead of `target`."""


def cost_matrix(
    states: Tensor, eps: Tensor, sigmas: Tensor, metric: str, collective: Collective
) -> Tensor:
    """Return the cost of every jump, (N+1, N+1) float64 on the CPU.

    Entry (i, j), j > i, compares the jump states[i] + (sigma_j - sigma_i) eps[i] with
    states[j]. It is the mean over the samples of all ranks. Other entries are 0.

    Args:
        states: (N+1, B, *E) in EDM coordinates.
        eps: (N, B, *E).
        sigmas: (N+1,) decreasing.
        metric: a key of METRICS.
        collective: sums over ranks.
    """
    project, compare = METRICS[metric]
    sigmas = sigmas.to(states.device, torch.float64)
    total = sigmas.new_zeros(len(states), len(states))
    chunks = zip(states.flatten(2).split(SAMPLES, 1), eps.flatten(2).split(SAMPLES, 1), strict=True)
    for x, e in chunks:
        # Vectors from the trajectory's first state.
        x = x.double()
        line = x[-1] - x[0]
        x = project(x - x[0], line)
        e = project(e.double(), line)

        # Jumps from each node to all later ones.
        for i in range(len(e)):
            steps = (sigmas[i + 1 :] - sigmas[i]).reshape(-1, 1, 1)
            jump = torch.addcmul(x[i], steps, e[i])
            total[i, i + 1 :] += compare(jump, x[i + 1 :]).sum(1)
    count = collective.sum(sigmas.new_tensor(states.shape[1]))
    return (collective.sum(total) / count).cpu()


# --------------------------------------------------------------------------------------------------
# The choice
# --------------------------------------------------------------------------------------------------


def exact_steps(cost: Tensor, num_steps: int, coeff: float) -> list[int]:
    """Return the nodes 0 = n_0 < ... < n_K = N of the least total cost.

    The total is c(n_0, n_1) + coeff (c(n_1, n_2) + coeff (...)). Between equals the
    smallest next node wins.

    Args:
        cost: (N+1, N+1).
        num_steps: K.
        coeff: weight of a jump relative to the one before it.
    """
    if not 1 <= num_steps < len(cost):
        raise ValueError(f"{len(cost)} nodes allow 1 to {len(cost) - 1} steps, got {num_steps}")

    # value[i]: least cost from node i to node N, in one step, then in two, ...
    jumps = cost.masked_fill(torch.ones_like(cost, dtype=torch.bool).tril(), math.inf)
    value = jumps[:, -1]
    choices = []
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
    target: Tensor,
    collective: Collective,
) -> int:
    """Return the node to insert after path[0] for the lowest mean final error.

    The error is |final - target|_2, its mean that over the samples of all ranks.

    Args:
        free: nodes to choose from.
        path: K+1 nodes.
        run: gives the student's final states (B, *E), for the nodes from the inserted
            one on.
        target: (B, *E) the teacher's last states.
        collective: sums over ranks.
    """
    errors = []
    for node in free:
        difference = run([node, *path[1:]]) - target
        errors.append(difference.double().flatten(1).norm(dim=1).sum())
    return free[int(collective.sum(torch.stack(errors)).argmin())]
