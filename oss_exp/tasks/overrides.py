"""Overrides of a command line that are refused: what is not known (any more), and values that nothing reads.

The yaml of a task lists the groups and values that the task reads, so Hydra refuses any other. What it lets through are
entries that are appended (`+images=digits`), and those that a yaml without a place in the task sets (`scale=tiny`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from shlex import quote

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from oss_exp.tasks import border

MULTIRUN = {"-m", "--multirun", "hydra.mode=MULTIRUN"}
RENAMED = {
    r"task\.to=(.*)": r"exporter=\1",
    r"data@task\.images=(.*)": r"images=\1",
    r"data\.(root|split|size|channels|file|count)=(.*)": r"images.\1=\2",
    r"evaluation\.metrics=\[?(?:psnr)?,?(.*?)\]?": r"metric=[\1]",
    r"metric=\[?psnr,?(.*?)\]?": r"metric=[\1]",  # PSNR is always measured
    r"evaluation\.(fid|kid|precision_recall|class_agreement|lpips|clip_score)\.(.*)": r"metric.\1.\2",
    r"noise_schedule=flux": r"noise_schedule=pipeline",
}
OF_PIPELINES = {  # options of models that were networks with options of their own
    r"model\.checkpoint=(.*)": r"model.pipeline=\1",
    r"model\.(?:guidance\.scale|embedded_guidance)=(.*)": r"model.call.guidance_scale=\1",
    r"model\.(height|width)=(.*)": r"model.call.\1=\2",
    r"model\.frames=(.*)": r"model.call.num_frames=\1",
    r"model\.text_length=(.*)": r"model.call.max_sequence_length=\1",
    r"model\.micro_batch=(.*)": r"data.batch_size=\1",
}


def refuse_unknown(overrides: Sequence[str], conf: Path) -> None:
    """Raise ValueError where an override is spelled as in an earlier version, or chooses an option that does not exist.

    conf: the folder with a folder for each group. With folders of the user's own, Hydra itself says what is not there.
    """
    chosen = dict(
        override.split("=", 1) for override in overrides if re.match(r"(model|task)=", override)
    )
    file = conf / "model" / f"{chosen.get('model')}.yaml"
    pipeline = file.is_file() and "\npipeline: " in file.read_text()
    if pipeline and chosen.get("task") in ("convert", "pretrain"):
        raise ValueError(
            f"model={file.stem} is a pipeline of published parts, which task={chosen['task']} does not take; choose a "
            "network of this package"
        )
    renamed = RENAMED | (OF_PIPELINES if pipeline else {})
    own_folders = any(
        re.match(r"hydra\.searchpath=|--config-dir|-cd", override) for override in overrides
    )
    for override in overrides:
        for old, new in renamed.items():
            if match := re.fullmatch(old, override):
                raise ValueError(f"{override} is now {match.expand(new)}")

        group, _, choice = override.partition("=")
        _check_grammar(override, group, choice, several=not MULTIRUN.isdisjoint(overrides))
        if own_folders or not group or not (conf / group).is_dir():
            continue
        options = {file.stem for file in (conf / group).glob("*.yaml")}
        if group != "metric" and re.fullmatch(r"\[\s*\]", choice):
            raise ValueError(f"{override} chooses none; choose from {', '.join(sorted(options))}")
        chosen_here = re.findall(r"\w+", choice) if choice.startswith("[") else []
        if twice := next((option for option in chosen_here if chosen_here.count(option) > 1), None):
            raise ValueError(f"{override} names {twice} twice; name it once")
        for option in re.findall(r"\w+", choice) if re.fullmatch(r"[\w,\[\] ]*", choice) else ():
            if option in options:
                continue
            homes = [
                f"{file.parent.name}={option}" for file in sorted(conf.glob(f"*/{option}.yaml"))
            ]
            advice = f"choose from {', '.join(sorted(options))}"
            if near := get_close_matches(option, options, n=3):
                advice = f"did you mean {' or '.join(near)}? {advice[0].upper()}{advice[1:]}"
            if homes:
                advice = f"{option} is an option of another group: {' or '.join(homes)}"
            raise ValueError(f"{group}={option} does not exist; {advice}")


def _check_grammar(override: str, key: str, value: str, several: bool) -> None:
    """Raise ValueError where Hydra cannot read an override, or would take the home folder's sign for a name.

    several: whether there is a job for each of several values.
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
    if parsed.is_choice_sweep() and not several and not value.startswith("choice("):
        raise ValueError(
            f"{override} has several values; write a list, {quote(f'{key}=[{value}]')}, or text, {command}, or add "
            "--multirun for a job with each"
        )
    folder = value.strip("\"'")
    if key.startswith("hydra.") and key.endswith(".dir") and folder.startswith("~/"):
        raise ValueError(
            f"{override} would be a folder called ~; write {key}={os.path.expanduser(folder)}"
        )


def refuse_unread(cfg: DictConfig, conf: Path) -> None:
    """Raise ValueError where the composed configuration has entries that its task does not read."""
    run, groups = HydraConfig.get(), {path.name for path in conf.iterdir() if path.is_dir()}
    task, scale = (run.runtime.choices[name] for name in ("task", "scale"))
    for override in run.overrides.task:
        key = override.lstrip("+").partition("=")[0]
        first = re.split(r"[.@]", key)[0]
        replaced = f"~{first}" in run.overrides.task
        if override.startswith("+") and not replaced and (key == first or first not in groups):
            raise ValueError(
                f"{override} does nothing: task={task} does not read {first}; leave it out"
            )

    # What a scale sets of a task must be of this task.
    if scale:
        options = border.parameters_of(border.class_of(cfg.task, "task")).kinds
        for name in (
            OmegaConf.select(OmegaConf.load(conf / "scale" / f"{scale}.yaml"), "task") or ()
        ):
            if name not in options:
                raise ValueError(
                    f"scale={scale} sets task.{name}, which task={task} does not read; leave it out"
                )

    # A group that the task reads is among the choices, or several options were chosen, each of which makes an object.
    for name in sorted(groups & set(cfg) - set(run.runtime.choices)):
        if any(
            not isinstance(entry, DictConfig) or "_target_" not in entry
            for entry in cfg[name].values()
        ):
            setter = f"scale={scale}" if scale else "what sets it"
            raise ValueError(f"task={task} does not read {name}; leave out {setter}")
