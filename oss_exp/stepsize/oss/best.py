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
from oss_exp.stepsize.oss.objectives import COST_FLOOR, Mean, Shared, restored, transformed
from oss_exp.stepsize.oss.recursion import SolverPath
from oss_exp.stepsize.oss.refine import FIT_CALLS, refine, refine_fitted
from oss_exp.stepsize.oss.strategies import Search, path_schedule
from oss_exp.stepsize.problem import Problem
from oss_exp.stepsize.split import split_samples

CLOSE = 1.0  # dB, less than a refinement usually gains


def usual_baselines() -> dict[str, StepsizeStrategy]:
    """Return the schedules that `OSSBest` compares itself with: four formulas and GITS."""
    return {
        "fm": ClosedForm(FlowSchedule()),
        "ddim": ClosedForm(DDIMSchedule()),
        "edm": ClosedForm(EDMSchedule()),
        "logsnr": ClosedForm(LogSNRSchedule()),
        "gits": GITS(),
    }


@dataclass(frozen=True)
class Candidate:
    """A schedule, with the path on the teacher's grid that it was made from, if there is one."""

    name: str
    steps: StepSchedule
    path: SolverPath | FittedPath | None = None


@dataclass(frozen=True)
class OSSBest(Search):
    """The best schedule of a portfolio (ours), judged by samples that did not make it.

    One half of the search samples makes the candidates: the paths of Algorithm 2 from
    `start` and from a pinned start, and the nodes of the baselines, each with the
    solver's steps and with fitted ones. The other half chooses. The two best paths, as
    far as they are within 1 dB of the best candidate, are refined, which counts if it
    is better on the other half too. The coefficients of the chosen one are fitted again
    to all samples.
    So the result is never much worse than the best known schedule, and nobody needs to
    choose a strategy. Its provenance lists the candidates with their scores in dB,
    `planning.chosen_from`. A single sample judges what it made.

    Args:
        start: start of the portfolio's searches, beside the pinned one. A pipeline,
            which draws its own noise, needs "pinned".
        objective: as in `OSSShared`.
        ridge: regularisation of the fits, see `coefficients.Fit`.
        baselines: {name: strategy}, each with one schedule for all samples. One that
            does not fit the teacher or the budgets is left out. With required times all
            of them are.
    """

    start: StartKind = "analytic"
    band: Band | None = field(default_factory=Band)
    refine: bool = True
    objective: Mean = "log_mean"
    ridge: float = 1e-6
    baselines: Mapping[str, StepsizeStrategy] = field(default_factory=usual_baselines)

    def __post_init__(self) -> None:
        super().__post_init__()
        Shared(self.objective)  # checks it
        Fit(ridge=self.ridge)  # checks it
        for name, strategy in self.baselines.items():
            if strategy.per_sample:
                raise ValueError(
                    f"oss_best.baselines must plan one schedule for all samples, {name} does not"
                )

    def network_calls(self, num_nodes: int, num_steps: Sequence[int], edge_calls: int = 0) -> int:
        """Return the calls per sample of the searches, all candidates and typical refinements."""
        budgets = set(num_steps)
        calls = (3 * len(self._starts) + len(self.baselines) + 4) * sum(budgets)
        for start in self._starts:
            search = replace(self, start=start)
            calls += search._recursion_calls(num_nodes, num_steps, edge_calls)
        for strategy in self.baselines.values():
            calls += strategy.network_calls(num_nodes, num_steps, edge_calls)
        if self.refine:
            calls += sum(min(12 * k * k, FIT_CALLS) for k in budgets)
        return calls

    def plan(self, problem: Problem, num_steps: Sequence[int]) -> dict[int, StepSchedule]:
        budgets = check_num_steps(num_steps, problem.num_nodes)
        makers, judges = halves(problem)
        searched = self._searched(problem, budgets, makers)
        baselines = self._baseline_candidates(problem, budgets)
        plans = {}
        for k in budgets:
            candidates = [*searched[k], *baselines[k]]
            plans[k] = self._best(problem, candidates, makers, judges)
        return plans

    @property
    def _starts(self) -> list[StartKind]:
        """The starts to search from; a single one where the first times are given."""
        if self.first_sigmas is not None or self.start == "pinned":
            return [self.start]
        return [self.start, "pinned"]

    def _searched(
        self, problem: Problem, budgets: Sequence[int], makers: Tensor
    ) -> dict[int, list[Candidate]]:
        """Return the paths of Algorithm 2 from every start, for each budget."""
        candidates: dict[int, list[Candidate]] = {k: [] for k in budgets}
        objective = Shared(self.objective, makers)
        for start in self._starts:
            search = replace(self, start=start, refine=False)
            for k, path in search.paths(problem, budgets, objective).items():
                steps = path_schedule(problem, path, start)
                candidates[k].append(Candidate(f"{start} start", steps, path))
        return candidates

    def _baseline_candidates(
        self, problem: Problem, budgets: Sequence[int]
    ) -> dict[int, list[Candidate]]:
        """Return the teacher's own times and the baselines' schedules, for each budget."""
        candidates: dict[int, list[Candidate]] = {k: [] for k in budgets}
        if self.required_times:
            return candidates

        # The teacher's times, evenly over its nodes.
        for k in budgets:
            even = torch.linspace(0, problem.num_nodes, k + 1, dtype=torch.float64)
            steps = StepSchedule(_times(problem, even[:-1].round().long()))
            candidates[k].append(Candidate("teacher's times", steps))

        # Baselines.
        for name, strategy in self.baselines.items():
            try:
                plans = strategy.plan(problem, budgets)
            except DoesNotFit:
                continue
            for k, steps in plans.items():
                candidates[k].append(Candidate(name, steps))
        return candidates

    def _best(
        self, problem: Problem, candidates: list[Candidate], makers: Tensor, judges: Tensor
    ) -> StepSchedule:
        """Return the candidate that the judges choose, refined, and fitted to all samples."""
        scores: dict[str, float] = {}

        def best_of(candidates: Sequence[Candidate]) -> Candidate:
            for candidate in candidates:
                if candidate.name not in scores:
                    scores[candidate.name] = self._score(problem, candidate, judges)
            return max(candidates, key=lambda candidate: scores[candidate.name])

        best = best_of(candidates)

        # Fitted steps along all searched paths, and along the best of the pinned baselines.
        if problem.distance.quadratic:
            paths = [candidate for candidate in candidates if candidate.path is not None]
            baselines = []
            for candidate in candidates:
                if candidate.path is None and isinstance(candidate.steps.start, Pinned):
                    baselines.append(candidate)
            if baselines:
                paths.append(_on_grid(problem, best_of(baselines)))
            fitted = [self._fitted(problem, candidate, makers) for candidate in paths]
            candidates = [*candidates, *fitted]
            best = best_of(candidates)

        # Refinement of the two best paths, where the judges hardly tell them from the best.
        if self.refine:
            paths = [candidate for candidate in candidates if candidate.path is not None]
            paths.sort(key=lambda candidate: scores[candidate.name], reverse=True)
            least = scores[best.name] - CLOSE
            close = [candidate for candidate in paths[:2] if scores[candidate.name] > least]
            refined = [self._refined(problem, candidate, makers) for candidate in close]
            best = best_of([best, *refined])
        planning = {
            "chosen_from": {name: round(score, 2) for name, score in scores.items()},
            "chosen": best.name,
        }

        # Coefficients from all samples.
        if isinstance(best.path, FittedPath):
            best = self._fitted(problem, best, None)
        planning = {**best.steps.about("planning"), **planning}
        return replace(best.steps, provenance={"planning": planning})

    def _score(self, problem: Problem, candidate: Candidate, judges: Tensor) -> float:
        """Return the PSNR in dB of the judges' mean error, as the objective takes the mean."""
        x0 = sample(problem.solver, problem.velocity, problem.noise, candidate.steps, problem.group)
        end = torch.tensor([problem.num_nodes], device=x0.device)
        cost = problem.cost(x0, end).double()[judges]
        value = transformed(cost, self.objective)

        # Mean over all ranks.
        sums = torch.stack([value, torch.ones_like(value)]).sum(1)
        total, count = problem.collective.sum(sums).tolist()
        mean = restored(total / count, self.objective)
        return -10 * math.log10(max(mean, COST_FLOOR))

    def _fitted(self, problem: Problem, candidate: Candidate, makers: Tensor | None) -> Candidate:
        """Return the candidate's path with coefficients fitted to some samples; None means all."""
        assert candidate.path is not None
        start = candidate.steps.start.kind
        with torch.no_grad():
            path, *_ = self._student(problem, start, makers).run(candidate.path)
        steps = path_schedule(problem, path, start)
        return Candidate(f"{candidate.name}, fitted steps", steps, path)

    def _refined(self, problem: Problem, candidate: Candidate, makers: Tensor) -> Candidate:
        """Return the candidate with its path refined over the makers' error."""
        start = candidate.steps.start.kind
        required = self._required(problem, candidate.steps.num_steps)
        path = candidate.path
        if isinstance(path, FittedPath):
            path = refine_fitted(self._student(problem, start, makers), path, required)
        else:
            assert path is not None
            objective = Shared(self.objective, makers)
            path = refine(problem.at_most(self.max_order), path, start, objective, required)
        return Candidate(f"{candidate.name}, refined", path_schedule(problem, path, start), path)

    def _student(self, problem: Problem, start: StartKind, makers: Tensor | None) -> FittedStudent:
        return FittedStudent(problem, start, Shared(self.objective, makers), Fit(ridge=self.ridge))


def halves(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return which of this rank's samples make schedules, (B,) bool, and which judge them.

    A single sample does both.
    """
    makers, judges = split_samples(problem)
    if problem.collective.sum(judges.sum()) == 0:
        judges = makers
    return makers, judges


def _on_grid(problem: Problem, candidate: Candidate) -> Candidate:
    """Return a pinned candidate on the teacher's nodes that are nearest to its times."""
    times = candidate.steps.times[:-1].to(problem.grid)
    nodes = (times[:, None] - problem.grid[None]).abs().argmin(1)
    nodes = strictly_monotone(nodes, problem.num_nodes)
    no_costs = problem.grid.new_zeros(len(nodes), len(problem.noise))
    path = SolverPath(nodes[:, None], torch.ones_like(nodes)[:, None], no_costs)
    return Candidate(candidate.name, StepSchedule(_times(problem, nodes)), path)


def _times(problem: Problem, nodes: Tensor) -> Tensor:
    """Return the times (K+1,) of nodes (K,) and of node N."""
    closed = torch.nn.functional.pad(nodes, (0, 1), value=problem.num_nodes)
    return problem.grid[closed.to(problem.grid.device)].cpu()
