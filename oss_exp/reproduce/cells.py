"""Runs of the program, each in a folder whose name is a hash of its configuration: none is ever made twice.

A folder that an earlier version named by another hash is found by what it holds (older_cells.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import OmegaConf
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from oss_exp.files import sha256, write_atomically
from oss_exp.reproduce.older_cells import DATA, OUTPUT, PARENT, older_cell, shipped_files
from oss_exp.tasks.older_configs import canonical

PATIENCE = 2.5  # seconds for runs to keep their states; the program itself has little more


@dataclass(frozen=True)
class Cell:
    """`oss-exp <overrides>`; of two overrides of one key the later one counts. Needs Hydra to be initialized.

    PARENT in an override stands for the folder of the cell that must be there before.
    """

    overrides: tuple[str, ...]
    parent: Cell | None = None

    @classmethod
    def of(cls, *overrides: str, parent: Cell | None = None) -> Cell:
        return cls(
            tuple({each.split("=", 1)[0].lstrip("+"): each for each in overrides}.values()), parent
        )

    @property
    def key(self) -> str:
        """Of the canonical configuration, the shipped files that it names, and the parent's key."""
        parent = self.parent.key if self.parent else None
        return sha256(json.dumps([*_content(self), parent], sort_keys=True).encode())[:16]

    @property
    def files(self) -> dict[str, str]:
        """Return {file: SHA-256} of the shipped files that it reads."""
        return _content(self)[1]

    def folder(self, root: Path) -> Path:
        """Return the folder that holds it, or will hold it when it is made."""
        folder = root / self.key
        if (folder / "cell.json").is_file():
            return folder
        parent = self.parent.folder(root).name if self.parent else None
        return older_cell(root, *_content(self), parent) or folder

    def command(self, root: Path) -> list[str]:
        parent = str(self.parent.folder(root)) if self.parent else ""
        return [each.replace(PARENT, parent) for each in self.overrides]

    def has(self, key: str) -> bool:
        """Return whether its configuration has a group or an option of this name."""
        return _has(self.overrides, key)

    def lineage(self) -> list[Cell]:
        """Itself after all that it needs."""
        return [*(self.parent.lineage() if self.parent else []), self]


@cache
def _has(overrides: tuple[str, ...], key: str) -> bool:
    config = compose("config", list(overrides), return_hydra_config=True)
    folder, _, name = key.rpartition(".")
    node = OmegaConf.select(config, folder) if folder else config
    options = (
        OmegaConf.to_container(node) if OmegaConf.is_dict(node) else {}
    )  # with those that are not set yet
    return key in config.hydra.runtime.choices or name in options


@cache
def _content(cell: Cell) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what a cell computes: its canonical configuration, and hashes of the shipped files that this names."""
    where = [f"paths.output_dir={OUTPUT}", f"paths.data_dir={DATA}"]
    config = compose("config", [*cell.overrides, "logger=none", *where])
    values = canonical(OmegaConf.to_container(config, resolve=True))
    return values, shipped_files(values)


def make(cells: Sequence[Cell], root: Path, jobs: int) -> dict[Cell, str]:
    """Run the cells that are not there yet, `jobs` at a time. Returns why the failing ones failed; the others are made.

    A cell is there when its folder has cell.json; one that was killed goes on where it was.
    """
    wanted = list(dict.fromkeys(each for cell in cells for each in cell.lineage()))
    missing = [cell for cell in wanted if not (cell.folder(root) / "cell.json").is_file()]
    print(
        f"{len(wanted)} cells, {len(missing)} of them to be made, {jobs} at a time, in {root}",
        flush=True,
    )
    bar = Progress(
        TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=False), disable=not missing,
    )  # fmt: skip
    running, pool = _Running(), ThreadPoolExecutor(jobs)
    failed: dict[Cell, str] = {}
    waiting, begun = list(missing), dict[Future, Cell]()
    try:
        with bar:
            line = bar.add_task("", total=len(missing))
            while waiting or begun:
                for cell in [
                    each for each in waiting if each.parent not in {*waiting, *begun.values()}
                ]:
                    waiting.remove(cell)
                    begun[
                        pool.submit(_make, cell, root, jobs, failed.get(cell.parent), running)
                    ] = cell
                for future in wait(begun, return_when=FIRST_COMPLETED).done:
                    cell = begun.pop(future)
                    if (reason := future.result()) is not None:
                        failed[cell] = reason
                    said = (
                        f"{cell.key} {'failed' if reason else 'made'}: {' '.join(cell.overrides)}"
                    )
                    bar.print(said, soft_wrap=True, markup=False)
                    bar.advance(line)
    finally:
        running.stop()
        pool.shutdown(cancel_futures=True)
    return failed


def _make(cell: Cell, root: Path, jobs: int, without: str | None, running: _Running) -> str | None:
    """None, or why it failed; without: why what it needs did."""
    if without is not None:
        return f"what it needs has failed: {without}"
    folder = cell.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    command, started = cell.command(root), time.monotonic()
    with open(folder / ".making", "w") as lock, open(folder / "log.txt", "a") as log:
        # The run holds it too, so that one that outlived the program that began it is waited for.
        fcntl.flock(lock, fcntl.LOCK_EX)
        code = running.run(
            [*command, "logger=none", f"hydra.run.dir={folder}"], lock.fileno(), log, jobs
        )
    if code:
        reason = folder / "error.log"
        text = reason.read_text() if reason.is_file() else (folder / "log.txt").read_text()[-1000:]
        return text.split("\n\nTraceback")[0].strip()
    packages = {name: version(name) for name in ("oss_exp", "torch", "lightning", "diffusers")}
    seconds = round(time.monotonic() - started)  # of the last go, where it was killed
    parent = cell.parent.folder(root).name if cell.parent else None
    made = {
        "overrides": command,
        "parent": parent,
        "files": cell.files,
        "packages": packages,
        "seconds": seconds,
    }
    write_atomically(folder / "cell.json", json.dumps(made, indent=1) + "\n")
    return None


class _Running:
    """The processes at work, so that all can be ended when one is interrupted."""

    def __init__(self) -> None:
        self.processes: set[subprocess.Popen] = set()
        self.lock, self.stopped = threading.Lock(), False

    def run(self, overrides: list[str], lock: int, log: Any, jobs: int) -> int:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HYDRA_FULL_ERROR": "0"}
        with self.lock:
            if self.stopped:
                return 1
            command = [sys.executable, "-m", "oss_exp", *overrides]
            process = subprocess.Popen(
                command, env=environment, pass_fds=[lock], stdout=log, stderr=subprocess.STDOUT
            )
            self.processes.add(process)
        code = process.wait()
        self.processes.discard(process)
        return code

    def stop(self) -> None:
        """End all, each with its state kept: it goes on where it was when it is wanted again."""
        with self.lock:
            self.stopped = True
            running = list(self.processes)
        for process in running:
            process.terminate()
        last = time.monotonic() + PATIENCE
        for process in running:
            try:
                process.wait(max(0.0, last - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
