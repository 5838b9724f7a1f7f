"""Hostile files for every reader of the program: each should be refused in one message.

python -m experiments.hostile_files.run                     # all; the table is table.md
python -m experiments.hostile_files.run "run folders"       # of some readers

Each case is made and read in a process of its own, forked from this one. Beside its folder is
another one, in which nothing may appear or change. A process may work for 20 seconds and use 2 GB
of memory, of which the program itself needs nearly one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from experiments.common import command_line, keep, table
from experiments.hostile_files.cases import READERS, Case, bombs, cases
from oss_exp.escaping import on_a_screen
from oss_exp.report.plots import training

SECONDS = 20
BYTES = 1 << 30  # beyond the program's own, which is about as much
KILLED_AFTER = 90  # seconds
WATCHED = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
)
SECRET = "a secret of the user"
FAULTS = ("ran", "wrote", "told", "traceback", "long")
HEADER = [
    "files",
    "tried",
    "refused",
    "taken as data",
    "code run",
    "written or deleted outside",
    "secrets told",
    "tracebacks",
    "messages over a screen",
    "slowest, CPU seconds (over 20)",
    "most memory beside the program's own (over 1 GiB)",
]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case.

    Attributes:
        case: The case.
        answer: `taken` or `refused`, or `failed`, which should not happen.
        faults: What the reader did wrong, FAULTS with details, and `memory` and `time`.
        seconds: Seconds of work.
        peak: Memory beyond the program's own, in bytes.
        message: The error's message.
    """

    case: Case
    answer: str
    faults: tuple[str, ...]
    seconds: float
    peak: int
    message: str


def attempt(case: Case) -> Outcome:
    """Make a case and read it."""
    place = Path(tempfile.mkdtemp(prefix="hostile_"))
    try:
        work = place / "work"
        outside = place / "outside"
        work.mkdir()
        outside.mkdir()
        (outside / "secret.txt").write_text(SECRET)
        Image.new("RGB", (4, 4), (1, 2, 3)).save(outside / "secret.png")
        return _attempt_in(place, case)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _attempt_in(place: Path, case: Case) -> Outcome:
    work = place / "work"

    # Make the files.
    result, *_ = forked(lambda: str(_make(case, work)), KILLED_AFTER)
    if "answer" not in result:
        raise RuntimeError(f"{case.reader}, {case.name} cannot be made: {result}")
    path = Path(result["answer"])

    # Read them.
    before = _files(place)
    *_, program_peak = forked(str, KILLED_AFTER)
    result, seconds, peak = forked(lambda: _read(case, work, path), KILLED_AFTER)
    peak -= program_peak
    after = _files(place)

    # Judge.
    faults = _faults(result, seconds, peak)
    if "outside/executed" in after:
        faults.append("ran")
    if written := _written(before, after):
        faults.append(f"wrote {written[:3]}")
    if _tells_secret(work, after.keys() - before.keys()):
        faults.append("told a secret")
    answer = {"answer": "taken", "refused": "refused", "failed": "failed"}[next(iter(result))]
    message = result.get("refused") or result.get("failed") or ""
    return Outcome(case, answer, tuple(dict.fromkeys(faults)), seconds, peak, message)


def _make(case: Case, work: Path) -> Path:
    os.chdir(work)
    return case.make(work)


def _read(case: Case, work: Path, path: Path) -> str:
    """Read a case; raise if the reader starts a process or a connection."""
    os.chdir(work)
    events: list[str] = []
    sys.addaudithook(lambda event, _: events.append(event) if event in WATCHED else None)
    try:
        READERS[case.reader][0](path)
    finally:
        if events:
            raise RuntimeError(f"ran {events[:3]}")
    return ""


def _faults(result: dict[str, str], seconds: float, peak: int) -> list[str]:
    """Return the faults that a result shows."""
    faults = []
    if "failed" in result:
        faults.append("ran" if "ran [" in result["failed"] else "traceback")
    if len(result.get("refused", "")) > 4000:
        faults.append("long")
    if seconds > SECONDS:
        faults.append("time")
    if peak > BYTES:
        faults.append("memory")
    return faults


def _files(place: Path) -> dict[str, tuple[int, int, int]]:
    """Return size, time and number of every file, without following links."""
    files = {}
    for folder, _, names in os.walk(place):
        for name in names:
            path = Path(folder) / name
            stat = path.lstat()
            files[str(path.relative_to(place))] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return files


def _written(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the files that were deleted anywhere, or written or changed outside."""
    written = set()
    for path in before.keys() | after.keys():
        is_outside = path.startswith("outside")
        if path not in after or (is_outside and before.get(path) != after[path]):
            written.add(path)
    return sorted(written - {"outside/executed"})


def _tells_secret(work: Path, names: set[str]) -> bool:
    """Tell whether the secret is in a file that a reader wrote."""
    for name in names:
        path = work.parent / name
        if path.is_file() and not path.is_symlink() and SECRET.encode() in path.read_bytes():
            return True
    return False


def forked(function: Callable[[], str], seconds: float) -> tuple[dict[str, str], float, int]:
    """Call a function in a process of its own.

    Returns:
        The "answer", or the message as "refused" (ValueError, OSError) or "failed"; the seconds
        of work; and the peak of memory in bytes.
    """
    reading, writing = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run_child(function, writing)
    os.close(writing)

    # Read its answer, and kill it if it takes too long.
    timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    timer.start()
    with os.fdopen(reading) as file:
        text = file.read()
    _, status, usage = os.wait4(child, 0)
    timer.cancel()

    if text:
        result = json.loads(text)
    else:
        code = os.waitstatus_to_exitcode(status)
        result = {"failed": f"the process ended by signal {code}"}
    worked = usage.ru_utime + usage.ru_stime  # of the processor, which others may use too
    passed = time.monotonic() - start
    return result, passed if passed > seconds else worked, usage.ru_maxrss << 10


def _run_child(function: Callable[[], str], pipe: int) -> None:
    """Call a function in this process, write what comes of it into a pipe, and end."""
    # Silence.
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    warnings.simplefilter("ignore")

    try:
        result = {"answer": function()}
    except (ValueError, OSError) as error:
        result = {"refused": str(error)[:10_000]}
    except BaseException as error:
        trace = traceback.format_exc()[-1500:]
        result = {"failed": f"{type(error).__name__}: {error!s:.300} {trace}"}
    with os.fdopen(pipe, "w") as file:
        file.write(json.dumps(result))
    os._exit(0)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("readers", nargs="*", metavar="reader", help="left out: all")
    readers = parser.parse_args().readers
    torch.set_num_threads(1)

    # Load and make what is needed once.
    training([1.0, 0.5])
    for make in bombs().values():
        make()

    # Try all cases.
    outcomes: list[Outcome] = []
    for case in cases():
        if readers and case.reader not in readers:
            continue
        if not outcomes or outcomes[-1].case.reader != case.reader:
            print(case.reader, flush=True)
        result = attempt(case)
        outcomes.append(result)
        if result.faults:
            measured = f"{result.seconds:.1f} s {result.peak >> 20} MiB"
            print(f"FAULT {case.reader}: {case.name}: {result.faults} {measured}")
            print(f"      {on_a_screen(result.message)}", flush=True)

    text = report(outcomes)
    print(text) if readers else keep(__file__, "table.md", text)


def report(outcomes: list[Outcome]) -> str:
    """Return a table with a row for each reader, and one for all."""
    rows = []
    for reader in dict.fromkeys(outcome.case.reader for outcome in outcomes):
        group = [outcome for outcome in outcomes if outcome.case.reader == reader]
        slowest = max(outcome.seconds for outcome in group)
        largest = max(outcome.peak for outcome in group)
        kinds = _kinds(group)
        limits = [
            f"{slowest:.1f} ({kinds['time']})",
            f"{largest / 2**30:.2f} GiB ({kinds['memory']})",
        ]
        rows.append([reader, *_counts(group), *limits])
    rows.append(["all", *_counts(outcomes), "", ""])
    return table(HEADER, rows)


def _kinds(outcomes: list[Outcome]) -> Counter[str]:
    """Count the faults, without their details."""
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        counts.update(fault.split()[0] for fault in outcome.faults)
    return counts


def _counts(outcomes: list[Outcome]) -> list[str]:
    """Return the numbers of cases, of refused and taken ones, and of every fault."""
    answers = Counter(outcome.answer for outcome in outcomes)
    kinds = _kinds(outcomes)
    counts = [len(outcomes), answers["refused"], answers["taken"], *(kinds[k] for k in FAULTS)]
    return [str(count) for count in counts]


if __name__ == "__main__":
    main()
