"""Gradient descent through the student: what the strategies that learn their times and coefficients share.

Legend: B samples, K steps, P basis vectors of fitted steps, *E event dims.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import ClassVar, NamedTuple, get_args

import torch
from torch import Tensor

from oss_exp.checks import require_choice, require_range
from oss_exp.schedule import Analytic, FittedSteps, Free, StepSchedule, analytic_jump
from oss_exp.solvers.sampling import FittedSolver, walk
from oss_exp.stepsize.base import StepsizeStrategy, check_num_steps
from oss_exp.stepsize.baselines.closed_form import ClosedForm
from oss_exp.stepsize.oss.objectives import COST_FLOOR, Mean
from oss_exp.stepsize.problem import Problem


class Student(NamedTuple):
    """What is learned: the times (K+1,), and the weights (K, P) of fitted steps, None where the solver steps."""

    times: Tensor
    weights: Tensor | None = None

    def detached(self) -> Student:
        """The same numbers, through which no gradients go on."""
        return Student(self.times.detach(), None if self.weights is None else self.weights.detach())


@dataclass(frozen=True)
class GradientDescent(abc.ABC):
    """Lowers the student's final distance to the teacher, beginning with the schedule of `init`.

    Every second search sample is trained on (by its global number, so that the ranks' shares do not matter) and the
    others choose the best iteration. Every iteration sees the whole training half; after `patience` iterations without
    progress the rate falls by `decay`, from the best parameters so far on. `micro_batch` samples at a time are held
    with their gradients.
    Costs: a training pass is K forward and K backward calls a sample, a validation pass K forward calls.

    objective: of the samples' distances, their mean or the mean of their logarithms.
    """

    per_sample: ClassVar[bool] = False
    baseline: ClassVar[bool] = True
    init: StepsizeStrategy = field(default_factory=ClosedForm)
    _: KW_ONLY
    iterations: int = 100
    learning_rate: float = 0.01
    decay: float = 0.8
    patience: int = 5
    micro_batch: int = 64
    objective: Mean = "log_mean"

    def __post_init__(self) -> None:
        require_choice(get_args(Mean), objective=self.objective)
        require_range(
            at_least=1,
            iterations=self.iterations,
            patience=self.patience,
            micro_batch=self.micro_batch,
        )
        require_range(above=0, at_most=100, learning_rate=self.learning_rate)
        require_range(above=0, at_most=1, decay=self.decay)
        if self.init.per_sample:
            raise ValueError(
                "init must plan one schedule for all samples, such as ddim or oss_shared"
            )

    @abc.abstractmethod
    def parameters(self, problem: Problem, steps: StepSchedule) -> list[Tensor]:
        """Float64 numbers to learn, at which the student is that of `steps`."""

    @abc.abstractmethod
    def student(
        self, problem: Problem, steps: StepSchedule, parameters: Sequence[Tensor]
    ) -> Student:
        """The student at these parameters, differentiable in them."""

    def optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """The rule of descent: Adam, where a strategy has no other."""
        return torch.optim.Adam(parameters, lr=self.learning_rate)

    @property
    def name(self) -> str:
        """As in messages."""
        return type(self).__name__.lower()

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        budgets = check_num_steps(num_steps, problem.num_nodes)
        if torch.is_inference_mode_enabled():
            raise ValueError(
                f"{self.name} needs gradients, which torch's inference mode forbids; set trainer.inference_mode=false"
            )
        if not problem.velocity.divisible:
            raise ValueError(
                f"{self.name} trains on a half of the samples, and a plain function knows all; use a BoundVelocity"
            )
        _ = problem.teacher.mean  # known before the ranks part: some hold no sample of a half
        return {
            k: self._trained(problem, steps)
            for k, steps in self.init.plan(problem, budgets).items()
        }

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        passes = sum(k * (self.iterations + 1) for k in check_num_steps(num_steps, num_nodes))
        return self.init.network_calls(num_nodes, num_steps, edge_calls) + passes

    @torch.enable_grad()
    def _trained(self, problem: Problem, steps: StepSchedule) -> StepSchedule:
        if isinstance(steps.start, Free):
            raise ValueError(f"{self.name}.init must start pinned or analytic")
        parameters = [each.detach().requires_grad_() for each in self.parameters(problem, steps)]
        optimizer = self.optimizer(parameters)
        train = problem.samples % 2 == 0
        best_loss, since, best = torch.inf, 0, [each.detach().clone() for each in parameters]

        for iteration in range(self.iterations + 1):
            student = self.student(problem, steps, parameters)
            held_out = self._loss(problem, steps, student.detached(), ~train)
            since += 1
            if held_out < best_loss:
                best_loss, since, best = held_out, 0, [each.detach().clone() for each in parameters]
            elif since % self.patience == 0:
                for each, kept in zip(parameters, best, strict=True):
                    each.data.copy_(kept)
                for group in optimizer.param_groups:
                    group["lr"] *= self.decay
                student = self.student(problem, steps, parameters)
            if iteration < self.iterations:
                self._descend(problem, steps, student, train, parameters, optimizer)

        with torch.no_grad():
            times, weights = self.student(problem, steps, best)
        if weights is None:
            return replace(steps, times=times.cpu())
        return replace(
            steps, times=times.cpu(), steps=FittedSteps(weights.cpu(), problem.teacher.mean.cpu())
        )

    def _descend(
        self,
        problem: Problem,
        steps: StepSchedule,
        student: Student,
        train: Tensor,
        parameters: list[Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """One iteration on the training samples of all ranks."""
        leaves = student.detached()
        for leaf in leaves:
            if leaf is not None:
                leaf.requires_grad_()
        self._loss(problem, steps, leaves, train)

        optimizer.zero_grad()
        for learned, leaf in zip(student, leaves, strict=True):
            if learned is None or leaf is None:
                continue
            slope = (
                torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            )  # a rank may hold no sample
            slope = problem.collective.sum(slope).nan_to_num(
                0, 0, 0
            )  # a student may leave all bounds
            if learned.requires_grad:
                learned.backward(slope, retain_graph=True)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    def _loss(
        self, problem: Problem, steps: StepSchedule, student: Student, chosen: Tensor
    ) -> float:
        """The objective over all ranks' chosen samples; adds its gradient to the student's where it has any."""
        rows = chosen.nonzero()[:, 0]
        count = float(problem.collective.sum(torch.tensor(float(len(rows)), device=chosen.device)))
        if count == 0:
            raise ValueError(
                f"{self.name} trains on one half of the search samples and checks on the other: it needs two or more"
            )
        end = torch.tensor([problem.num_nodes], device=chosen.device)
        total = torch.zeros((), dtype=torch.float64, device=chosen.device)
        with torch.set_grad_enabled(student.times.requires_grad):
            for part in (
                rows.split(self.micro_batch) if len(rows) else ()
            ):  # a rank may hold none of a half
                piece = problem.subset(part)
                cost = piece.cost(_last_state(piece, steps, student), end)
                if self.objective == "log_mean":
                    cost = cost.clamp(min=COST_FLOOR).log()
                error = cost.sum() / count
                if student.times.requires_grad:
                    error.backward()
                total += error.detach()
        return float(problem.collective.sum(total))


def _last_state(problem: Problem, steps: StepSchedule, student: Student) -> Tensor:
    """(B, *E)"""
    times, weights = student
    x, mean, orders = problem.noise, problem.teacher.sample_mean, steps.orders
    if isinstance(steps.start, Analytic):
        x = analytic_jump(x, mean, steps.start_time, times[0])
    if weights is None:
        *_, last = walk(
            problem.solver, problem.velocity, x, times, None if orders is None else list(orders)
        )
    else:
        *_, last = walk(FittedSolver(weights, (problem.noise, mean)), problem.velocity, x, times)
    return last.x


def gap_logits(steps: StepSchedule) -> Tensor:
    """Logits of the gaps between a schedule's times, of which `learned_times` makes the times again."""
    nodes = steps.times
    if isinstance(steps.start, Analytic):
        nodes = torch.cat([nodes.new_tensor([steps.start_time]), nodes])
    return (-nodes.diff()).log()


def learned_times(steps: StepSchedule, logits: Tensor) -> Tensor:
    """(K+1,) times; the first is that of `steps`, or learned with the others where the start is analytic."""
    nodes = times_from(logits, steps.start_time)
    return nodes[1:] if isinstance(steps.start, Analytic) else nodes


def times_from(logits: Tensor, first: float | Tensor) -> Tensor:
    """logits (K,) -> (K+1,) times from `first` down to exactly 0, whose gaps are the softmax's shares."""
    remaining = logits.softmax(0).flip(0).cumsum(0).flip(0)
    return torch.cat(
        [first * remaining / remaining[0].detach().clamp(min=1e-300), logits.new_zeros(1)]
    )
