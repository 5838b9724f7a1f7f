"""LD3: times learned by gradient descent through the solver (Tong et al. 2025, arXiv 2405.15506).

Legend: B samples, K steps, *E event dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.noise import DDIMSchedule
from oss_exp.schedule import Analytic, FittedSteps, Free, StepSchedule, analytic_jump
from oss_exp.solvers.sampling import walk
from oss_exp.stepsize.base import StepsizeStrategy, check_num_steps
from oss_exp.stepsize.baselines.closed_form import ClosedForm
from oss_exp.stepsize.problem import Problem


@dataclass(frozen=True)
class LD3:
    """Minimises the mean squared error of the student's last state against the teacher's, from the times of `init`.

    Every second search sample is trained on (by its global number, so that the ranks' shares do not matter) and the
    others choose the best iteration. RMSprop on the logits of the gaps as in the released code, on the whole training
    half at once; after `patience` iterations without progress the rate falls by `decay`, from the best times so far on.
    `micro_batch` samples at a time are held with their gradients. Not taken over: times told to the
    network apart from those of the solver, and noises that move in a small ball.
    Costs: a training pass is K forward and K backward calls a sample, a validation pass K forward calls.
    """

    per_sample: ClassVar[bool] = False
    baseline: ClassVar[bool] = True

    init: StepsizeStrategy = field(default_factory=lambda: ClosedForm(DDIMSchedule()))
    iterations: int = 100
    learning_rate: float = 0.02
    momentum: float = 0.9
    decay: float = 0.8
    patience: int = 5
    micro_batch: int = 64

    def __post_init__(self) -> None:
        require_range(at_least=1, iterations=self.iterations, patience=self.patience, micro_batch=self.micro_batch)
        require_range(above=0, at_most=100, learning_rate=self.learning_rate)
        require_range(at_least=0, below=1, momentum=self.momentum)
        require_range(above=0, at_most=1, decay=self.decay)
        if self.init.per_sample:
            raise ValueError("init must plan one schedule for all samples, such as ddim or oss_shared")

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        budgets = check_num_steps(num_steps, problem.num_nodes)
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "ld3 needs gradients, which torch's inference mode forbids; set trainer.inference_mode=false"
            )
        if not problem.velocity.divisible:
            raise ValueError("ld3 trains on a half of the samples, and a plain function knows all; use a BoundVelocity")
        _ = problem.teacher.mean  # known before the ranks part: some hold no sample of a half
        return {k: self._train(problem, steps) for k, steps in self.init.plan(problem, budgets).items()}

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        passes = sum(k * (self.iterations + 1) for k in check_num_steps(num_steps, num_nodes))
        return self.init.network_calls(num_nodes, num_steps, edge_calls) + passes

    @torch.enable_grad()
    def _train(self, problem: Problem, steps: StepSchedule) -> StepSchedule:
        if isinstance(steps.start, Free) or isinstance(steps.steps, FittedSteps):
            raise ValueError("ld3.init must start pinned or analytic and step with the solver")
        first, analytic = steps.start_time, isinstance(steps.start, Analytic)
        nodes = torch.cat([torch.tensor([first]).double(), steps.times]) if analytic else steps.times
        gaps = -nodes.to(problem.noise.device).diff()
        logits = gaps.log().requires_grad_()
        optimizer = torch.optim.RMSprop([logits], lr=self.learning_rate, momentum=self.momentum)
        train = problem.samples % 2 == 0
        best_loss, best, since = torch.inf, logits.detach().clone(), 0
        for iteration in range(self.iterations + 1):
            held_out = self._loss(problem, steps, times_from(logits.detach(), first), ~train)
            since += 1
            if held_out < best_loss:
                best_loss, best, since = held_out, logits.detach().clone(), 0
            elif since % self.patience == 0:
                logits.data.copy_(best)
                for group in optimizer.param_groups:
                    group["lr"] *= self.decay
            if iteration == self.iterations:
                break
            optimizer.zero_grad()
            logits.grad = torch.zeros_like(logits)
            self._loss(problem, steps, times_from(logits, first), train)
            logits.grad = problem.collective.sum(logits.grad)
            torch.nn.utils.clip_grad_norm_([logits], 1.0)
            optimizer.step()
        times = times_from(best, first).cpu()
        return replace(steps, times=times[1:] if analytic else times)

    def _loss(self, problem: Problem, steps: StepSchedule, nodes: Tensor, chosen: Tensor) -> float:
        """Mean error over all ranks' chosen samples; adds its gradient to the nodes' leaves where there are any."""
        rows = chosen.nonzero()[:, 0]
        count = float(problem.collective.sum(torch.tensor(float(len(rows)), device=chosen.device)))
        if count == 0:
            raise ValueError(
                "ld3 trains on one half of the search samples and checks on the other: it needs two or more"
            )
        orders = None if steps.orders is None else list(steps.orders)
        total = torch.zeros((), dtype=torch.float64, device=chosen.device)
        for part in rows.split(self.micro_batch) if len(rows) else ():  # a rank may hold none of a half
            piece = problem.subset(part)
            times, x = nodes, piece.noise
            if isinstance(steps.start, Analytic):
                times = nodes[1:]
                x = analytic_jump(x, piece.teacher.sample_mean, steps.start_time, times[0])
            with torch.set_grad_enabled(nodes.requires_grad):
                *_, last = walk(piece.solver, piece.velocity, x, times, orders)
                error = (last.x - piece.teacher.states[-1]).double().square().flatten(1).mean(1).sum() / count
                if nodes.requires_grad:
                    error.backward(retain_graph=True)
            total += error.detach()
        return float(problem.collective.sum(total))


def times_from(logits: Tensor, first: float) -> Tensor:
    """logits (K,) -> (K+1,) times from `first` down to exactly 0, whose gaps are the softmax's shares."""
    remaining = logits.softmax(0).flip(0).cumsum(0).flip(0)
    return torch.cat([first * remaining / remaining[0].detach().clamp(min=1e-300), logits.new_zeros(1)])
