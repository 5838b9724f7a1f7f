"""SIGKILL at random moments of a comparison and of a finetuning; the same command must end as if nothing had happened.

python -m experiments.kill_test.run          # 50 kills
python -m experiments.kill_test.run 4        # fewer

After every kill each file that is there is read: none may be broken. After five kills a run is let alone, and its
schedules, measurements, pictures and weights are compared with those of a run that was never touched, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from PIL import Image

from experiments.common import OUTPUTS, keep, table
from oss_exp.schedule import StepSchedule

FOLDER = OUTPUTS / "kill_test"
KILLS_A_RUN = 5
MODEL = ["model=dit_fashion", "num_teacher_steps=20", "logger=none", "data.search_samples=8", "data.per_sample=4"]
RUNS = {
    "compare": [
        *MODEL, "num_steps=[3,5]", "stepsize=[ddim,oss,oss_shared,oss_fit]", "data.eval_samples=64",
        "data.batch_size=8", "metric=[fid,class_agreement]",
    ],
    "finetune": [
        "task=finetune", *MODEL, "num_steps=[4]", "task.num_stages=2", "task.objective=progressive",
        "task.max_steps=12", "task.save_every=3", "task.trajectories=32", "task.batch_size=8", "data.batch_size=8",
    ],
}  # fmt: skip


def main() -> None:
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    shutil.rmtree(FOLDER, ignore_errors=True)
    draw, lines = random.Random(0), []
    for number, (name, overrides) in enumerate(RUNS.items()):
        started = time.monotonic()
        start(overrides, FOLDER / name / "whole").wait()
        seconds, expected = time.monotonic() - started, outcome(FOLDER / name / "whole")
        to_come = wanted // len(RUNS) + (number < wanted % len(RUNS))
        kills, equal, runs, read, left = 0, 0, 0, 0, 0
        while kills < to_come:
            folder = FOLDER / name / f"killed_{runs}"
            for _ in range(min(KILLS_A_RUN, to_come - kills)):
                process = start(overrides, folder)
                time.sleep(draw.uniform(0.3, 1.0) * seconds)
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                read += require_whole(folder)
                left += len(list(folder.rglob(".*.tmp")))
            assert start(overrides, folder).wait() == 0, f"{folder} does not end"
            found = outcome(folder)
            runs, equal = runs + 1, equal + (found == expected)
            print(f"{name}: {kills} kills, {equal} of {runs} runs equal", flush=True)
        lines.append([name, f"{seconds:.0f} s", *map(str, (kills, runs, equal, read, left))])
    header = [
        "run",
        "takes",
        "kills",
        "runs",
        "equal to the one let alone",
        "files read after kills",
        "unfinished ones",
    ]
    keep(__file__, "table.md", table(header, lines))
    assert all(line[3] == line[4] for line in lines)


def start(overrides: list[str], folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "oss_exp", *overrides, f"hydra.run.dir={folder}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)


def require_whole(folder: Path) -> int:
    """Read every file with a name of its own; returns how many."""
    readers = {
        ".json": lambda path: json.loads(path.read_text()),
        ".safetensors": safetensors.torch.load_file,
        ".png": lambda path: Image.open(path).load(),
        ".npz": lambda path: dict(np.load(path)),
    }
    paths = [path for path in folder.rglob("*") if path.suffix in readers and not path.name.startswith(".")]
    for path in paths:
        readers[path.suffix](path)
    return len(paths)


def outcome(folder: Path) -> dict[str, Any]:
    """All results but how long they took."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.glob("*.npz")}
    for path in folder.glob("schedules/*.json"):
        if not path.name.endswith(".mean.json"):
            plan = StepSchedule.load(path)
            found[path.name] = [plan.times.tolist(), str(plan.orders), str(plan.weights)]
    for path in folder.glob("metrics.json"):
        record = json.loads(path.read_text())
        rows = [{**row, "planning": {**row["planning"], "seconds": None}} for row in record["rows"]]
        found[path.name] = [record["teacher_metrics"], rows]
    for path in folder.glob("stages/stage_*.safetensors"):
        found[path.name] = path.read_bytes()
    return found


if __name__ == "__main__":
    main()
