"""What docs/ says agrees with the program: links, tasks, options and their defaults, commands."""

import re
import runpy
import shlex
import sys
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import oss_exp
from oss_exp.cli import CONF
from oss_exp.files import ASSETS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("experiments/*/README.md")),
]
TASKS = {
    path.stem: yaml.safe_load(path.read_text()) for path in sorted((CONF / "task").glob("*.yaml"))
}
COMMON = "Options of every search and measurement"
OPTION = re.compile(
    r"^\| `(?P<key>[^`]+)` \| (`(?P<default>[^`]*)`|(?P<required>required)) \|", re.MULTILINE
)


def sections() -> dict[str, str]:
    """The text under every heading of docs/tasks.md, comments aside."""
    text = re.sub(r"<!--.*?-->", "", (ROOT / "docs" / "tasks.md").read_text(), flags=re.DOTALL)
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {
        title: body for title, body in zip(parts[1::2], parts[2::2], strict=True) if body.strip()
    }


def stated(section: str) -> dict[str, Any]:
    """Option -> default, of a section's tables."""
    return {
        found["key"]: "???" if found["required"] else parsed(found["default"])
        for found in OPTION.finditer(section)
    }


def parsed(text: str) -> Any:
    return text if "${" in text else yaml.safe_load(text)


def options(config: dict[str, Any]) -> dict[str, Any]:
    """Option -> default, of a task's yaml: what it sets itself, and the groups that it chooses, but for the logger."""
    found = {}
    for entry in config.get("defaults", []):
        if isinstance(entry, str):  # what tasks have in common
            continue
        ((group, choice),) = entry.items()
        found[group.removeprefix("override ").removeprefix("/")] = choice
    found.pop("logger", None)
    for key, value in config.items():
        if key != "defaults":
            found |= leaves(value, key) if key != "_target_" else {}
    # What a task is handed on (task.table: ${table}) has the row of the value itself.
    return {
        key: value for key, value in found.items() if value != f"${{{key.removeprefix('task.')}}}"
    }


def leaves(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {
        key: leaf
        for name, inner in value.items()
        if name != "_target_"
        for key, leaf in leaves(inner, f"{path}.{name}").items()
    }


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def headings(path: Path) -> set[str]:
    """As GitHub's anchors."""
    titles = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text()))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        assert target.exists(), f"{document.relative_to(ROOT)}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in headings(target), f"{document.relative_to(ROOT)}: {link}"


def test_every_document_is_in_the_index_and_in_the_navigation():
    index = (ROOT / "docs" / "README.md").read_text()
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").rglob("*.md"):
        place = path.relative_to(ROOT / "docs").as_posix()
        assert place == "README.md" or f"({place})" in index, place
        assert re.search(rf"[ :-] {re.escape(place)}$", navigation, re.MULTILINE), place


def test_the_python_reference_has_every_public_name():
    pages = [path.read_text() for path in (ROOT / "docs" / "api").glob("*.md")]
    documented = re.findall(r"^::: (\S+)$", "\n".join(pages), re.MULTILINE)
    assert len(documented) == len(set(documented))
    for path in documented:
        module, _, name = path.rpartition(".")
        assert getattr(oss_exp, name) is getattr(import_module(module), name)
    names = {path.rpartition(".")[2] for path in documented}
    assert {*oss_exp.PUBLIC, *oss_exp.BASES} <= names


def test_the_version_is_one():
    citation = yaml.safe_load((ROOT / "docs" / "CITATION.cff").read_text())
    assert citation["version"] == oss_exp.__version__
    changes = (ROOT / "docs" / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)$", changes, re.MULTILINE)[1] == oss_exp.__version__


def test_the_drawn_weights_are_those_of_the_shipped_schedule():
    steps = oss_exp.StepSchedule.load(ASSETS / "schedules" / "flux_fashion_oss_fit_5.json")
    drawing = (ROOT / "docs" / "fitted_weights.svg").read_text().replace("−", "-")
    weights = [row[: 4 + k] for k, row in enumerate(steps.steps.weights.tolist())]
    expected = [f"{w:.3f}".replace("-0.000", "0.000") for row in weights for w in row]
    assert re.findall(r">(-?\d\.\d{3})<", drawing) == expected


def test_every_task_has_a_section():
    missing = TASKS.keys() - sections().keys()
    assert not missing, f"docs/tasks.md has no section on {', '.join(sorted(missing))}"


@pytest.mark.parametrize("task", TASKS)
def test_options_and_defaults(task):
    said, expected = stated(sections()[task]), options(TASKS[task])
    assert not expected.keys() - said.keys(), (
        f"docs/tasks.md, {task}: no row for {expected.keys() - said.keys()}"
    )
    assert said == expected | {key: default_of(key, task) for key in said.keys() - expected.keys()}


def test_options_in_common():
    said = stated(sections()[COMMON])
    assert len(said) > 10
    assert said == {key: default_of(key, "compare") for key in said}


def default_of(key: str, task: str) -> Any:
    """Of the configuration of a task: a group's choice, else a value."""
    config = composed(task)
    choices = config.hydra.runtime.choices
    if key in choices:
        return choices[key]
    assert OmegaConf.select(config, key, default="absent") != "absent", (
        f"{key} is no option of task={task}"
    )
    *path, name = key.split(".")
    return OmegaConf.to_container(
        OmegaConf.select(config, ".".join(path)) if path else config, resolve=False
    )[name]


@lru_cache
def composed(task: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        exporter = ["exporter=comfyui"] if task == "export" else []  # required
        return compose("config", [f"task={task}", *exporter], return_hydra_config=True)


@pytest.mark.slow
def test_commands_compose():
    """Every oss-exp command of README and docs/ is one that the configuration understands."""
    commands = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL):
            commands += [
                line.partition("oss-exp ")[2] for line in block.splitlines() if "oss-exp " in line
            ]
    assert len(commands) > 20
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for command in commands:
            sweep, choose = (
                "--multirun" in command,
                [word for word in words(command) if "=" in word],
            )
            choose = [word for word in choose if not word.startswith("hydra")]
            compose("config", [first_of_sweep(word) if sweep else word for word in choose])


def words(command: str) -> list[str]:
    """As a shell splits them, in the folder `here`, where `$(ls ...)` finds `there`."""
    command = re.sub(r"\$\([^)]*\)", "there", command).replace("$PWD", "here")
    return shlex.split(command, comments=True)


def first_of_sweep(word: str) -> str:
    key, _, value = word.partition("=")
    if value.startswith("interval"):
        return f"{key}=3"
    if value.startswith("["):
        return f"{key}={value.partition(']')[0]}]"
    return word if value.startswith("{") else f"{key}={value.split(',')[0]}"


SCRIPTS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in ROOT.glob("experiments/*/*.py")
    if "command_line(" in file.read_text()
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_an_experiment_is_what_it_is_for(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module(script, run_name="__main__")

    shown = capsys.readouterr().out
    purpose = import_module(script).__doc__.splitlines()[0]
    assert purpose in shown
    assert f"python -m {script}" in shown
