"""Plan step schedules: `task=search`, as a Lightning loop.

The ranks share the search samples, and rank 0 writes every schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import Tensor

from oss_exp.call_counter import CallCounter
from oss_exp.stepsize import Problem, Profile, StepsizeStrategy
from oss_exp.stepsize.base import edge_calls
from oss_exp.tasks.call_log import Calls
from oss_exp.tasks.collective import DistributedCollective, require_noises
from oss_exp.tasks.run import Run
from oss_exp.tasks.setting import Setting
from oss_exp.tasks.task import Task


@dataclass(frozen=True)
class Search(Task):
    """Plan every strategy of `stepsize` for every K of `num_steps`.

    Writes `schedules/<strategy>_<K>.json`.
    """

    def __call__(self, cfg: DictConfig) -> None:
        plan(Run(cfg))


def plan(run: Run) -> None:
    """Write the schedules of a run that are not on disk yet."""
    missing: dict[str, StepsizeStrategy] = {}
    for name, strategy in run.strategies.items():
        if not all(run.file(name, k).is_file() for k in run.num_steps):
            missing[name] = strategy

    if not missing:
        return

    # A search runs without the solver's calibration, so its schedules name none.
    solver = {**run.about["solver"], "calibration": None}

    module = SearchModule(
        run.setting,
        missing,
        run.num_steps,
        run.folder / "schedules",
        {**run.about, "solver": solver},
        run.config["stepsize"],
        run.config["offload_states"],
        run.config["keep_calls"],
    )

    # Noises of each kind of strategy.
    options = ("data.search_samples", "data.per_sample (at most data.eval_samples)")
    counts = (run.data.search_samples, run.data.per_sample)
    for kind in module.kinds:
        require_noises(run.trainer, counts[kind], options[kind])
    all_loaders = run.data.predict_dataloader()
    loaders = [all_loaders[kind] for kind in module.kinds]
    run.trainer.predict(module, dataloaders=loaders, return_predictions=False)


class SearchModule(L.LightningModule):
    """A Lightning loop that plans every strategy for every K.

    There is a loader for each kind of strategy: the search set for those that plan for all samples
    (kind 0), then the noises of per-sample strategies (kind 1). Writes
    `<folder>/<strategy>_<K>.json` with the provenance of the run and the cost of planning.

    Args:
        setting: Model, grid, solver and distance.
        strategies: The strategies by name.
        num_steps: The budgets K.
        folder: Folder of the schedules.
        provenance: The part of the provenance that all schedules share.
        strategy_configs: The configuration of every strategy, for the provenance.
        offload_states: Keep all states in host memory; only the network is on the device.
        keep_calls: Log network calls, so that a killed search resumes (see `Calls`).
    """

    def __init__(
        self,
        setting: Setting,
        strategies: Mapping[str, StepsizeStrategy],
        num_steps: list[int],
        folder: Path,
        provenance: Mapping[str, Any],
        strategy_configs: Mapping[str, Mapping[str, Any]],
        offload_states: bool = False,
        keep_calls: bool = False,
    ):
        super().__init__()
        self.model = setting.model  # registered, so that Lightning moves it to the device
        self.setting = setting
        self.strategies = strategies
        self.num_steps = num_steps
        self.folder = folder
        self.provenance = provenance
        self.strategy_configs = strategy_configs
        self.offload_states = offload_states
        self.keep_calls = keep_calls
        self.kinds = sorted({int(strategy.per_sample) for strategy in strategies.values()})
        self.batches: dict[int, list[dict[str, Tensor]]] = {kind: [] for kind in self.kinds}

    def predict_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor:
        self.batches[self.kinds[dataloader_idx]].append(batch)
        return batch["index"]

    def on_predict_epoch_end(self) -> None:
        counter = CallCounter(show=rank_zero_only.rank == 0)
        self.calls = None
        if self.keep_calls:
            self.calls = Calls(self.folder.parent / "calls", self.global_rank)

        # Strategies of one kind share a problem, and its teacher runs once.
        with counter.progress:
            problems: dict[int, Problem] = {}
            kinds_with_teacher: set[int] = set()
            for name, strategy in self.strategies.items():
                kind = int(strategy.per_sample)
                if kind not in problems:
                    problems[kind] = self._problem(self.batches[kind], counter)
                problem = problems[kind]
                if kind not in kinds_with_teacher and self._needs_teacher(strategy, problem):
                    kinds_with_teacher.add(kind)
                    self._run_teacher(kind, problem, counter)
                self._plan(name, strategy, problem, counter)

        self.trainer.strategy.barrier("schedules are on disk")
        if self.calls is not None:
            self.calls.forget()

    def _needs_teacher(self, strategy: StepsizeStrategy, problem: Problem) -> bool:
        """Tell whether planning uses the teacher; a profile may use nothing else."""
        return self._network_calls(strategy, problem) > 0 or isinstance(strategy, Profile)

    def _run_teacher(self, kind: int, problem: Problem, counter: CallCounter) -> None:
        calls_per_node = problem.solver.evals_per_step + problem.distance.calls
        calls = problem.num_nodes * calls_per_node
        with self._counted("teacher", calls, problem, counter, f"teacher_{kind}"):
            problem.teacher.run()

    @contextmanager
    def _counted(
        self, name: str, calls: int, problem: Problem, counter: CallCounter, file: str
    ) -> Iterator[None]:
        """Count, show and log the network calls of a piece of planning.

        Args:
            name: Name of the piece in the progress bar.
            calls: Expected calls per sample.
            problem: The problem that is planned for.
            counter: The counter of all calls.
            file: Name of the log.
        """
        num_bytes = calls * problem.noise.numel() * problem.noise.element_size()
        log = nullcontext() if self.calls is None else self.calls.of(file, num_bytes)
        with log, counter.measure(name, calls, len(problem.noise)):
            yield

    def _problem(self, batches: list[dict[str, Tensor]], counter: CallCounter) -> Problem:
        # One batch of all samples of this rank.
        batch = {key: torch.cat([part[key] for part in batches]) for key in batches[0]}
        velocity = self.setting.velocity(batch)
        if self.offload_states:
            velocity = velocity.offloaded(self.device)
            batch = {key: tensor.cpu() for key, tensor in batch.items()}

        classes = self.setting.classes(batch)
        if self.calls is not None:
            velocity = self.calls.recorded(velocity)
        return Problem(
            velocity=counter.counted(velocity),
            noise=self.setting.first_state(batch["noise"]),
            grid=self.setting.grid,
            solver=self.setting.solver,
            distance=self.setting.distance,
            collective=DistributedCollective(),
            samples=batch["index"],
            group=classes,
            num_groups=1 if classes is None else self.model.num_classes,
        )

    def _network_calls(self, strategy: StepsizeStrategy, problem: Problem) -> int:
        calls_per_edge = edge_calls(problem.solver, problem.distance)
        return strategy.network_calls(problem.num_nodes, self.num_steps, calls_per_edge)

    def _plan(
        self, name: str, strategy: StepsizeStrategy, problem: Problem, counter: CallCounter
    ) -> None:
        # Schedules of all budgets.
        calls = self._network_calls(strategy, problem)
        with self._counted(name, calls, problem, counter, name):
            plans = strategy.plan(problem, self.num_steps)

        # Cost over all ranks.
        counts = torch.tensor([len(problem.noise), counter.rows], device=problem.noise.device)
        samples, rows = problem.collective.sum(counts).tolist()
        cost = counter.cost(self.num_steps, samples, rows)

        # Files with their provenance.
        settings = self.strategy_configs[name]
        for k, steps in plans.items():
            provenance = {
                **self.provenance,
                "native": self.model.native(steps.times),
                "strategy": {"name": name, "baseline": strategy.baseline, **settings},
                "planning": {**cost, **steps.about("planning")},
            }
            steps = replace(steps, provenance=provenance)
            rank_zero_only(steps.save)(self.folder / f"{name}_{k}.json")
