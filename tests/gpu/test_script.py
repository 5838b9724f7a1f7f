"""The one call that a GPU gets, dry: it ends well and leaves what it should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "arguments", [["--only", "nothing"], ["--only"], ["--training"], ["--fast"]]
)
def test_a_wrong_argument_is_refused_before_any_work(arguments, tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "experiments" / "gpu" / "all.sh"), "--dry", *arguments],
        env={**os.environ, "OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work")},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert arguments[0] in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_dry_run_of_all_parts(tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # whose python the script takes
    done = subprocess.run(
        ["bash", str(ROOT / "experiments" / "gpu" / "all.sh"), "--dry"],
        env={**os.environ, "PATH": path, "OUT": str(out), "WORK": str(work)},
        capture_output=True,
        text=True,
    )
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log}"
    assert "left out" not in log
    results = json.loads((out / "speed.json").read_text())
    assert len(results["speed"]) == len(results["faster"]) == 3
    assert {row["way"] for row in results["products"]} == {
        "float64",
        "float32",
        "float32, compensated",
    }

    # Few files, and a checkpoint that goes on.
    files = {file.name for file in out.iterdir()}
    assert files == {
        "log.txt",
        "speed.json",
        "speed.md",
        "weights.safetensors",
        "samples.png",
        "last.ckpt.aa",
    }
    kept = torch.load(out / "last.ckpt.aa", weights_only=True)
    assert len(kept["progress"]["losses"]) == 4
