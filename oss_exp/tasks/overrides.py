"""Refuse overrides of the command line: unknown or renamed ones, and values that nothing reads.

The yaml of a task lists the groups and values that the task reads, so Hydra refuses all others.
Two kinds pass: entries that are appended (`+images=digits`), and those that come from a yaml with
no place in the task (`scale=tiny`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from shlex import quote
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf

import oss_exp
from oss_exp.tasks import border

PACKAGE = Path(oss_exp.__file__).resolve().parent
_CONF_FOLDERS = (PACKAGE / "conf", PACKAGE.parent / "conf")  # in a wheel, in a checkout
CONF = next(folder for folder in _CONF_FOLDERS if folder.is_dir())
MULTIRUN = {"-m", "--multirun", "hydra.mode=MULTIRUN"}
# Patterns of overrides in earlier versions, and their spelling today.
RENAMED = {
    r"task\.to=(.*)": r"exporter=\1",
    r"data@task\.images=(.*)": r"images=\1",
    r"data\.(root|split|size|channels|file|count)=(.*)": r"images.\1=\2",
    r"evaluation\.metrics=\[?(?:psnr)?,?(.*?)\]?": r"metric=[\1]",
    r"metric=\[?psnr,?(.*?)\]?": r"metric=[\1]",  # PSNR is always measured
    r"evaluation\.(fid|kid|precision_recall|class_agreement|lpips|clip_score)\.(.*)": (
        r"metric.\1.\2"
    ),
    r"noise_schedule=flux": r"noise_schedule=pipeline",
}
# Options of models that were networks, with options of their own, before they were pipelines.
OF_PIPELINES = {
    r"model\.checkpoint=(.*)": r"model.pipeline=\1",
    r"model\.(?:guidance\.scale|embedded_guidance)=(.*)": r"model.call.guidance_scale=\1",
    r"model\.(height|width)=(.*)": r"model.call.\1=\2",
    r"model\.frames=(.*)": r"model.call.num_frames=\1",
    r"model\.text_length=(.*)": r"model.call.max_sequence_length=\1",
    r"model\.micro_batch=(.*)": r"data.batch_size=\1",
}


def refuse_unknown(overrides: Sequence[str], conf: Path) -> None:
    """Check that overrides are spelled as in this version, and that their options exist.

    Args:
        overrides: The overrides of the command line.
        conf: The folder with a folder for every group. If the user has further folders, Hydra
            reports what does not exist.

    Raises:
        ValueError: For the first override that does not pass.
    """
    # Renamed options; those of a pipeline depend on the model.
    renamed = RENAMED | (OF_PIPELINES if _is_pipeline(overrides, conf) else {})
    searches_elsewhere = any(
        re.match(r"hydra\.searchpath=|--config-dir|-cd", override) for override in overrides
    )

    # One override after the other.
    is_multirun = is_sweep(overrides)
    for override in overrides:
        for old, new in renamed.items():
            if match := re.fullmatch(old, override):
                raise ValueError(f"{override} is now {match.expand(new)}")
        group, _, choice = override.partition("=")
        _check_grammar(override, group, choice, is_multirun)
        if group and (conf / group).is_dir() and not searches_elsewhere:
            _check_options(override, group, choice, conf)


def _is_pipeline(overrides: Sequence[str], conf: Path) -> bool:
    """Tell whether the model is a pipeline; raise ValueError if the task does not take one."""
    choices: dict[str, str] = {}
    for override in overrides:
        if re.match(r"(model|task)=", override):
            group, choice = override.split("=", 1)
            choices[group] = choice
    file = conf / "model" / f"{choices.get('model')}.yaml"
    if not file.is_file() or "\npipeline: " not in file.read_text():
        return False
    if choices.get("task") in ("convert", "pretrain"):
        raise ValueError(
            f"model={file.stem} is a pipeline of published parts, which task={choices['task']} "
            "does not take; choose a network of this package"
        )
    return True


def _check_options(override: str, group: str, choice: str, conf: Path) -> None:
    """Raise ValueError if a choice of a group is empty, repeated or does not exist."""
    options = {file.stem for file in (conf / group).glob("*.yaml")}
    if group != "metric" and re.fullmatch(r"\[\s*\]", choice):
        raise ValueError(f"{override} chooses none; choose from {', '.join(sorted(options))}")

    # A list may not repeat an option.
    names = re.findall(r"\w+", choice)
    if choice.startswith("["):
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{override} names {name} twice; name it once")

    # Other choices than names and lists of names are Hydra's.
    if not re.fullmatch(r"[\w,\[\] ]*", choice):
        return
    for name in names:
        if name in options:
            continue
        listed = ", ".join(sorted(options))
        advice = f"choose from {listed}"
        if near := get_close_matches(name, options, n=3):
            advice = f"did you mean {' or '.join(near)}? Choose from {listed}"
        if files := sorted(conf.glob(f"*/{name}.yaml")):
            homes = [f"{file.parent.name}={name}" for file in files]
            advice = f"{name} is an option of another group: {' or '.join(homes)}"
        raise ValueError(f"{group}={name} does not exist; {advice}")


def _check_grammar(override: str, key: str, value: str, is_multirun: bool) -> None:
    """Check that Hydra reads an override as the user means it.

    Args:
        override: The override.
        key: The part before its `=`.
        value: The part after it.
        is_multirun: Whether several values make several jobs.

    Raises:
        ValueError: If Hydra cannot read it, would read several values, or would take the sign of
            the home folder for a name.
    """
    if override.startswith("-") or "=" not in override:
        return
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    command = quote(f'{key}="{quoted}"')
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        raise ValueError(
            f"{override} cannot be read as it is; quote its value: {command}"
        ) from None

    # Several values.
    if parsed.is_choice_sweep() and not is_multirun and not value.startswith("choice("):
        as_list = quote(f"{key}=[{value}]")
        raise ValueError(
            f"{override} has several values; write a list, {as_list}, or text, {command}, or add "
            "--multirun for a job with each"
        )

    # The home folder.
    folder = value.strip("\"'")
    if key.startswith("hydra.") and key.endswith(".dir") and folder.startswith("~/"):
        raise ValueError(
            f"{override} would be a folder called ~; write {key}={os.path.expanduser(folder)}"
        )


def is_sweep(overrides: Sequence[str]) -> bool:
    """Return whether a command line asks for several jobs."""
    return not MULTIRUN.isdisjoint(overrides)


def explained(error: Exception, overrides: Sequence[str], conf: Path) -> Exception:
    """Return Hydra's error of an override without a match as one that says what there is.

    Args:
        error: Any error; others are returned as they are.
        overrides: The overrides of the command line.
        conf: The folder with a folder for every group.
    """
    form = r"(?:In '(\w+)/(\w+)': )?Could not override '([\w@./]+)'"
    match = re.match(form, str(error)) if isinstance(error, HydraException) else None
    if match is None:
        return error
    group, option, key = match.groups()

    # The same command with its choices alone.
    choices = {}
    for override in overrides:
        name, _, choice = override.partition("=")
        if name != key and re.fullmatch(r"\w+", choice) and (conf / name).is_dir():
            choices[name] = choice
    choices.pop(group, None)
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            cfg = compose("config", [f"{name}={choice}" for name, choice in choices.items()])
    except HydraException:
        return error

    # What it has in place of the group or the value.
    if (conf / key).is_dir():
        setter = f"{group}={option} sets" if group else "the command sets"
        groups = [name for name in sorted(cfg) if (conf / name).is_dir()]
        task = choices.get("task", "compare")
        return ConfigCompositionException(
            f"{setter} {key}, which task={task} does not read; it reads {', '.join(groups)}"
        )
    parent, *rest = key.split(".")
    if rest and parent in cfg and (conf / parent / f"{rest[0]}.yaml").exists():
        return ConfigCompositionException(
            f"{key} belongs to {parent}={rest[0]}, which is not chosen"
        )
    if parent in cfg and (owners := _owners(conf / parent, rest)):
        listed = " or ".join(f"{parent}={owner}" for owner in owners)
        return ConfigCompositionException(f"{key} belongs to {listed}, which is not chosen")
    values = cast(dict[Any, Any], OmegaConf.to_container(cfg))
    keys = sorted(_keys(values), key=len)
    same_end = [name for name in keys if name.split(".")[-1] == key.split(".")[-1]]
    near = [*dict.fromkeys([*same_end[:2], *get_close_matches(key, keys, n=2)])]
    advice = f"did you mean {' or '.join(near)}? " if near else ""
    return ConfigCompositionException(
        f"{key} does not exist here; {advice}`--cfg job` shows all values"
    )


def _owners(group: Path, key: Sequence[str]) -> list[str]:
    """Return up to three options of a group whose yaml has a key, or none if more have it."""
    owners = []
    for file in sorted(group.glob("*.yaml")):
        values: Any = OmegaConf.to_container(OmegaConf.load(file))
        for name in key:
            values = values.get(name, {}) if isinstance(values, dict) else {}
        if values != {}:
            owners.append(file.stem)
    return owners if len(owners) <= 3 else []


def _keys(values: dict[Any, Any]) -> list[str]:
    """Return the full keys of all values, such as "data.seed"."""
    keys = []
    for name, value in values.items():
        if name != "_target_":
            keys.append(str(name))
        if isinstance(value, dict):
            keys += [f"{name}.{key}" for key in _keys(value)]
    return keys


def refuse_unread(cfg: DictConfig, conf: Path) -> None:
    """Check that the task reads all entries of the composed configuration.

    Args:
        cfg: The composed configuration.
        conf: The folder with a folder for every group.

    Raises:
        ValueError: If it has other entries.
    """
    run = HydraConfig.get()
    groups = {path.name for path in conf.iterdir() if path.is_dir()}
    task = run.runtime.choices["task"]
    scale = run.runtime.choices["scale"]

    # Appended entries.
    for override in run.overrides.task:
        key = override.lstrip("+").partition("=")[0]
        first = re.split(r"[.@]", key)[0]
        is_replaced = f"~{first}" in run.overrides.task
        if override.startswith("+") and not is_replaced and (key == first or first not in groups):
            raise ValueError(
                f"{override} does nothing: task={task} does not read {first}; leave it out"
            )

    # Options of the task that a scale sets.
    if scale:
        options = border.parameters_of(border.class_of(cfg.task, "task")).kinds
        settings = OmegaConf.load(conf / "scale" / f"{scale}.yaml")
        for name in OmegaConf.select(settings, "task") or ():
            if name not in options:
                raise ValueError(
                    f"scale={scale} sets task.{name}, which task={task} does not read; leave it out"
                )

    # Groups: those that a task reads are among the choices, or hold an object for each of several
    # options.
    named = [
        f"{group}={run.runtime.choices[group]}"
        for group in ("experiment", "scale")
        if run.runtime.choices[group]
    ]
    setter = [*named, "what sets it"][0]
    for name in sorted(groups & set(cfg) - set(run.runtime.choices)):
        unread = [option for option, entry in cfg[name].items() if not _is_object(entry)]
        if 0 < len(unread) < len(cfg[name]):
            raise ValueError(
                f"{name} has settings of {', '.join(unread)}, not chosen; choose that as well, or "
                f"leave out {setter}"
            )
        if unread:
            raise ValueError(f"task={task} does not read {name}; leave out {setter}")


def _is_object(entry: object) -> bool:
    """Return whether an entry of a configuration makes an object."""
    return isinstance(entry, DictConfig) and "_target_" in entry
