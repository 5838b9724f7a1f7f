"""A wheel works from an empty folder of an empty environment: it has configuration and assets."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, folder: Path) -> str:
    """Run a command in a folder, without this checkout on its path, and return its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    process = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    run(*build, str(folder), str(ROOT), folder=folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel alone, which borrows its dependencies from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    run(*pip, str(wheel), folder=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return folder


@pytest.mark.slow
def test_the_wheel_is_what_the_environment_imports(wheel, environment, tmp_path):
    python = str(environment / "bin" / "python")
    command = str(environment / "bin" / "oss-exp")

    place = run(python, "-c", "import oss_exp; print(oss_exp.__file__)", folder=tmp_path)
    version = run(command, "--version", folder=tmp_path).split()[-1]

    assert place.startswith(str(environment))
    assert wheel.name.startswith(f"oss_exp-{version}-")


@pytest.mark.slow
def test_the_demo_runs_from_an_empty_folder(environment, tmp_path):
    command = str(environment / "bin" / "oss-exp")
    short = "data.search_samples=4 data.eval_samples=8 data.per_sample=4 num_teacher_steps=20"
    run(command, *short.split(), "num_steps=[3]", "hydra.run.dir=demo", folder=tmp_path)
    assert {"table.md", "report.html", "samples.png"} <= {*os.listdir(tmp_path / "demo")}


@pytest.mark.slow
def test_a_table_of_the_paper_is_reproduced_from_an_empty_folder(environment, tmp_path):
    command = str(environment / "bin" / "oss-exp")
    short = "task.overrides={model: mixture_digits, num_teacher_steps: 12, data.search_samples: 4}"
    output = run(command, "task=reproduce", "table=1", short, folder=tmp_path)
    assert "# Table 1: What five ways to choose steps can do" in output
    assert (tmp_path / "outputs/paper/table_1/small.md").is_file()


@pytest.mark.slow
def test_the_included_pipeline_loads_from_an_empty_folder(environment, tmp_path):
    python = str(environment / "bin" / "python")
    program = (
        "import diffusers, oss_exp\n"
        "folder = oss_exp.ASSETS / 'scenes_pipeline'\n"
        "print(type(diffusers.DiffusionPipeline.from_pretrained(folder)).__name__)"
    )
    assert run(python, "-c", program, folder=tmp_path).split() == ["FluxPipeline"]
