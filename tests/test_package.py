"""An installed wheel works from any folder: the configuration and the assets are inside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel(tmp_path):
    def run(*command: str, **more) -> str:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT))
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    where = run("-c", "import oss_exp; print(oss_exp.__file__)", cwd=elsewhere, env=environment)
    assert where.startswith(str(site))

    # A table of the paper, whose numbers are inside as well, with the run that it is made of.
    short = "task.overrides={model: mixture_digits, num_teacher_steps: 12, data.search_samples: 4}"
    printed = run(
        "-m", "oss_exp", "task=reproduce", "table=1", short, cwd=elsewhere, env=environment
    )
    assert "# Table 1: What five ways to choose steps can do" in printed
    assert (elsewhere / "outputs/paper/table_1/small.md").is_file()
