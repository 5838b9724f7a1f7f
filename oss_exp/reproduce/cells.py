"""Runs of the program, each in a folder named by a hash of its configuration, so that none repeats.

A folder that an earlier version named by another hash is recognised by its content
(older_cells.py).
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

PACKAGES = ("oss_exp", "torch", "lightning", "diffusers")  # whose versions are recorded
PATIENCE = 2.5  # seconds for runs to save their states; the program itself has little more


@dataclass(frozen=True)
class Cell:
    """A run of `oss-exp <overrides>`. Hydra must be initialized.

    Attributes:
        overrides: Arguments of the command line. PARENT stands for the parent's folder.
        parent: A run that must be done before.
    """

    overrides: tuple[str, ...]
    parent: Cell | None = None

    @classmethod
    def of(cls, *overrides: str, parent: Cell | None = None) -> Cell:
        """Return the cell of some overrides; of two for one key, the later one counts."""
        last = {override.split("=", 1)[0].lstrip("+"): override for override in overrides}
        return cls(tuple(last.values()), parent)

    @property
    def key(self) -> str:
        """A hash of the canonical configuration, its shipped files and the parent."""
        parent = self.parent.key if self.parent else None
        return sha256(json.dumps([*_content(self), parent], sort_keys=True).encode())[:16]

    @property
    def files(self) -> dict[str, str]:
        """The shipped files that the run reads: {file: SHA-256}."""
        return _content(self)[1]

    def folder(self, root: Path) -> Path:
        """Return the folder below `root` that has the run, or will have it."""
        folder = root / self.key
        if (folder / "cell.json").is_file():
            return folder
        parent = self.parent.folder(root).name if self.parent else None
        return older_cell(root, *_content(self), parent) or folder

    def command(self, root: Path) -> list[str]:
        """Return the arguments of the command line, with the parent's folder in place."""
        parent = str(self.parent.folder(root)) if self.parent else ""
        return [override.replace(PARENT, parent) for override in self.overrides]

    def has(self, key: str) -> bool:
        """Return whether the configuration has a group or an option of this name."""
        return _has(self.overrides, key)

    def lineage(self) -> list[Cell]:
        """Return the runs that must be done before, in order, and the run itself."""
        return [*(self.parent.lineage() if self.parent else []), self]


@cache
def _has(overrides: tuple[str, ...], key: str) -> bool:
    config = compose("config", list(overrides), return_hydra_config=True)
    folder, _, name = key.rpartition(".")
    node = OmegaConf.select(config, folder) if folder else config

    # A container, unlike the node, also has the options without a value.
    options = OmegaConf.to_container(node) if OmegaConf.is_dict(node) else {}
    return key in config.hydra.runtime.choices or name in options


@cache
def _content(cell: Cell) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a run's canonical configuration, and the hashes of the shipped files that it names."""
    places = [f"paths.output_dir={OUTPUT}", f"paths.data_dir={DATA}"]
    config = compose("config", [*cell.overrides, "logger=none", *places])
    values = canonical(OmegaConf.to_container(config, resolve=True))
    return values, shipped_files(values)


def make(cells: Sequence[Cell], root: Path, jobs: int) -> dict[Cell, str]:
    """Do the runs that are not there yet, and those that they need.

    A run is there if its folder has cell.json. One that was killed continues where it
    was.

    Args:
        cells: The runs.
        root: Folder of all runs.
        jobs: Runs at a time.

    Returns:
        The reasons of the runs that failed; all others are done.
    """
    # Runs to do.
    needed = {}
    for cell in cells:
        needed |= dict.fromkeys(cell.lineage())
    missing = [cell for cell in needed if not (cell.folder(root) / "cell.json").is_file()]
    print(
        f"{len(needed)} cells, {len(missing)} of them to be made, {jobs} at a time, in {root}",
        flush=True,
    )

    # Workers.
    processes = _Processes()
    pool = ThreadPoolExecutor(jobs)
    waiting = list(missing)
    running: dict[Future, Cell] = {}
    failed: dict[Cell, str] = {}
    try:
        with _progress(disable=not missing) as bar:
            line = bar.add_task("", total=len(missing))
            while waiting or running:
                # Start the runs whose parents are done.
                undone = {*waiting, *running.values()}
                for cell in [cell for cell in waiting if cell.parent not in undone]:
                    waiting.remove(cell)
                    parent_error = failed.get(cell.parent)
                    future = pool.submit(_make, cell, root, jobs, parent_error, processes)
                    running[future] = cell

                # Note those that are finished.
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    cell = running.pop(future)
                    error = future.result()
                    if error is not None:
                        failed[cell] = error
                    outcome = "failed" if error else "made"
                    text = f"{cell.key} {outcome}: {' '.join(cell.overrides)}"
                    bar.print(text, soft_wrap=True, markup=False)
                    bar.advance(line)
    finally:
        processes.stop()
        pool.shutdown(cancel_futures=True)
    return failed


def _progress(disable: bool) -> Progress:
    """Return a progress bar of runs with elapsed and remaining time."""
    return Progress(
        TextColumn("cells"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=False),
        disable=disable,
    )


def _make(
    cell: Cell, root: Path, jobs: int, parent_error: str | None, processes: _Processes
) -> str | None:
    """Do one run. Returns an error message, or None on success."""
    if parent_error is not None:
        return f"what it needs has failed: {parent_error}"
    folder = cell.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    command = cell.command(root)
    started = time.monotonic()

    # The run holds the lock too, so that one which outlived its program is waited for.
    with open(folder / ".making", "w") as lock, open(folder / "log.txt", "a") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        overrides = [*command, "logger=none", f"hydra.run.dir={folder}"]
        code = processes.run(overrides, lock.fileno(), log, jobs)

    # Failure.
    if code:
        error = folder / "error.log"
        text = error.read_text() if error.is_file() else (folder / "log.txt").read_text()[-1000:]
        return text.split("\n\nTraceback")[0].strip()

    # Record.
    record = {
        "overrides": command,
        "parent": cell.parent.folder(root).name if cell.parent else None,
        "files": cell.files,
        "packages": {name: version(name) for name in PACKAGES},
        "seconds": round(time.monotonic() - started),  # of the last attempt, where it was killed
    }
    write_atomically(folder / "cell.json", json.dumps(record, indent=1) + "\n")
    return None


class _Processes:
    """The running processes, all of which can be ended when one is interrupted."""

    def __init__(self) -> None:
        self.processes: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def run(self, overrides: list[str], lock: int, log: Any, jobs: int) -> int:
        """Run the program and return its exit code.

        Args:
            overrides: Arguments of the command line.
            lock: File descriptor that the process inherits.
            log: File for its output.
            jobs: Processes that share the CPU cores.
        """
        threads = max(1, (os.cpu_count() or 1) // jobs)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HYDRA_FULL_ERROR": "0"}
        command = [sys.executable, "-m", "oss_exp", *overrides]
        with self.lock:
            if self.stopped:
                return 1
            process = subprocess.Popen(
                command, env=environment, pass_fds=[lock], stdout=log, stderr=subprocess.STDOUT
            )
            self.processes.add(process)
        code = process.wait()
        self.processes.discard(process)
        return code

    def stop(self) -> None:
        """End all processes, and start no more; each saves its state and can continue later."""
        with self.lock:
            self.stopped = True
            running = list(self.processes)
        for process in running:
            process.terminate()

        # Kill those that take too long.
        deadline = time.monotonic() + PATIENCE
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
