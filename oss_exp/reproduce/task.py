"""`oss-exp task=reproduce table=2`."""

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
from oss_exp.reproduce.plans import TABLES, Plan, values_of
from oss_exp.reproduce.render import Reproduction, summary
from oss_exp.tasks.task import Count, Task


@dataclass(frozen=True, kw_only=True)
class Reproduce(Task):
    """Make the missing runs of `table` (1 to 7, or all), then write <output>/table_N/<scale>.*.

    A table of which a run failed is left as it was; the others are written, and a ValueError says what failed.

    Args:
        scale: small: our own networks | paper: the public checkpoints.
        output: folder of the tables and figures.
        cells: folder of the runs, each in a folder of its own.
        jobs: runs at a time; None: one a CPU core at scale small, else one.
        overrides: {key: value} for every run that has the key; ValueError where none has.
    """

    table: Literal["all"] | Annotated[int, Ge(1), Le(7)] = "all"
    scale: Literal["small", "paper"] = "small"
    output: str = "outputs/paper"
    cells: str = "outputs/cells"
    jobs: Count | None = None
    overrides: dict[str, Any] | None = None

    def __call__(self, cfg: DictConfig) -> None:
        names = list(TABLES) if self.table == "all" else [f"table_{self.table}"]
        small, root, output = self.scale == "small", Path(self.cells), Path(self.output)

        # The plans, with the user's values in every run.
        papers = {name: Paper.load(name) for name in names}
        plans = {name: TABLES[name](paper, small) for name, paper in papers.items()}
        if self.overrides:
            plans = _with(plans, self.overrides)

        # The runs, those of the last table first.
        root.mkdir(parents=True, exist_ok=True)
        jobs = self.jobs or (os.cpu_count() or 1 if small else 1)
        try:
            with FileLock(root / ".lock", timeout=0):
                failed = make(
                    [cell for name in reversed(names) for cell in _cells(plans[name])], root, jobs
                )
        except Timeout:
            raise ValueError(
                f"another reproduction makes the runs in {root}; wait for it, or choose another task.cells"
            ) from None

        # The tables whose runs are all there.
        written = []
        for name in names:
            if not failed.keys().isdisjoint(
                cell for each in _cells(plans[name]) for cell in each.lineage()
            ):
                continue
            reproduction = Reproduction(
                papers[name], plans[name], self.scale, values_of(plans[name], root)
            )
            written.append(reproduction)
            files = reproduction.write(output / name, root)
            for figure, picture in draw(papers[name], plans[name], root).items():
                files.append(write_atomically(output / figure / f"{self.scale}.png", picture))
            print(f"\n{reproduction.markdown()}\n{', '.join(map(str, files))}")

        # What can be said of all of them.
        if self.table == "all" and not failed:
            text = f"# All tables at {self.scale} scale\n\n{summary(written)}"
            print(write_atomically(output / f"{self.scale}.md", text).read_text())
        if failed:
            reasons = "\n".join(
                f"  oss-exp {' '.join(cell.command(root))}\n    {reason}"
                for cell, reason in failed.items()
            )
            raise ValueError(
                f"{len(failed)} runs failed, and their tables are not written; the others are kept. When it is mended, "
                f"the same command goes on:\n{reasons}"
            )


def _cells(plan: Plan) -> list[Cell]:
    return [cell for source in plan.sources if source for cell in source.cells]


def _with(plans: Mapping[str, Plan], overrides: Mapping[str, Any]) -> dict[str, Plan]:
    """Return the same plans with these values in every run that has their keys."""
    unknown = set(overrides)

    def changed(cell: Cell | None) -> Cell | None:
        if cell is None:
            return None
        own = list(cell.overrides)
        for key, value in overrides.items():
            if Cell.of(*own).has(key):
                own.append(f"{key}={value}")
                unknown.discard(key)
        return Cell.of(*own, parent=changed(cell.parent))

    made = {}
    for name, plan in plans.items():
        sources = [
            source and replace(source, cells=tuple(map(changed, source.cells)))
            for source in plan.sources
        ]
        made[name] = replace(plan, sources=sources)
    if unknown:
        raise ValueError(
            f"task.overrides.{min(unknown)} is an option of none of these runs; see oss-exp --cfg job"
        )
    return made
