"""task=search, and planning as a Lightning loop: the ranks share the search samples, rank 0 writes every schedule."""

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
from oss_exp.tasks.collective import DistributedCollective
from oss_exp.tasks.run import Run
from oss_exp.tasks.setting import Setting
from oss_exp.tasks.task import Task


@dataclass(frozen=True)
class Search(Task):
    """Plan every strategy of `stepsize` for every K of `num_steps`; write schedules/<strategy>_<K>.json."""

    def __call__(self, cfg: DictConfig) -> None:
        plan(Run(cfg))


def plan(run: Run) -> None:
    """Write the schedules of a run that are not there yet."""
    missing = {
        name: strategy
        for name, strategy in run.strategies.items()
        if not all(run.file(name, k).is_file() for k in run.num_steps)
    }
    if not missing:
        return
    module = SearchModule(
        run.setting,
        missing,
        run.num_steps,
        run.folder / "schedules",
        run.about,
        run.config["stepsize"],
        run.config["offload_states"],
        run.config["keep_calls"],
    )
    run.trainer.predict(module, dataloaders=run.data.predict_dataloader(), return_predictions=False)


class SearchModule(L.LightningModule):
    """Plans every strategy for every K. Loader 0 brings the search set, loader 1 the noises of per-sample strategies.

    Writes `<folder>/<strategy>_<K>.json`, each with the provenance of the run and what planning it cost.
    offload_states: keep all states in host memory; the network alone is on the device. keep_calls: so that it goes on
    where it was killed (`Calls`).
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
        self.setting, self.strategies, self.num_steps = setting, strategies, num_steps
        self.folder, self.provenance, self.strategy_configs = folder, provenance, strategy_configs
        self.offload_states, self.keep_calls = offload_states, keep_calls
        self.batches: dict[int, list[dict[str, Tensor]]] = {0: [], 1: []}

    def predict_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor:
        self.batches[dataloader_idx].append(batch)
        return batch["index"]

    def on_predict_epoch_end(self) -> None:
        meter = CallCounter(show=rank_zero_only.rank == 0)
        self.calls = (
            Calls(self.folder.parent / "calls", self.global_rank) if self.keep_calls else None
        )
        with meter.progress:
            problems: dict[int, Problem] = {}
            taught: set[int] = set()
            for name, strategy in self.strategies.items():
                loader = int(strategy.per_sample)
                problem = problems[loader] = problems.get(loader) or self._problem(
                    self.batches[loader], meter
                )
                # Times by hand need no teacher; a profile may need nothing else.
                if loader not in taught and (
                    self._calls(strategy, problem) or isinstance(strategy, Profile)
                ):
                    taught.add(loader)
                    calls = problem.num_nodes * (
                        problem.solver.evals_per_step + problem.distance.calls
                    )
                    with self._measured("teacher", calls, problem, meter, f"teacher_{loader}"):
                        problem.teacher.run()  # once, for all strategies
                self._plan(name, strategy, problem, meter)
        self.trainer.strategy.barrier("schedules are on disk")
        if self.calls is not None:
            self.calls.forget()

    @contextmanager
    def _measured(
        self, name: str, calls: int, problem: Problem, meter: CallCounter, file: str
    ) -> Iterator[None]:
        """A piece of planning, its calls (so many expected a sample) counted, shown and kept."""
        size = calls * problem.noise.numel() * problem.noise.element_size()
        kept = nullcontext() if self.calls is None else self.calls.of(file, size)
        with kept, meter.measure(name, calls, len(problem.noise)):
            yield

    def _problem(self, batches: list[dict[str, Tensor]], meter: CallCounter) -> Problem:
        if not batches:
            raise ValueError(
                "a rank got no noises; use fewer devices, or more data.search_samples or data.per_sample"
            )
        batch = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
        velocity = self.setting.velocity(batch)
        if self.offload_states:
            velocity, batch = (
                velocity.offloaded(self.device),
                {key: each.cpu() for key, each in batch.items()},
            )
        classes = self.setting.classes(batch)
        if self.calls is not None:
            velocity = self.calls.kept(velocity)
        return Problem(
            velocity=meter.counted(velocity),
            noise=self.setting.first_state(batch["noise"]),
            grid=self.setting.grid,
            solver=self.setting.solver,
            distance=self.setting.distance,
            collective=DistributedCollective(),
            samples=batch["index"],
            group=classes,
            num_groups=1 if classes is None else self.model.num_classes,
        )

    def _calls(self, strategy: StepsizeStrategy, problem: Problem) -> int:
        return strategy.network_calls(
            problem.num_nodes, self.num_steps, edge_calls(problem.solver, problem.distance)
        )

    def _plan(
        self, name: str, strategy: StepsizeStrategy, problem: Problem, meter: CallCounter
    ) -> None:
        with self._measured(name, self._calls(strategy, problem), problem, meter, name):
            plans = strategy.plan(problem, self.num_steps)
        counts = torch.tensor([len(problem.noise), meter.rows], device=problem.noise.device)
        samples, rows = problem.collective.sum(counts).tolist()
        for k, plan in plans.items():
            made = {
                **self.provenance,
                "native": self.model.native(plan.times),
                "strategy": {
                    "name": name,
                    "baseline": strategy.baseline,
                    **self.strategy_configs[name],
                },
                "planning": {**meter.cost(self.num_steps, samples, rows), **plan.about("planning")},
            }
            rank_zero_only(replace(plan, provenance=made).save)(self.folder / f"{name}_{k}.json")
