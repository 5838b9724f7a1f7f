"""Every command and example of the README runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_process

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT_TRAINING = (
    "num_teacher_steps=10 task.trajectories=8 task.batch_size=8 task.max_steps=2 task.save_every=2"
)
WITHOUT_NOISES = "--help|task=report|task=statistics|task=convert|task=export|task=import_sigmas"
SHORT = "data.search_samples=4 data.eval_samples=8 data.per_sample=4 logger=none"
SMALL = "model.backbone.block_out_channels=[16,16,16] model.backbone.attention_head_dim=16"  # it draws its samples


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


# The last block exports what the one before it made.
SESSIONS = {
    "models": [0],
    "prompts": [1],
    "pretrain": [2],
    "finetune": [3],
    "published": [4],
    "everything": [5, 6],
}


def test_no_block_is_forgotten():
    assert sorted(number for session in SESSIONS.values() for number in session) == [
        *range(len(blocks("bash")))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("session", SESSIONS)
def test_commands(session, tmp_path, garments):
    """In order, in an empty folder, with few samples and a teacher of few steps, which is all that is changed."""
    environment = {"OSS_EXP_CACHE": str(tmp_path / "cache"), "OSS_EXP_DATA": str(garments)}
    for command in "\n".join(
        blocks("bash")[number].strip() for number in SESSIONS[session]
    ).splitlines():
        short = command
        if not re.search(WITHOUT_NOISES, command):
            short = (
                f"{command} {SMALL} logger=none"
                if "task=pretrain" in command
                else f"{command} {SHORT}"
            )
        if "task=finetune" in command:
            short = f"{short} {SHORT_TRAINING}"
        elif "model=" in command and "task=" not in command:
            short = f"{short} num_teacher_steps=10"
        elif "num_teacher_steps" not in command and not re.search(
            f"task=pretrain|{WITHOUT_NOISES}", command
        ):
            short = f"{short} num_teacher_steps=20"
        listed = short.replace("oss-exp", r"printf '%s\n'", 1)  # as a shell reads them
        arguments = subprocess.run(
            ["bash", "-c", listed], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        run_process(*arguments.stdout.splitlines(), folder=tmp_path, **environment)
    if session == "everything":
        assert len(list(tmp_path.glob("multirun/*/*/*/metrics.json"))) == 6
        table = next(tmp_path.glob("multirun/*/*/table.md")).read_text()
        assert table.count("oss_shared") == 2


def run_example(example: str, check: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{example}\n{check}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_library_example(tmp_path):
    """One import line and at most ten lines."""
    example, *_ = blocks("python")
    lines = [line for line in example.splitlines() if line]
    assert sum(line.startswith(("import", "from")) for line in lines) == 1
    assert len(lines) <= 10
    check = """
import sys
assert steps.num_steps == 5
assert images.shape == (16, 1, 28, 28)
assert not {'hydra', 'lightning', 'wandb'} & set(sys.modules)
"""
    run_example(example, check, tmp_path)
    assert (tmp_path / "five_steps.json").exists()


@pytest.mark.slow
def test_velocity_example(tmp_path):
    """It samples the three points."""
    _, example, _ = blocks("python")
    check = """
assert steps.num_steps == 4
assert float((x0[:, None] - centers).norm(dim=-1).amin(1).max()) < 0.1
"""
    run_example(example, check, tmp_path)
    assert (tmp_path / "four_steps.json").exists()


@pytest.mark.slow
def test_export_example(tmp_path):
    *_, example = blocks("python")
    check = """
import torch
torch.testing.assert_close(scheduler.sigmas.double(), steps.times, rtol=0, atol=1e-6)
assert steps.num_steps == 10
"""
    run_example(example, check, tmp_path)


def test_make_runs_what_the_readme_says():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:.*\n\t\$\(BIN\)/oss-exp$", makefile, re.MULTILINE)
    assert re.search(r"^test:.*\n\t\$\(BIN\)/pytest", makefile, re.MULTILINE)
    assert [line.split("#")[0].strip() for line in blocks("")[0].splitlines()] == [
        "make demo",
        "make test",
    ]


def test_top_level_is_what_the_design_says():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    top = {path.split("/")[0] for path in tracked.splitlines()}
    expected = {
        "pyproject.toml",
        "conf",
        "oss_exp",
        "experiments",
        "notebooks",
        "docs",
        "tests",
        "README.md",
    }
    assert {name for name in top if not name.startswith(".")} == expected | {"LICENSE", "Makefile"}


@pytest.mark.slow
def test_notebooks_run(tmp_path, monkeypatch):
    import json

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(notebook.read_text())["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        exec(compile(code, notebook.name, "exec"), {})
