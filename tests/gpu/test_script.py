"""The one call that a GPU gets, dry: it ends well and leaves what it should."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_dry_run_of_all_parts(tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    done = subprocess.run(
        ["bash", str(ROOT / "experiments" / "gpu" / "all.sh"), "--dry"],
        env={**os.environ, "OUT": str(out), "WORK": str(work)},
        capture_output=True,
        text=True,
    )
    logs = "\n".join(file.read_text() for file in out.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    assert " passed" in (out / "tests.log").read_text()
    results = json.loads((out / "speed.json").read_text())
    assert len(results["speed"]) == len(results["faster"]) == 3
    assert results["left out"] == []
    assert {row["way"] for row in results["products"]} == {
        "float64",
        "float32",
        "float32, compensated",
    }
    files = {file.name for file in out.iterdir()}
    assert files >= {
        "machine.txt",
        "dit_fashion.safetensors",
        "training.json",
        "last.ckpt",
        "samples.png",
    }
    assert len(files) <= 10
    assert len(json.loads((out / "training.json").read_text())["losses"]) == 4
