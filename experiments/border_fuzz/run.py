"""Nonsense for every value of every configuration: is it refused, in one message that names the key?

    python -m experiments.border_fuzz.run [--only solver/deis task/pretrain ...]

Every option of every group and every task is composed once; then every value in it is replaced, one at a time, by each
of VALUES, as an override on the command line does it. What a run does before it works is done: the whole configuration
is checked, and the object that the value belongs to is built. Published models are built at size=tiny. Writes
accepted.md beside this file: all nonsense that was taken, by the type that took it.
"""

from __future__ import annotations

import argparse
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

from oss_exp.cli import CONF, USER_ERRORS
from oss_exp.data.noise import NoiseData
from oss_exp.models.base import Model
from oss_exp.noise import NoiseSchedule
from oss_exp.stepsize.base import check_num_steps
from oss_exp.tasks import border
from oss_exp.tasks.configuration import check_configuration
from oss_exp.tasks.task import Task

VALUES = ("abc", "-1", "0", "1e30", "nan", "inf", "[]", "null", "{a: 1}", "1.5", "true", "[1,2]")
PSDENOISER = importlib.util.find_spec("psdenoiser") is not None
HERE = Path(__file__).resolve().parent
NEEDED = {  # by option, what it is composed with
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
NOT_BUILT = (
    "logger",
    "images",
    "evaluation",
    "metric",
    "task.detector",
)  # would read files or start something


class Outcome(NamedTuple):
    """What became of one value: `accepted`, `refused` (perhaps with its node named only), `fault`, and its message."""

    config: str
    key: str
    value: str
    kind: str
    message: str = ""


def options() -> list[str]:
    """Return every group/option of conf/ that a run can choose."""
    skipped = ("base", "hydra", "scale", "paths")
    return [
        f"{file.parent.name}/{file.stem}"
        for file in sorted(CONF.glob("*/*.yaml"))
        if file.parent.name not in skipped
    ]


@lru_cache(maxsize=1)
def composed(option: str) -> DictConfig:
    """Return the configuration of a run with this option; its models are small ones."""
    group, _, name = option.partition("/")
    needed = [*NEEDED_BY_GROUP.get(group, []), *NEEDED.get(option, []), "paths.output_dir=out"]
    chosen = f"detector@task.detector={name}" if group == "detector" else f"{group}={name}"
    cfg = compose("config", [*needed, chosen], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    OmegaConf.set_struct(cfg, False)
    del cfg.hydra
    if "sizes" in cfg.get("model", {}) and "tiny" in cfg.model.sizes:
        cfg.model.size = "tiny"
    elif "checkpoint" in cfg.get("model", {}) and cfg.model.checkpoint is not None:
        cfg.model.checkpoint = "untrained"
    return cfg


def keys_of(cfg: DictConfig, option: str) -> list[str]:
    """Return the keys of all values of an option, lists included; of a task, of the whole run but for other groups."""
    group, _, name = option.partition("/")
    plain: Any = OmegaConf.to_container(cfg)
    if group in ("task", "experiment"):
        groups = {path.name for path in CONF.iterdir()}
        chosen = {key: value for key, value in plain.items() if key == "task" or key not in groups}
        return list(_leaves(chosen, ""))
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


def tried(
    option: str, cfg: DictConfig, key: str, value: str, refusals: dict[tuple, Exception | None]
) -> Outcome:
    """Replace one value, check the configuration, and build what the value belongs to, once for each class.

    refusals: what came of building, by class, parameter and value, of all options.
    """
    changed = copy.deepcopy(cfg)
    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
        OmegaConf.update(changed, key, override.value(), merge=True)
        check_configuration(changed)
        same = (_owner(cfg, key), key.rpartition(".")[2], value)
        if refusals.get(same) is not None:
            return Outcome(option, key, value, "refused", str(refusals[same]))
        if same not in refusals:
            refusals[same] = None
            try:
                if not _build(changed, key):
                    del refusals[same]
                    return Outcome(option, key, value, "accepted, not built")
            except Exception as error:
                refusals[same] = error
                raise
    except USER_ERRORS as error:
        return Outcome(option, key, value, _kind(str(error), key), str(error))
    except Exception as error:
        return Outcome(option, key, value, "fault", f"{type(error).__name__}: {error}")
    return Outcome(option, key, value, "accepted")


def _kind(message: str, key: str) -> str:
    """Of a refusal: whether its message holds the key, or that of a node above and the parameter's name."""
    *above, name = key.split(".")
    nodes = [".".join(above[: end + 1]) for end in range(len(above))]
    if key in message or (
        name in message and any(re.search(rf"\b{re.escape(node)}\b", message) for node in nodes)
    ):
        return "refused"
    # Classes of other libraries often do not say which of their arguments they cannot take.
    return (
        "refused, its node named" if re.search(rf"\b{re.escape(nodes[-1])}\b", message) else "fault"
    )


def _owner(cfg: DictConfig, key: str) -> str:
    """The nearest _target_ above a key."""
    parts = key.split(".")[:-1]
    while parts:
        node = OmegaConf.select(cfg, ".".join(parts))
        if isinstance(node, DictConfig) and "_target_" in node:
            return str(node._target_)
        parts.pop()
    return "the run"


def _build(cfg: DictConfig, key: str) -> bool:
    """Build what a run builds of this part of its configuration; return whether it is built here."""
    if key.startswith(NOT_BUILT) or key.startswith("model.sizes.full."):
        return False
    part = key.split(".")[0]
    if (
        part == "model"
        and cfg.model.get("_target_") == "oss_exp.PSDenoiser.from_package"
        and not PSDENOISER
    ):
        return False
    if part == "model":
        border.build(cfg.model, "model", Model)
    elif part == "noise_schedule":
        border.build(cfg.noise_schedule, "noise_schedule", NoiseSchedule).nodes(
            cfg.num_teacher_steps
        )
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
    refusals: dict[tuple, Exception | None] = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for option in chosen:
            cfg = composed(option)
            for key in keys_of(cfg, option):
                for value in values:
                    yield tried(option, cfg, key, value, refusals)


def taker(outcome: Outcome) -> tuple[str, str]:
    """Return the words for the type that accepted a value, and the name of its parameter."""
    cfg = composed(outcome.config)
    owner, name = _owner(cfg, outcome.key), outcome.key.rpartition(".")[2]
    if owner == "the run" or name.startswith("_"):
        return "a value of the run", outcome.key
    kinds = border.parameters_of(border.class_of({"_target_": owner}, "")).kinds
    words = border.describe(kinds[name]) if name in kinds else "anything (part of a mapping)"
    return words, f"{owner.removeprefix('oss_exp.')}.{name}"


def report(accepted: list[Outcome]) -> str:
    """Return the table of what was accepted: the type, the values, how many parameters."""
    table: dict[str, dict[str, list[str]]] = defaultdict(dict)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words: dict[tuple[str, str], tuple[str, str]] = {}
        for outcome in accepted:
            place = (outcome.config, outcome.key)
            words[place] = words.get(place) or taker(outcome)
            kind, parameter = words[place]
            found = table[kind].setdefault(parameter, [])
            if outcome.value not in found:
                found.append(outcome.value)
    lines = ["| what the parameter takes | accepted | parameters | such as |", "|---|---|---|---|"]
    for kind in sorted(table):
        by_values: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for parameter, found in table[kind].items():
            by_values[tuple(found)].append(parameter)
        for found, parameters in sorted(by_values.items(), key=lambda item: -len(item[1])):
            shown = ", ".join(f"`{each}`" for each in found)
            lines.append(f"| {kind} | {shown} | {len(parameters)} | {', '.join(parameters[:4])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument(
        "--only", nargs="*", default=None, help="options such as solver/deis; all without"
    )
    chosen = arguments.parse_args().only or options()
    os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OSS_EXP_CACHE"] = folder
        os.chdir(folder)
        np.savez("conditions.npz", deltasq_realisations=np.zeros((16, 8), np.float32))
        for outcome in fuzz(chosen):
            outcomes.append(outcome)
            counts[outcome.kind] += 1
            if outcome.kind == "fault":
                print(
                    f"{outcome.config} {outcome.key}={outcome.value}: {outcome.message}", flush=True
                )
        text = report([each for each in outcomes if each.kind == "accepted"])
        unbuilt = report([each for each in outcomes if each.kind == "accepted, not built"])
    counted = f"{sum(counts.values())} tried, {', '.join(f'{counts[kind]} {kind}' for kind in sorted(counts))}"
    print(counted)
    (HERE / "accepted.md").write_text(f"{counted}\n\n{text}\nNot built here:\n\n{unbuilt}")


if __name__ == "__main__":
    main()
