"""The task that reproduces the paper's tables: `oss-exp task=reproduce table=2`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from filelock import FileLock, Timeout
from omegaconf import DictConfig

from oss_exp.files import write_atomically
from oss_exp.reproduce.cells import Cell, make
from oss_exp.reproduce.figures import draw
from oss_exp.reproduce.paper import Paper
from oss_exp.reproduce.plans import TABLES, Plan, Source, values_of
from oss_exp.reproduce.render import Reproduction, summary
from oss_exp.tasks.task import Count, Task


@dataclass(frozen=True, kw_only=True)
class Reproduce(Task):
    """Do the missing runs of a table, then write <output>/table_N/<scale>.*.

    A table with a failed run is left as it was; the others are written, and a
    ValueError tells what failed.

    Args:
        table: Number of the table, 1 to 7, or "all".
        scale: "small" for our own networks, "paper" for the public checkpoints.
        output: Folder of the tables and figures.
        cells: Folder of the runs, each in a folder of its own.
        jobs: Runs at a time; None means one for each CPU core at scale small, else one.
        overrides: {key: value} for every run that has the key; ValueError where none
            has it.
    """

    table: Literal["all"] | Annotated[int, Ge(1), Le(7)] = "all"
    scale: Literal["small", "paper"] = "small"
    output: str = "outputs/paper"
    cells: str = "outputs/cells"
    jobs: Count | None = None
    overrides: dict[str, Any] | None = None

    def __call__(self, cfg: DictConfig) -> None:
        names = list(TABLES) if self.table == "all" else [f"table_{self.table}"]
        small = self.scale == "small"
        root = Path(self.cells)

        # Plans, with the user's values in every run.
        papers = {name: Paper.load(name) for name in names}
        plans = {name: TABLES[name](paper, small) for name, paper in papers.items()}
        if self.overrides:
            plans = _with(plans, self.overrides)

        # Runs, those of the last table first.
        root.mkdir(parents=True, exist_ok=True)
        jobs = self.jobs or (os.cpu_count() or 1 if small else 1)
        cells = []
        for name in reversed(names):
            cells += _cells(plans[name])
        try:
            with FileLock(root / ".lock", timeout=0):
                failed = make(cells, root, jobs)
        except Timeout:
            raise ValueError(
                f"another reproduction makes the runs in {root}; wait for it, "
                "or choose another task.cells"
            ) from None

        # Tables whose runs are all there.
        written = []
        for name in names:
            if _is_complete(plans[name], failed):
                written.append(self._write(papers[name], plans[name]))

        # Summary of all tables, or the failures.
        if self.table == "all" and not failed:
            text = f"# All tables at {self.scale} scale\n\n{summary(written)}"
            file = write_atomically(Path(self.output) / f"{self.scale}.md", text)
            print(file.read_text())
        if failed:
            reasons = []
            for cell, reason in failed.items():
                reasons.append(f"  oss-exp {' '.join(cell.command(root))}\n    {reason}")
            raise ValueError(
                f"{len(failed)} runs failed, and their tables are not written; the others are "
                "kept. When it is mended, the same command goes on:\n" + "\n".join(reasons)
            )

    def _write(self, paper: Paper, plan: Plan) -> Reproduction:
        """Write and print a table, and draw its figures."""
        root = Path(self.cells)
        output = Path(self.output)

        # Table.
        reproduction = Reproduction(paper, plan, self.scale, values_of(plan, root))
        files = reproduction.write(output / paper.name, root)

        # Figures.
        for figure, picture in draw(paper, plan, root).items():
            files.append(write_atomically(output / figure / f"{self.scale}.png", picture))
        print(f"\n{reproduction.markdown()}\n{', '.join(map(str, files))}")
        return reproduction


def _cells(plan: Plan) -> list[Cell]:
    """Return the runs that the numbers of a plan are read from."""
    cells = []
    for source in plan.sources:
        if source is not None:
            cells += source.cells
    return cells


def _is_complete(plan: Plan, failed: Mapping[Cell, str]) -> bool:
    """Return whether no run that a plan needs has failed."""
    needed = set()
    for cell in _cells(plan):
        needed.update(cell.lineage())
    return needed.isdisjoint(failed)


def _with(plans: Mapping[str, Plan], overrides: Mapping[str, Any]) -> dict[str, Plan]:
    """Return the same plans with these values in every run that has their keys."""
    unknown = set(overrides)

    def changed(cell: Cell) -> Cell:
        values = list(cell.overrides)
        for key, value in overrides.items():
            if Cell.of(*values).has(key):
                values.append(f"{key}={value}")
                unknown.discard(key)
        parent = None if cell.parent is None else changed(cell.parent)
        return Cell.of(*values, parent=parent)

    # Plans with other runs.
    changed_plans = {}
    for name, plan in plans.items():
        sources: list[Source | None] = []
        for source in plan.sources:
            cells = () if source is None else tuple(map(changed, source.cells))
            sources.append(None if source is None else replace(source, cells=cells))
        changed_plans[name] = replace(plan, sources=sources)

    # Keys that no run has.
    if unknown:
        raise ValueError(
            f"task.overrides.{min(unknown)} is an option of none of these runs; "
            "see oss-exp --cfg job"
        )
    return changed_plans
