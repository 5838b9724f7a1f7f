"""What hostile files do to every reader of the program: they should be refused, in one message.

python -m experiments.hostile_files.run                     # all; the table is table.md
python -m experiments.hostile_files.run "run folders"       # of some readers

Each case is made and read in a process of its own, forked from this one. Beside its folder is another one, in which
nothing may appear or change; a process may work 20 seconds and 2 GB of memory, of
which the program itself needs nearly one.
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

from experiments.common import keep, table
from experiments.hostile_files.cases import READERS, Case, bombs, cases
from oss_exp.escaping import on_a_screen
from oss_exp.report.plots import training

SECONDS = 20
BYTES = 1 << 30  # beside the program's own, which is about as much
ALLOWED = 90  # seconds after which a process is ended
WATCHED = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "code.__new__",
)
SECRET = "a secret of the user"


@dataclass(frozen=True)
class Outcome:
    """answer: taken, refused, or what should not be. faults: of ran, wrote, memory, time, traceback, long."""

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
        work, outside = place / "work", place / "outside"
        work.mkdir()
        outside.mkdir()
        (outside / "secret.txt").write_text(SECRET)
        Image.new("RGB", (4, 4), (1, 2, 3)).save(outside / "secret.png")
        made, *_ = forked(lambda: str(_made(case, work)), ALLOWED)
        if "answer" not in made:
            raise RuntimeError(f"{case.reader}, {case.name} cannot be made: {made}")
        before = _files(place)
        *_, own = forked(str, ALLOWED)
        found, seconds, peak = forked(lambda: _read(case, work, Path(made["answer"])), ALLOWED)
        peak -= own
        after = _files(place)
        faults = _faults(found, seconds, peak)
        changed = {path for path, content in before.items() if after.get(path) != content}
        appeared = {path for path in after.keys() - before.keys() if path.startswith("outside")}
        written = {
            path for path in changed if path.startswith("outside") or path not in after
        } | appeared
        if "outside/executed" in after:
            faults.append("ran")
        if written - {"outside/executed"}:
            faults.append(f"wrote {sorted(written)[:3]}")
        if _tells(work, after.keys() - before.keys()):
            faults.append("told a secret")
        answer = "taken" if "answer" in found else "refused" if "refused" in found else "failed"
        message = found.get("refused") or found.get("failed") or ""
        return Outcome(case, answer, tuple(dict.fromkeys(faults)), seconds, peak, message)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _made(case: Case, work: Path) -> Path:
    os.chdir(work)
    return case.make(work)


def _read(case: Case, work: Path, path: Path) -> str:
    os.chdir(work)
    watched: list[str] = []
    sys.addaudithook(lambda event, _: watched.append(event) if event in WATCHED else None)
    try:
        READERS[case.reader][0](path)
    finally:
        if ran := [event for event in watched if event != "code.__new__"]:
            raise RuntimeError(f"ran {ran[:3]}")
    return ""


def _faults(found: dict[str, Any], seconds: float, peak: int) -> list[str]:
    faults = []
    if "failed" in found:
        faults.append("ran" if "ran [" in found["failed"] else "traceback")
    if "refused" in found and len(found["refused"]) > 4000:
        faults.append("long")
    return faults + ["time"] * (seconds > SECONDS) + ["memory"] * (peak > BYTES)


def _files(place: Path) -> dict[str, Any]:
    """What is where, without following links; large files by their size and time."""
    found: dict[str, Any] = {}
    for folder, _, names in os.walk(place):
        for name in names:
            path = Path(folder) / name
            about = path.lstat()
            key = str(path.relative_to(place))
            found[key] = (about.st_size, about.st_mtime_ns, about.st_ino)
    return found


def _tells(work: Path, appeared: set[str]) -> bool:
    """Whether the secret is in a file that a reader wrote."""
    paths = [work.parent / path for path in appeared]
    return any(
        SECRET.encode() in path.read_bytes()
        for path in paths
        if path.is_file() and not path.is_symlink()
    )


def forked(do: Callable[[], str], seconds: float) -> tuple[dict[str, Any], float, int]:
    """What comes of it in a process of its own, its seconds of work and its peak of memory."""
    ear, mouth = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(ear)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        warnings.simplefilter("ignore")
        try:
            found = {"answer": do()}
        except (ValueError, OSError) as error:
            found = {"refused": str(error)[:10_000]}
        except BaseException as error:
            found = {
                "failed": f"{type(error).__name__}: {error!s:.300} {traceback.format_exc()[-1500:]}"
            }
        with os.fdopen(mouth, "w") as file:
            file.write(json.dumps(found))
        os._exit(0)
    os.close(mouth)
    ends = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    ends.start()
    with os.fdopen(ear) as file:
        said = file.read()
    _, status, usage = os.wait4(child, 0)
    ends.cancel()
    found = (
        json.loads(said)
        if said
        else {"failed": f"the process ended by signal {os.waitstatus_to_exitcode(status)}"}
    )
    worked = usage.ru_utime + usage.ru_stime  # of the processor: others may be at work here
    passed = time.monotonic() - started
    return found, passed if passed > seconds else worked, usage.ru_maxrss << 10


def main(only: list[str]) -> None:
    torch.set_num_threads(1)
    training([1.0, 0.5])  # what is loaded once
    for make in bombs().values():
        make()
    outcomes: list[Outcome] = []
    for case in cases():
        if only and case.reader not in only:
            continue
        if not outcomes or outcomes[-1].case.reader != case.reader:
            print(case.reader, flush=True)
        outcomes.append(attempt(case))
        last = outcomes[-1]
        if last.faults:
            print(
                f"FAULT {case.reader}: {case.name}: {last.faults} {last.seconds:.1f} s {last.peak >> 20} MiB"
            )
            print(f"      {on_a_screen(last.message)}", flush=True)
    rows = []
    for reader in dict.fromkeys(each.case.reader for each in outcomes):
        own = [each for each in outcomes if each.case.reader == reader]
        kinds = Counter(fault.split()[0] for each in own for fault in each.faults)
        answers = Counter(each.answer for each in own)
        slowest, largest = max(each.seconds for each in own), max(each.peak for each in own)
        faults = [str(kinds[kind]) for kind in ("ran", "wrote", "told", "traceback", "long")]
        limits = [
            f"{slowest:.1f} ({kinds['time']})",
            f"{largest / 2**30:.2f} GiB ({kinds['memory']})",
        ]
        rows.append(
            [
                reader,
                str(len(own)),
                str(answers["refused"]),
                str(answers["taken"]),
                *faults,
                *limits,
            ]
        )
    columns = list(zip(*(row[1:9] for row in rows), strict=True))
    rows.append(["all", *(str(sum(map(int, column))) for column in columns), "", ""])
    header = [
        "files", "tried", "refused", "taken as data", "code run", "written or deleted outside", "secrets told",
        "tracebacks", "messages over a screen", "slowest, CPU seconds (over 20)",
        "most memory beside the program's own (over 1 GiB)",
    ]  # fmt: skip
    text = table(header, rows)
    print(text) if only else keep(__file__, "table.md", text)


if __name__ == "__main__":
    main(sys.argv[1:])
