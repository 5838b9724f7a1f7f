"""Nonsense for every value of every configuration: it should be refused by the key's name.

    python -m experiments.border_fuzz.run [--only solver/deis task/pretrain ...]

Every option of every group and every task is composed once. Then every value in it is replaced,
one at a time, by each of VALUES, as an override on the command line does it. As at the start of a
run, the whole configuration is checked, and the object that the value belongs to is built;
published models are built at size=tiny. Writes accepted.md beside this file: all accepted
nonsense, by the type of the parameter.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from experiments.common import command_line
from oss_exp.cli import CONF
from oss_exp.data.noise import NoiseData
from oss_exp.job import USER_ERRORS
from oss_exp.models.base import Model
from oss_exp.noise import NoiseSchedule
from oss_exp.stepsize.base import check_num_steps
from oss_exp.tasks import border
from oss_exp.tasks.configuration import check_configuration
from oss_exp.tasks.task import Task

VALUES = ("abc", "-1", "0", "1e30", "nan", "inf", "[]", "null", "{a: 1}", "1.5", "true", "[1,2]")
PSDENOISER = importlib.util.find_spec("psdenoiser") is not None
HERE = Path(__file__).resolve().parent
NEEDED = {  # further overrides that an option needs
    "task/report": ["sweep=x"],
    "task/export": ["exporter=comfyui", "task.schedule=x"],
    "task/import_sigmas": ["task.sigmas=x", "task.network=eps"],
    "experiment/table_7": ["data.prompts=x"],
    "data/conditions": [
        "data.conditions=conditions.npz",
        "data.search_samples=4",
        "data.eval_samples=4",
    ],
}
NEEDED_BY_GROUP = {
    "images": ["task=statistics"],
    "exporter": ["task=export", "task.schedule=x"],
    "detector": ["task=geneval"],
}
PLACES = {"detector": "task.detector", "exporter": "task.exporter"}
# Building these would read files or start something.
NOT_BUILT = ("logger", "images", "evaluation", "metric", "task.detector")


class Outcome(NamedTuple):
    """The outcome of one value.

    Attributes:
        config: The option, such as solver/deis.
        key: Key of the value.
        value: The nonsense.
        kind: `accepted`, `refused` (perhaps with only its node named), or `fault`.
        message: The error's message.
    """

    config: str
    key: str
    value: str
    kind: str
    message: str = ""


def options() -> list[str]:
    """Return every group/option of conf/ that a run can choose."""
    names = []
    for file in sorted(CONF.glob("*/*.yaml")):
        group = file.parent.name
        if group not in ("base", "hydra", "scale", "paths"):
            names.append(f"{group}/{file.stem}")
    return names


@lru_cache(maxsize=1)
def composed(option: str) -> DictConfig:
    """Return the configuration of a run with this option and with small models."""
    # Compose.
    group, _, name = option.partition("/")
    needed = [*NEEDED_BY_GROUP.get(group, []), *NEEDED.get(option, []), "paths.output_dir=out"]
    override = f"detector@task.detector={name}" if group == "detector" else f"{group}={name}"
    cfg = compose("config", [*needed, override], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    OmegaConf.set_struct(cfg, False)
    del cfg.hydra

    # Make the model small.
    if "sizes" in cfg.get("model", {}) and "tiny" in cfg.model.sizes:
        cfg.model.size = "tiny"
    elif "checkpoint" in cfg.get("model", {}) and cfg.model.checkpoint is not None:
        cfg.model.checkpoint = "untrained"
    return cfg


def keys_of(cfg: DictConfig, option: str) -> list[str]:
    """Return the keys of all values of an option, lists included.

    For a task or an experiment these are the keys of the whole run without its other groups.
    """
    group, _, name = option.partition("/")
    plain: Any = OmegaConf.to_container(cfg)

    # A run.
    if group in ("task", "experiment"):
        groups = {path.name for path in CONF.iterdir()} - {"task"}
        values = {key: value for key, value in plain.items() if key not in groups}
        return list(_leaves(values, ""))

    # An option of a group.
    place = PLACES.get(group, group)
    if group in ("stepsize", "metric"):
        place = f"{group}.{name}"
    node: Any = plain
    for part in place.split("."):
        node = node[part]
    return list(_leaves(node, place)) if node is not None else []


def _leaves(node: Any, key: str) -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else name)
    else:
        yield key


Refusals = dict[tuple[str, str, str], Exception | None]  # by class, parameter and value


def outcome_of(option: str, cfg: DictConfig, key: str, value: str, refusals: Refusals) -> Outcome:
    """Replace one value, check the configuration, and build what the value belongs to.

    Args:
        option: The option, such as solver/deis.
        cfg: Its configuration.
        key: Key of the value.
        value: The nonsense.
        refusals: Errors of what was built before, so that every class, parameter and value is
            built once; extended.
    """
    changed = copy.deepcopy(cfg)
    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
        OmegaConf.update(changed, key, override.value(), merge=True)
        check_configuration(changed)

        # Built before.
        place = (_owner(cfg, key), key.rpartition(".")[2], value)
        if refusals.get(place) is not None:
            return Outcome(option, key, value, "refused", str(refusals[place]))

        # Build.
        if place not in refusals:
            try:
                if not _build(changed, key):
                    return Outcome(option, key, value, "accepted, not built")
                refusals[place] = None
            except Exception as error:
                refusals[place] = error
                raise
    except USER_ERRORS as error:
        return Outcome(option, key, value, _kind(str(error), key), str(error))
    except Exception as error:
        return Outcome(option, key, value, "fault", f"{type(error).__name__}: {error}")
    return Outcome(option, key, value, "accepted")


def _kind(message: str, key: str) -> str:
    """Tell by its message whether a refusal names the key.

    It does with the whole key, or with a node above it and the parameter's name. Classes of other
    libraries often do not say which of their arguments is wrong; then the node alone is named.
    """
    *above, name = key.split(".")
    nodes = [".".join(above[: end + 1]) for end in range(len(above))]
    named = [bool(re.search(rf"\b{re.escape(node)}\b", message)) for node in nodes]
    if key in message or (name in message and any(named)):
        return "refused"
    return "refused, its node named" if named[-1] else "fault"


def _owner(cfg: DictConfig, key: str) -> str:
    """Return the nearest _target_ above a key."""
    parts = key.split(".")[:-1]
    while parts:
        node = OmegaConf.select(cfg, ".".join(parts))
        if isinstance(node, DictConfig) and "_target_" in node:
            return str(node._target_)
        parts.pop()
    return "the run"


def _build(cfg: DictConfig, key: str) -> bool:
    """Build the object that a value belongs to, as a run does.

    Returns:
        False where this fuzz does not build it.
    """
    # Not built here.
    if key.startswith(NOT_BUILT) or key.startswith("model.sizes.full."):
        return False
    part = key.split(".")[0]
    if part == "model" and not PSDENOISER and "PSDenoiser" in cfg.model.get("_target_", ""):
        return False

    # Built by part.
    if part == "model":
        border.build(cfg.model, "model", Model)
    elif part == "noise_schedule":
        schedule = border.build(cfg.noise_schedule, "noise_schedule", NoiseSchedule)
        schedule.nodes(cfg.num_teacher_steps)
    elif part == "stepsize":
        name = key.split(".")[1]
        strategy = border.build(cfg.stepsize[name], f"stepsize.{name}")
        strategy.network_calls(cfg.num_teacher_steps, list(cfg.num_steps), 0)
    elif part == "data":
        if cfg.data.get("classes") == "auto":
            cfg.data.classes = "all"
        num_classes = 10 if "classes" in cfg.data else None
        border.build(cfg.data, "data", NoiseData, event_shape=(1, 8, 8), num_classes=num_classes)
    elif part in ("solver", "distance", "trainer"):
        border.build(cfg[part], part)
    elif part == "num_steps":
        check_num_steps(list(cfg.num_steps), cfg.num_teacher_steps)
    elif part == "task" and "detector" not in cfg.task:
        border.build(cfg.task, "task", Task)
    return True


def fuzz(chosen: list[str], values: tuple[str, ...] = VALUES) -> Iterator[Outcome]:
    """Yield what became of every value of these options."""
    refusals: Refusals = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for option in chosen:
            cfg = composed(option)
            for key in keys_of(cfg, option):
                for value in values:
                    yield outcome_of(option, cfg, key, value, refusals)


def taker(outcome: Outcome) -> tuple[str, str]:
    """Return a description of the type that accepted a value, and the name of its parameter."""
    cfg = composed(outcome.config)
    owner = _owner(cfg, outcome.key)
    name = outcome.key.rpartition(".")[2]
    if owner == "the run" or name.startswith("_"):
        return "a value of the run", outcome.key
    kinds = border.parameters_of(border.class_of({"_target_": owner}, "")).kinds
    words = border.describe(kinds[name]) if name in kinds else "anything (part of a mapping)"
    return words, f"{owner.removeprefix('oss_exp.')}.{name}"


def report(accepted: list[Outcome]) -> str:
    """Return a table of the accepted values: the type, the values, how many parameters."""
    # Type -> parameter -> values.
    table: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        takers: dict[tuple[str, str], tuple[str, str]] = {}
        for outcome in accepted:
            place = (outcome.config, outcome.key)
            if place not in takers:
                takers[place] = taker(outcome)
            kind, parameter = takers[place]
            if outcome.value not in table[kind][parameter]:
                table[kind][parameter].append(outcome.value)

    # One row for the parameters of a type that accept the same values.
    lines = ["| what the parameter takes | accepted | parameters | such as |", "|---|---|---|---|"]
    for kind in sorted(table):
        by_values: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for parameter, values in table[kind].items():
            by_values[tuple(values)].append(parameter)
        for values, parameters in sorted(by_values.items(), key=lambda item: -len(item[1])):
            listed = ", ".join(f"`{value}`" for value in values)
            lines.append(f"| {kind} | {listed} | {len(parameters)} | {', '.join(parameters[:4])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "--only", nargs="*", default=None, help="options such as solver/deis; all without"
    )
    chosen = parser.parse_args().only or options()
    os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    warnings.simplefilter("ignore")

    # Try everything in an empty folder.
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OSS_EXP_CACHE"] = folder
        os.chdir(folder)
        np.savez("conditions.npz", deltasq_realisations=np.zeros((16, 8), np.float32))
        for outcome in fuzz(chosen):
            outcomes.append(outcome)
            if outcome.kind == "fault":
                place = f"{outcome.config} {outcome.key}={outcome.value}"
                print(f"{place}: {outcome.message}", flush=True)
        built = report([outcome for outcome in outcomes if outcome.kind == "accepted"])
        unbuilt = report([outcome for outcome in outcomes if outcome.kind == "accepted, not built"])

    # Count.
    counts = Counter(outcome.kind for outcome in outcomes)
    listed = ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts))
    summary = f"{len(outcomes)} tried, {listed}"
    print(summary)
    (HERE / "accepted.md").write_text(f"{summary}\n\n{built}\nNot built here:\n\n{unbuilt}")


if __name__ == "__main__":
    main()
