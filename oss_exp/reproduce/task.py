"""`oss-exp task=reproduce table=2 scale=small`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from filelock import FileLock, Timeout
from hydra import compose
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
    """Make the missing runs of `table` (1 to 7, or all), then write <experiments>/table_N/<scale>.*.

    cells: the folder of the runs. jobs: runs at a time; null: one a CPU core, on a GPU one. overrides: for every run.
    """

    table: Literal["all"] | Annotated[int, Ge(1), Le(7)] = "all"
    scale: Literal["small", "paper"] = "small"
    experiments: str = "experiments"
    cells: str = "outputs/cells"
    jobs: Count | None = None
    overrides: dict[str, Any] | None = None

    def __call__(self, cfg: DictConfig) -> None:
        reproduce(self)


def reproduce(task: Reproduce) -> None:
    """Make the runs and write the tables.

    A table of which a run failed is left as it was; the others are written, and a ValueError says what failed.
    """
    names = list(TABLES) if task.table == "all" else [f"table_{task.table}"]
    small, root, experiments = task.scale == "small", Path(task.cells), Path(task.experiments)
    jobs = task.jobs or (os.cpu_count() or 1 if small else 1)
    more = [f"{key}={value}" for key, value in (task.overrides or {}).items()]
    papers = {name: Paper.load(experiments / name) for name in names}
    plans = {name: _with(TABLES[name](paper, small), more) for name, paper in papers.items()}
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / ".lock", timeout=0):
            failed = make([cell for name in reversed(names) for cell in _cells(plans[name])], root, jobs)
    except Timeout:
        raise ValueError(
            f"another reproduction makes the runs in {root}; wait for it, or choose another task.cells"
        ) from None
    made = []
    for name in names:
        if failed.keys().isdisjoint(cell for each in _cells(plans[name]) for cell in each.lineage()):
            made.append(Reproduction(papers[name], plans[name], task.scale, values_of(plans[name], root)))
            files = made[-1].write(experiments / name, root)
            for figure, picture in draw(papers[name], plans[name], root).items():
                files.append(write_atomically(experiments / figure / f"{task.scale}.png", picture))
            print(f"\n{made[-1].markdown()}\n{', '.join(map(str, files))}")
    if task.table == "all" and not failed:
        path = write_atomically(
            experiments / f"{task.scale}.md", f"# All tables, `scale={task.scale}`\n\n{summary(made)}"
        )
        print(path.read_text())
    if failed:
        reasons = "\n".join(
            f"  oss-exp {' '.join(cell.command(root))}\n    {reason}" for cell, reason in failed.items()
        )
        raise ValueError(
            f"{len(failed)} runs failed, and their tables are not written; the others are kept. When it is mended, the "
            f"same command goes on:\n{reasons}"
        )


def _cells(plan: Plan) -> list[Cell]:
    return [cell for source in plan.sources if source for cell in source.cells]


def _with(plan: Plan, overrides: list[str]) -> Plan:
    """The same with these values in every run that reads them."""

    def more(cell: Cell | None) -> Cell | None:
        if cell is None or not overrides:
            return cell
        read = compose("config", list(cell.overrides))
        values = [override for override in overrides if re.split(r"[.@=]", override)[0] in read]
        return Cell.of(*cell.overrides, *values, parent=more(cell.parent))

    sources = [source and replace(source, cells=tuple(map(more, source.cells))) for source in plan.sources]
    return replace(plan, sources=sources)
