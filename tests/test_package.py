"""A wheel installs into an empty environment and works from an empty folder: configuration and assets are inside."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, **options) -> str:
    """Run Python with these arguments and return its output."""
    process = subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.slow
def test_an_installed_wheel_reproduces_a_table_from_any_folder(tmp_path):
    # The wheel, installed in a folder of its own.
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT))
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    where = run("-c", "import oss_exp; print(oss_exp.__file__)", cwd=elsewhere, env=environment)
    assert where.startswith(str(site))

    # A table of the paper, with its numbers and the run behind it.
    short = "task.overrides={model: mixture_digits, num_teacher_steps: 12, data.search_samples: 4}"
    command = ["-m", "oss_exp", "task=reproduce", "table=1", short]
    output = run(*command, cwd=elsewhere, env=environment)
    assert "# Table 1: What five ways to choose steps can do" in output
    assert (elsewhere / "outputs/paper/table_1/small.md").is_file()
