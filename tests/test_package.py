"""A wheel installs into an empty environment and works from an empty folder: configuration and assets are inside."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    run(*build, str(tmp_path / "dist"), str(ROOT), folder=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    where = run("-c", "import oss_exp; print(oss_exp.__file__)", cwd=elsewhere, env=environment)
    assert where.startswith(str(site))

    # An environment with nothing but the wheel; what it depends on is lent by this one.
    environment, folder = tmp_path / "environment", tmp_path / "empty"
    folder.mkdir()
    venv.create(environment, symlinks=True)
    python = str(environment / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    run(*pip, str(wheel), folder=folder)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    place = run(python, "-c", "import oss_exp; print(oss_exp.__file__)", folder=folder)
    assert place.startswith(str(site))

    # The demo, and a table of the paper, whose numbers are inside as well.
    command = str(environment / "bin" / "oss-exp")
    version = run(command, "--version", folder=folder).split()[-1]
    assert wheel.name.startswith(f"oss_exp-{version}-")
    short = "data.search_samples=4 data.eval_samples=8 data.per_sample=4 num_teacher_steps=20"
    run(command, *short.split(), "num_steps=[3]", "hydra.run.dir=demo", folder=folder)
    assert {"table.md", "report.html", "samples.png"} <= {*os.listdir(folder / "demo")}
    short = "task.overrides={model: mixture_digits, num_teacher_steps: 12, data.search_samples: 4}"
    printed = run(
        "-m", "oss_exp", "task=reproduce", "table=1", short, cwd=elsewhere, env=environment
    )

    assert "# Table 1: What five ways to choose steps can do" in printed
    assert (folder / "outputs/paper/table_1/small.md").is_file()
