"""Kills of every task, at random moments and at every file; the same command must finish the run.

python -m experiments.kill_test.run                   # 1 hour of a core; saves as it goes
python -m experiments.kill_test.run compare geneval   # these tasks only
python -m experiments.kill_test.run --every 5         # every fifth moment at a file only

Every file gets its name by a rename. Before and after the n-th rename of a run, for every n, the
process gets SIGKILL, SIGTERM or SIGINT in turn, in a folder of its own; the same signals come at
random moments, three to a folder. After each of them all files are read: none may be broken. After
SIGTERM and SIGINT the exit code is 143 and 130, at most 5 seconds later. Then the same command runs
undisturbed, and its files are compared with those of a run that was never interrupted, byte for
byte except for seconds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

import oss_exp.cli
import oss_exp.job  # loaded before processes fork
from experiments.common import OUTPUTS, command_line, keep, table
from oss_exp.data.scenes import wishes
from oss_exp.files import UNFINISHED

FOLDER = (OUTPUTS / "kill_test").resolve()
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
PER_FOLDER = 3  # kills at random moments before a run may finish

MIXTURE = [
    "model=mixture_digits",
    "num_teacher_steps=20",
    "data.search_samples=6",
    "data.per_sample=4",
    "num_steps=[2,4]",
    "logger=none",
    "data.eval_samples=12",
    "data.batch_size=4",
]
NETWORK = [
    "model=dit_fashion",
    "model.event_shape=[1,8,8]",
    "model.backbone.size=8",
    "model.backbone.num_layers=1",
    "model.backbone.num_attention_heads=2",
    "model.backbone.attention_head_dim=8",
    "logger=none",
]
MEASURED = [
    "metric=[fid,kid,class_agreement]",
    "metric.kid.subset_size=4",
    "data.eval_samples=12",
    "data.classes=all",
]
TASKS = {
    "search": ["task=search", *MIXTURE, "stepsize=[edm,oss,oss_shared,oss_fit]"],
    "compare": [
        "model=mixture_fashion", *MIXTURE[1:], *MEASURED, "stepsize=[ddim,oss_ave]",
        "num_steps=[2]",
    ],
    "evaluate": ["task=evaluate", *MIXTURE, "task.schedule={search}/schedules/oss_shared_4.json"],
    "pretrain": [
        "task=pretrain", *NETWORK, "images=digits", "trainer.precision=32-true",
        "task.batch_size=8", "task.max_steps=10", "task.save_every=4", "task.warmup_steps=2",
    ],
    "finetune": [
        "task=finetune", *NETWORK, "model.checkpoint={pretrain}/dit_fashion.safetensors",
        "stepsize=ddim", "num_teacher_steps=10", "num_steps=[4]", "data.search_samples=2",
        "data.batch_size=4", "task.num_stages=2", "task.objective=progressive",
        "task.precision=32-true", "task.trajectories=6", "task.max_steps=6", "task.save_every=4",
        "task.batch_size=4", "task.warmup_steps=1",
    ],
    "geneval": [
        "task=geneval", "model=flux_scenes", "data.prompts={folder}/prompts.jsonl",
        "stepsize=ddim", "task.images_per_prompt=2", "data.search_samples=2",
        "data.batch_size=3", "num_teacher_steps=3", "num_steps=[2]", "logger=none",
    ],
    "calibrate": ["task=calibrate", *MIXTURE, "stepsize=[ddim,oss_shared]", "task.samples=8"],
    "reproduce": [
        "task=reproduce", "table=1", "task.output={run}/paper", "task.cells={run}/cells",
        "task.jobs=2",
        "task.overrides={{num_teacher_steps: 12, stepsize.ld3.iterations: 2, "
        "data.search_samples: 4}}",
    ],
}  # fmt: skip
HEADER = [
    "task",
    "files",
    "SIGKILL",
    "SIGTERM",
    "SIGINT",
    "ended runs",
    "files read",
    "unfinished ones",
    "wrong",
]

Moment = float | tuple[int | str, str]  # of a signal, see `run`


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--every", type=int, default=1, help="try every n-th moment at a file")
    parser.add_argument("--random", type=int, default=6, help="kills of a task at random moments")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", WANDB_MODE="offline")
    torch.set_num_threads(1)

    # Files of the tasks.
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in options.tasks:
        (FOLDER / f"{name}.json").unlink(missing_ok=True)
    prompts = [json.dumps(listed[0]) + "\n" for listed in wishes().values()]
    (FOLDER / "prompts.jsonl").write_text("".join(prompts[:2]))

    # Kill the tasks, and those whose results they need.
    lines = []
    for name in TASKS:
        if name in options.tasks or is_needed(name, options.tasks):
            lines.append(kill(name, options.every, options.random))
    assert all(line[-1] == "0" for line in lines), "some runs do not end as the untouched one"


def is_needed(name: str, tasks: Sequence[str]) -> bool:
    """Tell whether one of these tasks reads the results of another."""
    return any(f"{{{name}}}" in " ".join(TASKS[task]) for task in tasks)


class Kills:
    """The kills of one task, compared with a run that is not interrupted.

    Attributes:
        tally: Counts of signals with the right exit code (by name), "struck", finished "runs",
            files "read", "unfinished" ones, and "wrong" ends.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = FOLDER / name
        self.tally: Counter[str] = Counter()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

        # The untouched run.
        start = time.monotonic()
        code, self.renames, _ = run(name, self.folder / "whole")
        self.seconds = time.monotonic() - start
        assert code == 0, (self.folder / "whole.log").read_text()[-2000:]
        self.expected = outcome(self.folder / "whole")

    def strike(self, folder: Path, at: Moment) -> None:
        """Run the task until a signal comes, and check how it ends."""
        sent = SIGNALS[self.tally["struck"] % len(SIGNALS)]
        self.tally["struck"] += 1
        code, _, seconds = run(self.name, folder, sent, at)
        self.tally[sent.name] += code == CODES[sent]
        if code not in (0, CODES[sent]) or (sent != signal.SIGKILL and seconds > 5):
            self.tally["wrong"] += 1
            end = f"exit code {code}, {seconds:.1f} s"
            print(f"{folder}: {sent.name} at {at}: {end}", flush=True)
        self.tally["read"] += require_whole(folder)
        self.tally["unfinished"] += len(list(folder.rglob(f".*{UNFINISHED}")))

    def finish(self, folder: Path) -> None:
        """Run the task to its end, and compare its files; equal ones are deleted."""
        code, _, _ = run(self.name, folder)
        files = outcome(folder)
        self.tally["runs"] += 1
        if code == 0 and files == self.expected:
            shutil.rmtree(folder)
            return
        self.tally["wrong"] += 1
        names = files | self.expected
        different = [name for name in names if files.get(name) != self.expected.get(name)]
        print(f"{folder}: exit code {code}, other files: {different[:5]}", flush=True)


def kill(name: str, every: int, moments: int) -> list[str]:
    """Kill a task at every n-th moment at a file, and at random moments.

    Returns:
        The row of the table, which is also written.
    """
    start = time.monotonic()
    kills = Kills(name)

    # Every file, before and after it gets its name.
    for number in range(0, 2 * kills.renames, every):
        folder = kills.folder / f"file_{number}"
        kills.strike(folder, (number // 2 + 1, ("before", "after")[number % 2]))
        kills.finish(folder)

    # Random moments.
    draw = random.Random(name)
    for number in range(moments):
        folder = kills.folder / f"random_{number // PER_FOLDER}"
        kills.strike(folder, draw.uniform(0.05, 0.9) * kills.seconds)
        if number % PER_FOLDER == PER_FOLDER - 1 or number == moments - 1:
            kills.finish(folder)

    # The row, and the table of all rows so far.
    keys = [*(sent.name for sent in SIGNALS), "runs", "read", "unfinished", "wrong"]
    row = [name, str(kills.renames), *(str(kills.tally[key]) for key in keys)]
    print(f"{row} in {time.monotonic() - start:.0f} s", flush=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(row))
    files = [FOLDER / f"{task}.json" for task in TASKS]
    rows = [json.loads(file.read_text()) for file in files if file.is_file()]
    keep(__file__, "table.md", table(HEADER, rows))
    return row


def run(
    name: str, folder: Path, sent: signal.Signals | None = None, at: Moment | None = None
) -> tuple[int, int, float]:
    """Run a task in a forked process, which saves the start of Python.

    Args:
        name: The task.
        folder: Folder of the run.
        sent: Signal to send; None for an undisturbed run.
        at: When the signal comes: in seconds, or as (n, "before") or (n, "after") the n-th rename,
            or as (name, "before") or (name, "after") the rename to a file of this name.

    Returns:
        The exit code (or minus the signal), the number of renames, and the seconds from the signal
        to the end.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run_child(name, folder, writing, sent, None if isinstance(at, float) else at)
    os.close(writing)

    # Send the signal at a time.
    struck = 0.0
    if isinstance(at, float):
        time.sleep(at)
        struck = time.monotonic()
        os.kill(child, sent)

    # Read what the child reports: "." for a rename, "!" before a signal.
    events = bytearray()
    with os.fdopen(reading, "rb") as pipe:
        while data := os.read(pipe.fileno(), 4096):
            events += data
            if b"!" in data:
                struck = time.monotonic()
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - struck if struck else 0.0
    return os.waitstatus_to_exitcode(status), events.count(b"."), seconds


def _run_child(
    name: str,
    folder: Path,
    pipe: int,
    sent: signal.Signals | None,
    at: tuple[int | str, str] | None,
) -> None:
    """Run a task in this process, and end it."""
    # Arguments.
    places = {"folder": FOLDER, "run": folder}
    places.update({task: FOLDER / task / "whole" for task in TASKS})
    arguments = [text.format(**places) if "{" in text else text for text in TASKS[name]]
    sys.argv = ["oss-exp", *arguments, f"hydra.run.dir={folder}"]

    # Output into a log.
    sys.stdout = sys.stderr = folder.parent.joinpath(f"{folder.name}.log").open("a")
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)

    # Run.
    _patch_rename(pipe, sent, at)
    code = 1
    try:
        oss_exp.cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _patch_rename(pipe: int, sent: signal.Signals | None, at: tuple[int | str, str] | None) -> None:
    """Report the renames of this process, and send it a signal at one of them."""
    replace: Callable = os.replace
    count = 0

    def maybe_strike(target: Any, moment: str) -> None:
        if at in ((count, moment), (Path(target).name, moment)):
            os.write(pipe, b"!")
            os.kill(os.getpid(), sent)

    def counted(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        maybe_strike(target, "before")
        replace(source, target)
        os.write(pipe, b".")
        maybe_strike(target, "after")

    os.replace = counted


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def files_of(folder: Path, kinds: Sequence[str]) -> list[Path]:
    """Return the finished files of these kinds; unfinished ones begin with a dot."""
    paths = []
    for path in folder.rglob("*"):
        if path.suffix in kinds and not path.name.startswith("."):
            paths.append(path)
    return paths


def require_whole(folder: Path) -> int:
    """Read every finished file, and return their number."""
    readers = {
        ".json": lambda path: json.loads(path.read_text()),
        ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
        ".safetensors": safetensors.torch.load_file,
        ".png": lambda path: Image.open(path).load(),
        ".npz": lambda path: dict(np.load(path)),
        ".ckpt": lambda path: torch.load(path, weights_only=True),
        ".pt": lambda path: torch.load(path, weights_only=True),
    }
    paths = files_of(folder, list(readers))
    for path in paths:
        readers[path.suffix](path)
    return len(paths)


def outcome(folder: Path) -> dict[str, Any]:
    """Return the contents of all results of a run, without how long things took."""
    contents = {}
    kinds = (".json", ".jsonl", ".safetensors", ".npz", ".png", ".md", ".csv", ".tex")
    for path in files_of(folder, kinds):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            contents[name] = timeless(json.loads(path.read_text()), str(folder))
        elif path.suffix != ".md" or "paper" in path.parts:  # table.md contains seconds
            contents[name] = path.read_bytes()
    return contents


def timeless(value: Any, folder: str) -> Any:
    """Return JSON without seconds and memory, and with the same name for the run's own folder."""
    if isinstance(value, dict):
        names = value.keys() - {"seconds", "peak_bytes"}
        return {name: timeless(value[name], folder) for name in names}
    if isinstance(value, list):
        return [timeless(item, folder) for item in value]
    return value.replace(folder, "FOLDER") if isinstance(value, str) else value


if __name__ == "__main__":
    main()
