"""Every command and example of the README and of docs/ runs.

A page is one session in an empty folder: its commands run in order, then its Python blocks as one program, so that a
page may use what it made before. Commands get few samples and short teachers; checkpoints and GPUs become small random
networks on the CPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_process

from oss_exp.files import ASSETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Commands that are not run, and why. They are still composed (tests/test_docs.py).
NOT_RUN = {
    "oss-exp task=reproduce table=2 task.scale=paper": "minutes; tests/reproduce runs parts of it",
    "oss-exp task=pretrain .*task.max_steps=[0-9]{4,}": "the lengths of the shipped networks",
}

# What is changed in every command, and what is added to those that match, in order.
CHANGED = {
    r"trainer=gpu": "trainer=cpu",
    r"model\.checkpoint=(FILE|random|\S+\.pkl)": "model.size=tiny",
    r"model\.(quantization=\w+|offload=true)": "",
    r"n_trials=\d+": "n_trials=2",
    r"(model=(?!\w*fashion|flux_scenes|unet_cifar10|edm|dit|mixture)\w+|experiment=table_\d)(?!.*scale=tiny)": r"\1 scale=tiny",
}
SAMPLES = "data.search_samples=4 data.eval_samples=8 logger=none"
ADDED = {
    r"oss-exp(?!.*(--help|doctor|task=(?!search|evaluate|compare|calibrate|finetune|certify)))": SAMPLES,
    r"oss-exp(?!.*(--help|doctor|task=))": "data.per_sample=4",
    r"task=search .*(oss |\[oss[],]|experiment=table_2 m)": "data.per_sample=4",
    r"oss-exp(?!.*(--help|doctor|scale=tiny|num_teacher_steps|task=(?!search|evaluate|calibrate|finetune)))": (
        "num_teacher_steps=20"
    ),
    r"^(?!.*task=).*model=": "num_teacher_steps=10",
    r"scale=tiny.*num_steps=\[5,10,20\]": "num_teacher_steps=25",
    r"task=calibrate": "task.samples=8",
    r"task=certify": "data.eval_samples=4 task.axes.guidance=[1] task.axes.dtype=[]",
    r"task=pretrain": "model.backbone.block_out_channels=[16,16,16] "
    "model.backbone.attention_head_dim=16 logger=none",
    r"task=finetune": "num_teacher_steps=10 task.trajectories=8 task.batch_size=8 task.max_steps=2 "
    "task.save_every=2",
    r"task=fit_classifier": "task.epochs=1",
    r"task=fit_detector": "task.steps=2 task.batch_size=2",
    r"task=geneval": "num_teacher_steps=5 'num_steps=[2]' task.images_per_prompt=1",
    r"task=reproduce": "'task.overrides={model: mixture_digits, num_teacher_steps: 12, data.search_samples: 4}'",
}

# What a page's Python needs that its reader has, such as a program of their own, or time.
SHORT_TEACHER = """
import functools, oss_exp
oss_exp.search = functools.partial(oss_exp.search, num_teacher_steps=12)
oss_exp.compare = functools.partial(oss_exp.compare, num_teacher_steps=12)
"""
BEFORE = {
    "README.md": SHORT_TEACHER,
    "docs/pipelines.md": SHORT_TEACHER,
    "docs/comfyui.md": """
import pathlib, sys, torch, oss_exp.export.comfyui_nodes
sys.path.append(str(pathlib.Path(oss_exp.export.comfyui_nodes.__file__).parent))
provenance = {"native": {"clock": "sigma"}}
steps = oss_exp.StepSchedule(torch.tensor([0.9, 0.7, 0.3, 0.0]).double(), provenance=provenance)
oss_exp.ComfyUINodes().write(steps, pathlib.Path("nodes"))
(file,) = pathlib.Path("nodes").glob("schedules/*.json")
pathlib.Path("schedules").mkdir()
file.rename("schedules/sd15_oss_shared_6.json")
cond = uncond = None
noise = torch.randn(2, 4, 8, 8)
model = lambda x, sigma, **_: x / (1 + sigma[:, None, None, None] ** 2)
""",
}

# What must hold after a page's Python.
AFTER = {
    "README.md": "assert steps.num_steps == 8 and image.size == (64, 64)",
    "docs/pipelines.md": """
assert image.size == (64, 64) and steps.num_steps == 6
assert comparison.schedules["searched"].keys() == {6}
""",
    "docs/getting_started.md": """
import sys
assert steps.num_steps == 5
assert images.shape == (16, 1, 28, 28)
assert not {'hydra', 'lightning', 'wandb'} & set(sys.modules)
""",
    "docs/your_own_model.md": """
assert steps.num_steps == 4
assert float((x0[:, None] - centers).norm(dim=-1).amin(1).max()) < 0.1
assert planned.keys() == {4, 6}
""",
    "docs/other_programs.md": """
torch = __import__("torch")
torch.testing.assert_close(scheduler.sigmas.double(), steps.times, rtol=0, atol=1e-6)
assert steps.num_steps == 10
""",
    "docs/comfyui.md": "assert x0.shape == noise.shape and x0.isfinite().all()",
    "docs/fitted_steps.md": "assert steps.steps.weights.shape == (5, 8)",
}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The contents of a page's fenced blocks of a language, or of none ("")."""
    fences = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for kind, text in fences if kind == language]


def commands(page: Path) -> list[str]:
    lines = "".join(blocks(page, "bash")).splitlines()
    return [line for line in lines if line.strip()]


def shortened(command: str) -> str:
    """The command with few samples, short teachers and small random networks."""
    for pattern, replacement in CHANGED.items():
        command = re.sub(pattern, replacement, command)
    for pattern, options in ADDED.items():
        if re.search(pattern, command):
            command = f"{command} {options}"
    return command


WITH_COMMANDS = [page for page in PAGES if commands(page)]
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


# --------------------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name)
def test_commands(page, tmp_path, garments):
    """In order, in an empty folder."""
    environment = {"OSS_EXP_CACHE": str(tmp_path / "cache"), "OSS_EXP_DATA": str(garments)}
    _give_files(page, tmp_path)
    for command in commands(page):
        if any(re.match(pattern, command) for pattern in NOT_RUN):
            continue
        if not command.startswith("oss-exp"):
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of this Python
            subprocess.run(
                ["bash", "-c", command],
                cwd=tmp_path,
                env={**os.environ, "PATH": path},
                check=True,
                capture_output=True,
            )
            continue
        listed = shortened(command).replace("oss-exp", r"printf '%s\n'", 1)  # as a shell reads them
        arguments = subprocess.run(
            ["bash", "-c", listed], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        run_process(*arguments.stdout.splitlines(), folder=tmp_path, **environment)
    if page.name == "command_line.md":
        tables = list(tmp_path.glob("multirun/*/*/table.md"))
        assert any(table.read_text().count("oss_shared") == 2 for table in tables)


def _give_files(page: Path, folder: Path) -> None:
    """What the commands of a page find in their folder: files that it shows, or that its reader has."""
    (folder / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    if page.name == "comfyui.md":
        for file in (ASSETS / "schedules").glob("unet_fashion_oss_shared_5*"):
            shutil.copy(file, folder)
        (folder / "unet_fashion_oss_shared_5.json").rename(folder / "oss_shared_6.json")
        node = {"class_type": "KSampler", "inputs": {"model": ["4", 0], "seed": 7, "cfg": 2.0}}
        node["inputs"] |= {"positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
        (folder / "mine.json").write_text(json.dumps({"3": node}))
    if page.name == "tasks.md":
        (prompts,) = [block for block in blocks(page, "") if block.startswith('{"tag"')]
        (folder / "asked.jsonl").write_text(prompts)


def test_the_commands_that_are_not_run_are_there():
    everything = [command for page in PAGES for command in commands(page)]
    for pattern in NOT_RUN:
        assert any(re.match(pattern, command) for command in everything), pattern


# --------------------------------------------------------------------------------------------------------------
# Python
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python(page, tmp_path):
    """All blocks of a page, one after the other."""
    program = [BEFORE.get(name(page), ""), *blocks(page, "python"), AFTER.get(name(page), "")]
    (tmp_path / "page.py").write_text("\n".join(program))
    done = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_components_of_ones_own(tmp_path):
    """The examples of docs/extending.md in a module of their own, chosen by yamls outside of the package."""
    page = ROOT / "docs" / "extending.md"
    (tmp_path / "newcomer.py").write_text("\n".join(blocks(page, "python")))
    files = re.findall(r'```yaml title="([^"]+)"\n(.*?)```', page.read_text(), re.DOTALL)
    for place, text in files:
        file = tmp_path / place
        file.parent.mkdir(parents=True, exist_ok=True)
        local = re.sub(r"oss_exp\.(Midpoint|ArcLength|Contrast|Table|MLP)\b", r"newcomer.\1", text)
        file.write_text(local.replace("checkpoint: mlp.safetensors", "checkpoint: untrained"))
    assert len(files) == 5

    def run(options: str) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
        command = [sys.executable, "-m", "oss_exp", "--config-dir=conf", *options.split()]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    small = f"{SAMPLES} num_teacher_steps=10 num_steps=[3]"
    run(
        f"solver=midpoint stepsize=[fm,arc_length] metric=[contrast] {small} hydra.run.dir=compared"
    )
    assert "contrast" in (tmp_path / "compared" / "table.md").read_text()
    run(f"task=search model=mlp stepsize=arc_length {small} hydra.run.dir=searched")
    schedule = "searched/schedules/arc_length_3.json"
    run(f"task=export exporter=table task.schedule={schedule} task.output=times.csv")
    assert (tmp_path / "times.csv").read_text().count("\n") == 5


# --------------------------------------------------------------------------------------------------------------
# The README itself
# --------------------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    """A screen and a half, with about ten lines of Python and ten of commands."""
    assert len(README.split()) < 900
    (python,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in python.splitlines() if line]) <= 10
    assert len(commands(ROOT / "README.md")) <= 10


def test_make_runs_what_the_readme_says():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:.*\n\t\$\(BIN\)/oss-exp$", makefile, re.MULTILINE)
    assert re.search(r"^test:.*\n\t\$\(BIN\)/pytest", makefile, re.MULTILINE)
    (made,) = [block for block in blocks(ROOT / "README.md", "") if "make" in block]
    assert [line.split("#")[0].strip() for line in made.splitlines()] == ["make demo", "make test"]


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
    expected |= {"LICENSE", "Makefile", "mkdocs.yml"}
    assert {name for name in top if not name.startswith(".")} == expected


@pytest.mark.slow
def test_notebooks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(notebook.read_text())["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        exec(compile(code, notebook.name, "exec"), {})
