"""Kills of every task, at random moments and at every file; the same command must end as if nothing had happened.

python -m experiments.kill_test.run                   # 1 hour of a core; saves as it goes
python -m experiments.kill_test.run compare geneval   # these tasks only
python -m experiments.kill_test.run --every 5         # every fifth moment at a file only

A file comes to its name by a rename. Before and after the n-th rename of a run, for every n, the process gets SIGKILL,
SIGTERM or SIGINT in turn, in a folder of its own; the same signals come at random moments, three to a folder. After
each of them all files that are there are read: none may be broken; after SIGTERM and SIGINT the exit code is 143 and
130, at most 5 seconds later. Then the same command is let alone, and what it leaves is compared with what an untouched
run leaves, byte for byte but for seconds.
"""

from __future__ import annotations

import argparse
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
from experiments.common import OUTPUTS, keep, table
from oss_exp.data.scenes import wishes
from oss_exp.files import UNFINISHED

FOLDER = (OUTPUTS / "kill_test").resolve()
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
A_FOLDER = 3  # kills at random moments before a run is let alone

MIXTURE = [
    "model=mixture_digits",
    "num_teacher_steps=20",
    "data.search_samples=6",
    "data.per_sample=4",
]
MIXTURE += ["num_steps=[2,4]", "logger=none", "data.eval_samples=12", "data.batch_size=4"]
NETWORK = [
    "model=dit_fashion",
    "model.event_shape=[1,8,8]",
    "model.backbone.size=8",
    "model.backbone.num_layers=1",
]
NETWORK += [
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
    "compare": ["model=mixture_fashion", *MIXTURE[1:], *MEASURED, "stepsize=[ddim,oss_ave]", "num_steps=[2]"],
    "evaluate": ["task=evaluate", *MIXTURE, "task.schedule={search}/schedules/oss_shared_4.json"],
    "pretrain": ["task=pretrain", *NETWORK, "images=digits", "trainer.precision=32-true", "task.batch_size=8",
                 "task.max_steps=10", "task.save_every=4", "task.warmup_steps=2"],
    "finetune": ["task=finetune", *NETWORK, "model.checkpoint={pretrain}/dit_fashion.safetensors", "stepsize=ddim",
                 "num_teacher_steps=10", "num_steps=[4]", "data.search_samples=2", "data.batch_size=4",
                 "task.num_stages=2", "task.objective=progressive", "task.precision=32-true", "task.trajectories=6",
                 "task.max_steps=6", "task.save_every=4", "task.batch_size=4", "task.warmup_steps=1"],
    "geneval": ["task=geneval", "model=flux_scenes", "data.prompts={folder}/prompts.jsonl", "stepsize=ddim",
                "task.images_per_prompt=2", "data.search_samples=2", "data.batch_size=3", "num_teacher_steps=3",
                "num_steps=[2]", "logger=none"],
    "calibrate": ["task=calibrate", *MIXTURE, "stepsize=[ddim,oss_shared]", "task.samples=8"],
    "reproduce": ["task=reproduce", "table=1", "task.output={run}/paper", "task.cells={run}/cells", "task.jobs=2",
                  "task.overrides={{num_teacher_steps: 12, stepsize.ld3.iterations: 2, data.search_samples: 4}}"],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument(
        "--every", type=int, default=1, help="of how many moments at files one is tried"
    )
    parser.add_argument("--random", type=int, default=6, help="kills of a task at random moments")
    given = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", WANDB_MODE="offline")
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    prompts = [json.dumps(known[0]) + "\n" for known in wishes().values()]
    for name in given.tasks:
        (FOLDER / f"{name}.json").unlink(missing_ok=True)
    (FOLDER / "prompts.jsonl").write_text("".join(prompts[:2]))
    lines = [
        kill(name, given.every, given.random)
        for name in TASKS
        if name in given.tasks or needed(name, given.tasks)
    ]
    assert all(line[-1] == "0" for line in lines), "some runs do not end as the untouched one"


def needed(name: str, tasks: Sequence[str]) -> bool:
    """Whether what a task leaves is given to one of these."""
    return any(f"{{{name}}}" in " ".join(TASKS[task]) for task in tasks)


def kill(name: str, every: int, moments: int) -> list[str]:
    """Kill a task in all these ways; returns the line of the table, which is kept too."""
    folder, draw, tally, started = FOLDER / name, random.Random(name), Counter(), time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    seconds = time.monotonic()
    code, renames, _ = run(name, folder / "whole")
    seconds = time.monotonic() - seconds
    assert code == 0, (folder / "whole.log").read_text()[-2000:]
    expected = outcome(folder / "whole")

    def strike(where: Path, at: Any) -> None:
        sent = SIGNALS[tally["struck"] % len(SIGNALS)]
        tally["struck"] += 1
        code, _, took = run(name, where, sent, at)
        tally[sent.name] += code == CODES[sent]
        if code not in (0, CODES[sent]) or (sent != signal.SIGKILL and took > 5):
            tally["wrong"] += 1
            print(f"{where}: {sent.name} at {at}: exit code {code}, {took:.1f} s", flush=True)
        tally["read"] += require_whole(where)
        tally["unfinished"] += len(list(where.rglob(f".*{UNFINISHED}")))

    def let_alone(where: Path) -> None:
        code, _, _ = run(name, where)
        found = outcome(where)
        tally["runs"] += 1
        if code != 0 or found != expected:
            tally["wrong"] += 1
            names = [key for key in {**found, **expected} if found.get(key) != expected.get(key)]
            print(f"{where}: exit code {code}, other files: {names[:5]}", flush=True)
        else:
            shutil.rmtree(where)

    # Every file, before and after it comes to its name.
    for number in range(0, 2 * renames, every):
        where = folder / f"file_{number}"
        strike(where, (number // 2 + 1, ("before", "after")[number % 2]))
        let_alone(where)

    # Random moments.
    for number in range(moments):
        where = folder / f"random_{number // A_FOLDER}"
        strike(where, draw.uniform(0.05, 0.9) * seconds)
        if number % A_FOLDER == A_FOLDER - 1 or number == moments - 1:
            let_alone(where)

    signals = [str(tally[each.name]) for each in SIGNALS]
    counts = [str(tally[key]) for key in ("runs", "read", "unfinished", "wrong")]
    line = [name, str(renames), *signals, *counts]
    print(f"{line} in {time.monotonic() - started:.0f} s", flush=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(line))
    lines = [
        json.loads(path.read_text())
        for each in TASKS
        if (path := FOLDER / f"{each}.json").is_file()
    ]
    header = [
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
    keep(__file__, "table.md", table(header, lines))
    return line


def run(
    name: str, folder: Path, sent: signal.Signals | None = None, at: Any = None
) -> tuple[int, int, float]:
    """Run a task in a forked process, which saves the start of Python.

    at: when the signal comes, in seconds, or as (n, "before" or "after") the n-th rename, or as (name, ...) that to a
    file of this name. Returns the exit code (or minus the signal), the number of renames, and the seconds from the
    signal to the end.
    """
    places = {"folder": FOLDER, "run": folder, **{task: FOLDER / task / "whole" for task in TASKS}}
    arguments = [each.format(**places) if "{" in each else each for each in TASKS[name]]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        sys.stdout = sys.stderr = folder.parent.joinpath(f"{folder.name}.log").open("a")
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        _patch(writing, sent, None if isinstance(at, float) else at)
        sys.argv = ["oss-exp", *arguments, f"hydra.run.dir={folder}"]
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
    os.close(writing)
    struck = 0.0
    if isinstance(at, float):
        time.sleep(at)
        struck = time.monotonic()
        os.kill(child, sent)
    with os.fdopen(reading, "rb") as pipe:
        said = bytearray()
        while data := os.read(pipe.fileno(), 4096):
            said += data
            if b"!" in data:
                struck = time.monotonic()
    _, status = os.waitpid(child, 0)
    return (
        os.waitstatus_to_exitcode(status),
        said.count(b"."),
        time.monotonic() - (struck or time.monotonic()),
    )


def _patch(pipe: int, sent: signal.Signals | None, at: tuple[int | str, str] | None) -> None:
    """Count the renames of this process, and strike at one of them."""
    replace: Callable = os.replace
    count = 0

    def struck(target: Any, moment: str) -> None:
        if at in ((count, moment), (Path(target).name, moment)):
            os.write(pipe, b"!")
            os.kill(os.getpid(), sent)

    def counted(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        struck(target, "before")
        replace(source, target)
        os.write(pipe, b".")
        struck(target, "after")

    os.replace = counted


def require_whole(folder: Path) -> int:
    """Read every file with a name of its own; returns how many."""
    readers = {
        ".json": lambda path: json.loads(path.read_text()),
        ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
        ".safetensors": safetensors.torch.load_file,
        ".png": lambda path: Image.open(path).load(),
        ".npz": lambda path: dict(np.load(path)),
        ".ckpt": lambda path: torch.load(path, weights_only=True),
        ".pt": lambda path: torch.load(path, weights_only=True),
    }
    paths = [
        path
        for path in folder.rglob("*")
        if path.suffix in readers and not path.name.startswith(".")
    ]
    for path in paths:
        readers[path.suffix](path)
    return len(paths)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run is for; without how long things took."""
    kinds = (".json", ".jsonl", ".safetensors", ".npz", ".png", ".md", ".csv", ".tex")
    paths = [
        path for path in folder.rglob("*") if path.suffix in kinds and not path.name.startswith(".")
    ]
    found = {}
    for path in paths:
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text()), str(folder))
        elif path.suffix != ".md" or "paper" in path.parts:  # table.md tells of seconds
            found[name] = path.read_bytes()
    return found


def timeless(value: Any, folder: str) -> Any:
    """JSON without seconds, memory, and the hash of a file with such; a run's own folder is the same for all."""
    if isinstance(value, dict):
        kept = {key: each for key, each in value.items() if key not in ("seconds", "peak_bytes")}
        return {key: timeless(each, folder) for key, each in kept.items()}
    if isinstance(value, list):
        return [timeless(each, folder) for each in value]
    return value.replace(folder, "FOLDER") if isinstance(value, str) else value


if __name__ == "__main__":
    main()
