"""The best schedule of a portfolio, chosen by search samples that did not make it.

Legend: B samples, N+1 nodes counted from the noise, K steps, k one budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from oss_exp.noise import DDIMSchedule, EDMSchedule, FlowSchedule, LogSNRSchedule
from oss_exp.schedule import Pinned, StartKind, StepSchedule
from oss_exp.solvers.sampling import sample
from oss_exp.stepsize.base import DoesNotFit, StepsizeStrategy, check_num_steps
from oss_exp.stepsize.baselines.closed_form import ClosedForm
from oss_exp.stepsize.baselines.gits import GITS
from oss_exp.stepsize.oss.band import Band, strictly_monotone
from oss_exp.stepsize.oss.coefficients import Fit, FittedPath, FittedStudent
from oss_exp.stepsize.oss.objectives import COST_FLOOR, Mean, Shared
from oss_exp.stepsize.oss.recursion import SolverPath
from oss_exp.stepsize.oss.refine import FIT_CALLS, refine, refine_fitted
from oss_exp.stepsize.oss.strategies import Search, path_schedule
from oss_exp.stepsize.problem import Problem


def usual_baselines() -> dict[str, StepsizeStrategy]:
    """Return the schedules by hand, and the search of others, that `OSSBest` compares itself with."""
    by_hand = {
        "fm": FlowSchedule(),
        "ddim": DDIMSchedule(),
        "edm": EDMSchedule(),
        "logsnr": LogSNRSchedule(),
    }
    return {**{name: ClosedForm(schedule) for name, schedule in by_hand.items()}, "gits": GITS()}


@dataclass(frozen=True)
class Candidate:
    """A schedule, and the path on the teacher's grid that it was made from, where there is one."""

    name: str
    steps: StepSchedule
    path: SolverPath | FittedPath | None = None


@dataclass(frozen=True)
class OSSBest(Search):
    """The best of a portfolio (ours): searched and known schedules, judged by samples that did not make them.

    One half of the search samples makes the candidates: the paths of Algorithm 2 from `start` and from a pinned start
    and the baselines' nodes, each with the solver's steps and with fitted ones. The other half chooses; the best path
    is refined, if that holds on the other half too, and its coefficients are fitted anew to all samples. So it is
    never much worse than the best known schedule, and needs nobody to choose. The schedule's provenance has the
    candidates and what the judges said, `planning.chosen_from`, in dB. A single sample judges what it made.

    start:     of the portfolio's searches, beside a pinned one. A pipeline, which draws its own noise, has "pinned".
    ridge:     of the fits, see `coefficients.Fit`.
    baselines: {name: strategy} of one schedule for all samples; one that does not fit the teacher or the budgets is
               left out, and so are all where times are required.
    """

    start: StartKind = "analytic"
    band: Band | None = field(default_factory=Band)
    refine: bool = True
    objective: Mean = "log_mean"
    ridge: float = 1e-6
    baselines: Mapping[str, StepsizeStrategy] = field(default_factory=usual_baselines)

    def __post_init__(self) -> None:
        super().__post_init__()
        Shared(self.objective)  # its checks
        Fit(ridge=self.ridge)  # its checks
        if unfit := [name for name, each in self.baselines.items() if each.per_sample]:
            raise ValueError(
                f"oss_best.baselines must plan one schedule for all samples, {unfit[0]} does not"
            )

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        """Calls per sample of the searches, of every candidate once, and of a typical refinement."""
        budgets = set(num_steps)
        starts = len(self._starts)
        calls = starts * self._recursion_calls(num_nodes, num_steps, edge_calls)
        calls += (3 * starts + len(self.baselines) + 4) * sum(budgets)
        calls += sum(
            each.network_calls(num_nodes, num_steps, edge_calls) for each in self.baselines.values()
        )
        return calls + (sum(min(8 * k * k, FIT_CALLS) for k in budgets) if self.refine else 0)

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        budgets = check_num_steps(num_steps, problem.num_nodes)
        makers, judges = halves(problem)
        candidates = self._searched(problem, budgets, makers)
        for k, known in self._known(problem, budgets).items():
            candidates[k] += known
        return {k: self._best(problem, each, makers, judges) for k, each in candidates.items()}

    @property
    def _starts(self) -> list[StartKind]:
        """Those that are searched; where the first times are given, there is one."""
        return (
            list(dict.fromkeys((self.start, "pinned")))
            if self.first_sigmas is None
            else [self.start]
        )

    def _searched(
        self, problem: Problem, budgets: Sequence[int], makers: Tensor
    ) -> dict[int, list[Candidate]]:
        """The paths of Algorithm 2 from every start."""
        found: dict[int, list[Candidate]] = {k: [] for k in budgets}
        for start in self._starts:
            search = replace(self, start=start, refine=False)
            for k, path in search.paths(problem, budgets, Shared(self.objective, makers)).items():
                found[k].append(
                    Candidate(f"{start} start", path_schedule(problem, path, start), path)
                )
        return found

    def _known(self, problem: Problem, budgets: Sequence[int]) -> dict[int, list[Candidate]]:
        """The baselines' schedules, and the teacher's own times."""
        if self.required_times:
            return {}
        found: dict[int, list[Candidate]] = {}
        for k in budgets:
            nodes = (
                torch.linspace(0, problem.num_nodes, k + 1, dtype=torch.float64)[:-1].round().long()
            )
            found[k] = [Candidate("teacher's times", StepSchedule(_times(problem, nodes)))]
        for name, strategy in self.baselines.items():
            try:
                plans = strategy.plan(problem, budgets)
            except DoesNotFit:
                continue
            for k, steps in plans.items():
                found[k].append(Candidate(name, steps))
        return found

    def _best(
        self, problem: Problem, found: list[Candidate], makers: Tensor, judges: Tensor
    ) -> StepSchedule:
        """The candidate that the judges choose, refined, and fitted to all samples."""
        scores = {each.name: self._score(problem, each, judges) for each in found}

        # Fitted steps along all searched paths, and along the best of the known ones.
        if problem.distance.quadratic:
            known = [
                each for each in found if each.path is None and isinstance(each.steps.start, Pinned)
            ]
            paths = [each for each in found if each.path is not None]
            if known:
                paths.append(_on_grid(problem, max(known, key=lambda each: scores[each.name])))
            for each in paths:
                found.append(self._fitted(problem, each, makers))
                scores[found[-1].name] = self._score(problem, found[-1], judges)
        best = max(found, key=lambda each: scores[each.name])

        if self.refine and best.path is not None:
            refined = self._refined(problem, best, makers)
            scores[refined.name] = self._score(problem, refined, judges)
            best = max(best, refined, key=lambda each: scores[each.name])
        chosen_from = {
            "chosen_from": {name: round(score, 2) for name, score in scores.items()},
            "chosen": best.name,
        }

        if isinstance(best.path, FittedPath):
            best = self._fitted(problem, best, None)
        planning = {**best.steps.about("planning"), **chosen_from}
        return replace(best.steps, provenance={"planning": planning})

    def _score(self, problem: Problem, candidate: Candidate, judges: Tensor) -> float:
        """The judges' mean PSNR, or that of their mean error, in dB."""
        x0 = sample(problem.solver, problem.velocity, problem.noise, candidate.steps, problem.group)
        cost = problem.cost(x0, torch.tensor([problem.num_nodes], device=x0.device)).double()[
            judges
        ]
        log = self.objective == "log_mean"
        values = torch.stack(
            [cost.clamp(min=COST_FLOOR).log10() if log else cost, torch.ones_like(cost)]
        )
        total, count = problem.collective.sum(values.sum(1)).tolist()
        return -10 * (total / count if log else math.log10(max(total / count, COST_FLOOR)))

    def _fitted(self, problem: Problem, candidate: Candidate, makers: Tensor | None) -> Candidate:
        """Its path with coefficients that these samples fit (None: all)."""
        assert candidate.path is not None
        start = candidate.steps.start.kind
        with torch.no_grad():
            path, *_ = self._student(problem, start, makers).run(candidate.path)
        return Candidate(
            f"{candidate.name}, fitted steps", path_schedule(problem, path, start), path
        )

    def _refined(self, problem: Problem, candidate: Candidate, makers: Tensor) -> Candidate:
        start, required = (
            candidate.steps.start.kind,
            self._required(problem, candidate.steps.num_steps),
        )
        path = candidate.path
        if isinstance(path, FittedPath):
            path = refine_fitted(self._student(problem, start, makers), path, required)
        else:
            assert path is not None
            path = refine(
                problem.at_most(self.max_order),
                path,
                start,
                Shared(self.objective, makers),
                required,
            )
        return Candidate(f"{candidate.name}, refined", path_schedule(problem, path, start), path)

    def _student(self, problem: Problem, start: StartKind, makers: Tensor | None) -> FittedStudent:
        return FittedStudent(problem, start, Shared(self.objective, makers), Fit(ridge=self.ridge))


def halves(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return which of this rank's samples make schedules, (B,) bool, and which judge them: the others.

    Conditions come in turn: every second turn makes, so that both halves have all of them; where there are too few
    samples for two turns, every second sample. All samples do both where there is one.
    """
    count = int(
        problem.collective.sum(torch.tensor(len(problem.noise), device=problem.noise.device))
    )
    if count == 1:
        everyone = torch.ones_like(problem.samples, dtype=torch.bool)
        return everyone, everyone
    turn = problem.num_groups if 2 * problem.num_groups <= count else 1
    makers = problem.samples // turn % 2 == 0
    return makers, ~makers


def _on_grid(problem: Problem, candidate: Candidate) -> Candidate:
    """A pinned candidate on the teacher's nodes that are nearest to its times."""
    times = candidate.steps.times[:-1].to(problem.grid)
    nodes = (times[:, None] - problem.grid[None]).abs().argmin(1)
    nodes = strictly_monotone(nodes, problem.num_nodes)
    empty = torch.zeros(len(nodes), len(problem.noise), dtype=torch.float64, device=nodes.device)
    path = SolverPath(nodes[:, None], torch.ones_like(nodes)[:, None], empty)
    return Candidate(candidate.name, StepSchedule(_times(problem, nodes)), path)


def _times(problem: Problem, nodes: Tensor) -> Tensor:
    """nodes (K,) -> times (K+1,)"""
    return problem.grid[
        torch.nn.functional.pad(nodes, (0, 1), value=problem.num_nodes).to(problem.grid.device)
    ].cpu()
