"""Gradient descent through the student, for the strategies that learn times and coefficients.

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
from oss_exp.stepsize.oss.objectives import Mean, transformed
from oss_exp.stepsize.problem import Problem
from oss_exp.stepsize.split import split_samples


class Student(NamedTuple):
    """The learned numbers of a student.

    Attributes:
        times: (K+1,) times.
        weights: (K, P) weights of fitted steps; None where the solver steps.
    """

    times: Tensor
    weights: Tensor | None = None

    def detached(self) -> Student:
        """Return the same numbers, cut off from the gradients of the parameters."""
        return Student(self.times.detach(), None if self.weights is None else self.weights.detach())


@dataclass(frozen=True)
class GradientDescent(abc.ABC):
    """A strategy that lowers the student's final distance to the teacher by gradient descent.

    One half of the search samples trains (`split_samples`), and the other chooses the
    best iteration. Every iteration sees the whole training half. A training pass costs K
    forward and K backward calls per sample, a validation pass K forward calls.

    Args:
        init: plans the schedule to begin with, one for all samples.
        iterations: training passes.
        learning_rate: that of the optimizer.
        decay: factor of the learning rate after `patience` iterations without progress;
            the descent then goes on from the best parameters so far.
        patience: iterations to wait for progress.
        micro_batch: samples that are held with their gradients at a time.
        objective: lower the mean of the samples' distances, of their roots or logarithms.
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
        """Return the float64 numbers to learn, at which the student is that of `steps`."""

    @abc.abstractmethod
    def student(
        self, problem: Problem, steps: StepSchedule, parameters: Sequence[Tensor]
    ) -> Student:
        """Return the student at these parameters, differentiable in them."""

    def optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Return the optimizer: Adam, unless a strategy has another."""
        return torch.optim.Adam(parameters, lr=self.learning_rate)

    @property
    def name(self) -> str:
        """The strategy's name in messages."""
        return type(self).__name__.lower()

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        budgets = check_num_steps(num_steps, problem.num_nodes)
        if torch.is_inference_mode_enabled():
            raise ValueError(
                f"{self.name} needs gradients, which torch's inference mode forbids; set "
                "trainer.inference_mode=false"
            )
        if not problem.velocity.divisible:
            raise ValueError(
                f"{self.name} trains on a half of the samples, and a plain function knows all of "
                "them at once; use a BoundVelocity"
            )
        _ = problem.teacher.mean  # now, by all ranks: some may hold no sample of a half
        plans = {}
        for k, steps in self.init.plan(problem, budgets).items():
            plans[k] = self._trained(problem, steps)
        return plans

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        passes = sum(k * (self.iterations + 1) for k in check_num_steps(num_steps, num_nodes))
        return self.init.network_calls(num_nodes, num_steps, edge_calls) + passes

    @torch.enable_grad()
    def _trained(self, problem: Problem, steps: StepSchedule) -> StepSchedule:
        """Return the schedule of the iteration with the lowest loss on the held-out samples."""
        if isinstance(steps.start, Free):
            raise ValueError(f"{self.name}.init must start pinned or analytic")
        parameters = [
            tensor.detach().requires_grad_() for tensor in self.parameters(problem, steps)
        ]
        optimizer = self.optimizer(parameters)
        train, judge = split_samples(problem)

        best = _copies(parameters)
        best_loss = torch.inf
        waited = 0
        for iteration in range(self.iterations + 1):
            # Validation.
            student = self.student(problem, steps, parameters)
            loss = self._loss(problem, steps, student.detached(), judge)
            waited += 1
            if loss < best_loss:
                best = _copies(parameters)
                best_loss = loss
                waited = 0

            # No progress: back to the best parameters, with a lower rate.
            elif waited % self.patience == 0:
                for parameter, copy in zip(parameters, best, strict=True):
                    parameter.data.copy_(copy)
                for param_group in optimizer.param_groups:
                    param_group["lr"] *= self.decay
                student = self.student(problem, steps, parameters)

            if iteration < self.iterations:
                self._descend(problem, steps, student, train, parameters, optimizer)

        # The best student as a schedule.
        with torch.no_grad():
            times, weights = self.student(problem, steps, best)
        if weights is None:
            return replace(steps, times=times.cpu())
        fitted = FittedSteps(weights.cpu(), problem.teacher.mean.cpu())
        return replace(steps, times=times.cpu(), steps=fitted)

    def _descend(
        self,
        problem: Problem,
        steps: StepSchedule,
        student: Student,
        train: Tensor,
        parameters: list[Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Make one iteration on the training samples of all ranks."""
        # Gradients of the student's numbers, on this rank.
        leaves = student.detached()
        for leaf in leaves:
            if leaf is not None:
                leaf.requires_grad_()
        self._loss(problem, steps, leaves, train)

        # Gradients of the parameters, over all ranks.
        optimizer.zero_grad()
        for numbers, leaf in zip(student, leaves, strict=True):
            if numbers is None or leaf is None:
                continue
            # A rank may hold no training sample, and a diverging student has no finite gradient.
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            gradient = problem.collective.sum(gradient).nan_to_num(0, 0, 0)
            if numbers.requires_grad:
                numbers.backward(gradient, retain_graph=True)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    def _loss(self, problem: Problem, steps: StepSchedule, student: Student, rows: Tensor) -> float:
        """Return the objective over some samples, rows (B,) bool, of all ranks.

        Adds its gradient to the student's numbers where they take any.
        """
        positions = rows.nonzero()[:, 0]
        rank_count = torch.tensor(float(len(positions)), device=rows.device)
        count = float(problem.collective.sum(rank_count))
        if count == 0:
            raise ValueError(
                f"{self.name} trains on one half of the search samples and checks on the other: "
                "it needs two or more"
            )

        end = torch.tensor([problem.num_nodes], device=rows.device)
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        learns = student.times.requires_grad
        parts = positions.split(self.micro_batch) if len(positions) else ()  # a rank may hold none
        with torch.set_grad_enabled(learns):
            for part in parts:
                piece = problem.subset(part)
                cost = piece.cost(_last_state(piece, steps, student), end)
                loss = transformed(cost, self.objective).sum() / count
                if learns:
                    loss.backward()
                total += loss.detach()
        return float(problem.collective.sum(total))


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _last_state(problem: Problem, steps: StepSchedule, student: Student) -> Tensor:
    """Return the student's last states (B, *E)."""
    times, weights = student
    x = problem.noise
    mean = problem.teacher.sample_mean
    if isinstance(steps.start, Analytic):
        x = analytic_jump(x, mean, steps.start_time, times[0])
    if weights is None:
        orders = None if steps.orders is None else list(steps.orders)
        *_, last = walk(problem.solver, problem.velocity, x, times, orders)
    else:
        solver = FittedSolver(weights, (problem.noise, mean))
        *_, last = walk(solver, problem.velocity, x, times)
    return last.x


def gap_logits(steps: StepSchedule) -> Tensor:
    """Return logits of the gaps between a schedule's times, which `learned_times` inverts."""
    nodes = steps.times
    if isinstance(steps.start, Analytic):
        nodes = torch.cat([nodes.new_tensor([steps.start_time]), nodes])
    return (-nodes.diff()).log()


def learned_times(steps: StepSchedule, logits: Tensor) -> Tensor:
    """Return the times (K+1,) of some logits.

    The first one is that of `steps`; with an analytic start it is learned as the others
    are.
    """
    nodes = times_from(logits, steps.start_time)
    return nodes[1:] if isinstance(steps.start, Analytic) else nodes


def times_from(logits: Tensor, first: float | Tensor) -> Tensor:
    """Return times (K+1,) from `first` to exactly 0, whose gaps are the softmax of logits (K,)."""
    remaining = logits.softmax(0).flip(0).cumsum(0).flip(0)
    share = remaining / remaining[0].detach().clamp(min=1e-300)
    return torch.cat([first * share, logits.new_zeros(1)])
