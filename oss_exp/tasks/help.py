"""Help texts of the command line, read from the commented files of conf/.

oss-exp --help                   one screen
oss-exp stepsize --help          the options of a group
oss-exp task=certify --help      what one of them takes
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from oss_exp.tasks.overrides import refuse_unknown

FLAGS = {"--help", "-h"}
SETTING = re.compile(r"^( *)([\w.]+):(?: +(?!#|&\w+$)(.*?))?(?:\s+# (.*))?$")
FALLBACK = re.compile(r"\$\{oc\.select:[\w.]+,(.*)\}")  # of a value that another one gives
WIDTH = 100
MOST = 60  # columns before a comment
SCREEN = """\
oss-exp: optimal step schedules for few-step sampling of diffusion and flow-matching models.

  oss-exp                                           search, compare and save, on a small exact model
  oss-exp model=unet_fashion num_steps=[5,10]       the same on a trained network
  oss-exp task=search model=pipeline model.pipeline=FOLDER data.prompts=FILE   a pipeline's schedule
  oss-exp task=export exporter=comfyui task.schedule=FILE.json                 take it elsewhere
  oss-exp --multirun solver=euler,dpm_solver_pp num_steps=[5],[10]             a sweep

Choose with group=option, change any value with key=value.

  task      {task}
  model, data, images              what is sampled, and what it is trained or judged on
  solver, noise_schedule           how the teacher steps, and where
  stepsize, distance               the strategies that plan steps, and what a search minimises
  metric, evaluation, detector     what is measured
  exporter, logger, trainer        where results go, and on which devices a run works
  experiment, scale                settings of a whole table or figure, and their small versions

  oss-exp GROUP --help             the options of a group, such as stepsize
  oss-exp GROUP=OPTION --help      what an option takes, such as task=certify
  oss-exp --cfg job [...]          the whole configuration of a command
  oss-exp doctor                   versions, devices, caches, and what is missing for what
  oss-exp --version

Results go to outputs/DATE/TIME: table.md, report.html, schedules/*.json, metrics.json.
"""


class Setting(NamedTuple):
    """A line of a configuration file: its full key, its default and its comment."""

    key: str
    default: str
    comment: str


def help_text(arguments: Sequence[str], conf: Path) -> str | None:
    """Return the help that a command line asks for; None where it asks for none.

    Args:
        arguments: The command line without the program's name.
        conf: The folder of the groups.

    Raises:
        ValueError: Where a group or an option does not exist.
    """
    if FLAGS.isdisjoint(arguments):
        return None
    words = [argument for argument in arguments if not argument.startswith("-")]
    if not words:
        names = ", ".join(file.stem for file in _options(conf / "task"))
        return SCREEN.format(task=_wrapped(names, 12))
    group, _, option = words[0].partition("=")
    if not (conf / group).is_dir():
        groups = ", ".join(sorted(folder.name for folder in conf.iterdir() if folder.is_dir()))
        raise ValueError(f"there is no group {group}; choose from {groups}")
    if option:
        refuse_unknown(words[:1], conf)
        return _option_help(conf, group, option)
    return _group_help(conf / group)


def _group_help(folder: Path) -> str:
    lines = [f"{folder.name}=...", ""]
    for file in _options(folder):
        lines.append(f"  {file.stem:<18} {_summary(file.read_text())}")
    lines += ["", f"oss-exp {folder.name}=OPTION --help says what one takes."]
    return "\n".join(lines) + "\n"


def _option_help(conf: Path, group: str, option: str) -> str:
    file = conf / group / f"{option}.yaml"
    if not file.is_file():
        raise ValueError(f"{group}={option} is not one option; ask for the help of one")
    lines = [f"{group}={option}: {_summary(file.read_text())}", ""]
    settings: dict[str, Setting] = {}
    for setting in _settings(file, conf):
        inherited = settings.get(setting.key)
        comment = setting.comment or (inherited.comment if inherited else "")
        settings[setting.key] = setting._replace(comment=comment)
    width = min(max((len(s.key) + len(s.default) + 1 for s in settings.values()), default=0), MOST)
    for setting in settings.values():
        assignment = f"{setting.key}={setting.default}"
        lines.append(f"  {assignment:<{width}}  {setting.comment}".rstrip())
    lines += ["", f"oss-exp {group}={option} --cfg job prints the whole configuration."]
    return "\n".join(lines) + "\n"


def _settings(file: Path, conf: Path, package: str | None = None) -> Iterator[Setting]:
    """Yield the settings of a file, those of its base files before its own."""
    text = file.read_text()
    if package is None:
        declared = re.match(r"# @package (\S+)", text)
        package = declared[1] if declared else file.parent.name
        package = "" if package == "_global_" else f"{package}."

    # Base files.
    config: Any = OmegaConf.create(text)
    for entry in config.get("defaults") or []:
        name = str(entry).partition("@")[0].removeprefix("/base/")
        base = conf / "base" / f"{name}.yaml"
        if isinstance(entry, str) and base.is_file():
            here = package if "@_here_" in entry else None
            yield from _settings(base, conf, here)

    # The file's own lines; of nested ones the deepest.
    parents: list[tuple[int, str]] = []
    for line in re.sub(r"(?m)^defaults:\n(?: +.*\n|\n)*", "", text).splitlines():
        match = SETTING.match(line)
        if match is None or line.lstrip().startswith("#"):
            continue
        indent, key, default, comment = match.groups()
        while parents and parents[-1][0] >= len(indent):
            parents.pop()
        if not default:
            parents.append((len(indent), key))
        elif not key.startswith("_"):
            path = ".".join([*(name for _, name in parents), key])
            yield Setting(f"{package}{path}", FALLBACK.sub(r"\1", default), comment or "")


def _summary(text: str) -> str:
    """Return the comment that a configuration file begins with."""
    comments = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comments.append(line.removeprefix("#").strip())
    return " ".join(comments)


def _options(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.yaml"))


def _wrapped(text: str, indent: int) -> str:
    return ("\n" + " " * indent).join(wrap(text, WIDTH - indent))
