"""Every reader of a record refuses broken content by the name of its file and field."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import mostly_slow

from oss_exp.calibration import Calibration
from oss_exp.data.prompts import read_prompts
from oss_exp.evaluation.statistics import Reference
from oss_exp.export.comfyui import comfyui_nodes
from oss_exp.export.diffusers import Diffusers
from oss_exp.export.reading import read_sigmas
from oss_exp.files import Provenance, load_asset, load_record, save_asset, sha256
from oss_exp.geneval.rules import read_metadata
from oss_exp.models.checkpoints.weights import read
from oss_exp.models.families.mixture import MixtureProvenance
from oss_exp.models.stages import StageFolder, StageRecord
from oss_exp.report.records import (
    read_amplitude,
    read_finetuning,
    read_geneval,
    read_metrics,
    read_training,
)
from oss_exp.reproduce.older_cells import read_cell
from oss_exp.schedule import StepSchedule

HASH = "0" * 64
WISH = {
    "tag": "position",
    "include": [
        {"class": "car", "count": 1},
        {"class": "bus", "count": 1, "color": "red", "position": ["above", 0]},
    ],
    "exclude": [{"class": "car", "count": 2}],
    "prompt": "a red bus above a car",
}
INTERVAL = {"mean": 1.0, "low": None, "high": 2.0, "n": 1}
ROW = {
    "strategy": "oss",
    "num_steps": 2,
    "nfe": 2,
    "baseline": False,
    "start": "free",
    "schedule": "schedules/oss_2.json",
    "planning": {"network_calls_per_sample": 9.0, "seconds": 1},
    "psnr": INTERVAL,
    "spread": INTERVAL,
    "metrics": {"fid": 1.5},
    "per_image": {"index": [7], "psnr": [1.0]},
}
TRAINING = {
    "steps": 2,
    "losses": [1.0, 0.5],
    "loss_before": 1.0,
    "loss_after": 0.5,
    "seconds": 1.5,
    "peak_bytes": 9,
}
STAGE = {
    "sha256": HASH,
    "stage": 0,
    "times": [1.0, 0.0],
    "steps": 2,
    "parameters": 5,
    "training": TRAINING,
}
CURVE = {
    "num_steps": 2,
    "calibrated": False,
    "times": [1.0, 0.0],
    "low": [[0.0], [1.0]],
    "high": [1.0, 2.0],
}
VERDICT = {"number": 0, "reasons": ["none"], "objects": {"car": [[0.0, 0.0, 1.0, 1.0, 0.5]]}}


class Reader(NamedTuple):
    """A file's name, valid content, and the function that reads it from its path."""

    file: str
    valid: Any
    read: Callable[[Path], Any]


def asset(form: type[Provenance]) -> Callable[[Path], Any]:
    """Return the reader of an asset with provenance of this form."""
    return lambda path: load_asset(path.with_suffix(".safetensors"), "asset", form)


READERS = {
    "amplitude": Reader(
        "amplitude.json",
        {"curves": [{"strategy": "teacher", **CURVE}, {"strategy": "oss", **CURVE}]},
        lambda path: read_amplitude(path.parent),
    ),
    "asset": Reader(
        "x.json", {"file": "x.safetensors", "sha256": HASH, "seed": 3}, asset(Provenance)
    ),
    "calibration": Reader(
        "x.json",
        {
            "format": "oss_exp/calibration",
            "version": 1,
            "quantiles": [0.05, 0.95],
            "last_step_only": False,
            "times": [1.0, 0.5, 0.0],
            "low": [0.0, 0.0, 0.0],
            "high": [1.0, 1.0, 1.0],
            "provenance": {"model": {"name": "m"}},
        },
        Calibration.load,
    ),
    "captions": Reader("x.json", {"annotations": [{"image_id": 1, "caption": "a"}]}, read_prompts),
    "cell": Reader(
        "cell.json",
        {"overrides": ["a=1"], "packages": {"torch": "2"}, "seconds": 3},
        lambda path: read_cell(path.parent),
    ),
    "finetuning": Reader(
        "finetune.json",
        {"name": "m", "sha256": HASH, "stages": [STAGE]},
        lambda path: read_finetuning(path.parent),
    ),
    "GenEval's metadata": Reader("x.jsonl", WISH, read_metadata),
    "GenEval's results": Reader(
        "geneval.json",
        {
            "prompts": [WISH],
            "images_per_prompt": 1,
            "rows": [{"label": "teacher", "num_steps": 2, "nfe": 2, "verdicts": [VERDICT]}],
        },
        lambda path: read_geneval(path.parent),
    ),
    "index of shards": Reader(
        "x.index.json", {"metadata": {}, "weight_map": {"w": "w.safetensors"}}, read
    ),
    "metrics": Reader(
        "metrics.json",
        {
            "model": {"name": "m", "sha256": HASH},
            "teacher": {"noise_schedule": {"shift": 1.0}, "num_steps": 20},
            "solver": {"order": 1},
            "seed": 0,
            "teacher_metrics": {"fid": 1.0},
            "rows": [ROW],
        },
        lambda path: read_metrics(path.parent),
    ),
    "mixture": Reader(
        "x.json",
        {"sha256": HASH, "name": "m", "event_shape": [1, 2], "by": None},
        asset(MixtureProvenance),
    ),
    "prompts": Reader("x.jsonl", {"prompt": "a"}, read_prompts),
    "scheduler": Reader(
        "scheduler_config.json",
        {
            "_class_name": "EulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "beta_start": 0.0001,
        },
        lambda path: Diffusers(scheduler=str(path)).own_scheduler(),
    ),
    "sigmas": Reader("x.json", comfyui_nodes([1.0, 0.5, 0.0]), lambda path: read_sigmas(str(path))),
    "stage": Reader(
        "stage_0.json", STAGE, lambda path: load_record(path, StageRecord, "record of a stage")
    ),
    "stages": Reader(
        "stages.json",
        {
            "format": "oss_exp/stages",
            "version": 1,
            "base": {"name": "m", "sha256": HASH},
            "cuts": [0.7, 0.3],
        },
        lambda path: StageFolder.load(path.parent),
    ),
    "step schedule": Reader(
        "x.json",
        {
            "format": "oss_exp/step_schedule",
            "version": 3,
            "times": [1.0, 0.5, 0.0],
            "samples": None,
            "start": {"kind": "free", "start_time": 1.0},
            "steps": {"kind": "solver", "orders": [1, 2]},
            "provenance": {"seed": 0},
        },
        StepSchedule.load,
    ),
    "step schedule of version 2": Reader(
        "x.json",
        {
            "format": "oss_exp/step_schedule",
            "version": 2,
            "num_steps": 2,
            "start": "free",
            "start_time": 1.0,
            "times": [1.0, 0.5, 0.0],
            "orders": [1, 2],
            "weights": None,
            "samples": None,
            "mean": None,
            "provenance": {"seed": 0},
        },
        StepSchedule.load,
    ),
    "training": Reader(
        "training.json", {"seed": 0, "losses": [1.0, 0.5]}, lambda path: read_training(path.parent)
    ),
}


def written(reader: Reader, folder: Path, content: bytes) -> Path:
    """Write the record beside valid tensors and shards, and return its path."""
    tensors = folder / "x.safetensors"
    shard = folder / "w.safetensors"
    if not tensors.exists():
        save_asset(tensors, {"x": torch.ones(1)}, {})
        safetensors.torch.save_file({"w": torch.ones(1)}, shard)
    path = folder / reader.file
    path.write_bytes(content.replace(HASH.encode(), sha256(tensors.read_bytes()).encode()))
    return path


def as_json(value: Any) -> bytes:
    """Return the value as JSON."""
    return json.dumps(value).encode()


@pytest.mark.parametrize("name", READERS)
def test_a_valid_record_is_read(name, tmp_path):
    reader = READERS[name]
    reader.read(written(reader, tmp_path, as_json(reader.valid)))


LONG = "x" * 5_000_000
BROKEN = {
    "empty": b"",
    "blank": b" \n\n",
    "cut short": b'{"version": 1, "tim',
    "no JSON": b"{'version': 1}",
    "two objects": b'{"version": 1} {"version": 1}',
    "null": b"null",
    "text": b'"text"',
    "number": b"3",
    "list": b'[{"version": 1}]',
    "deep lists": b'{"version": ' + b"[" * 100_000,
    "deep objects": b'{"version": ' * 100_000,
    "no UTF-8": b'{"version": "\xff\xfe"}',
    "UTF-16": '{"version": 1}'.encode("utf-16"),
    "half a character": b'{"version": "\\ud800"}',
    "null bytes": bytes(100),
    "too large": b'{"version": "' + b"x" * (17 << 20),
    "no fields": b"{}",
    "long text": as_json({"format": LONG, "version": 1, "annotations": LONG, "curves": LONG}),
    "long name": as_json({LONG: 1}),
    "huge number": b'{"version": ' + b"9" * 5000 + b"}",
    "not finite": b'{"version": NaN, "format": 1e999}',
}


# Other contents may be lists of sigmas.
BROKEN_SIGMAS = [kind for kind, content in BROKEN.items() if content.lstrip()[:1] == b"{"]
EVERY = []
for name in READERS:
    EVERY += [(name, kind) for kind in (BROKEN_SIGMAS if name == "sigmas" else BROKEN)]


@pytest.mark.parametrize(("name", "kind"), mostly_slow(EVERY, *EVERY[::7]))
def test_broken_content_is_refused_by_the_name_of_its_file(name, kind, tmp_path):
    reader = READERS[name]
    path = written(reader, tmp_path, BROKEN[kind])
    with pytest.raises(ValueError) as caught:
        reader.read(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < 500 + 2 * len(str(path))


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_not_there_is_named(name, tmp_path):
    reader = READERS[name]
    path = written(reader, tmp_path, b"{}")
    path.unlink()
    if name in ("scheduler", "index of shards"):
        return  # they may be names of a class and of a hub's repository
    with pytest.raises(FileNotFoundError, match=path.name):
        reader.read(path)


def places(value: Any, above: tuple = ()) -> Iterator[tuple]:
    """Yield the keys that lead to the whole and to everything inside."""
    yield above
    items = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from places(inner, (*above, key))


def replaced(value: Any, place: tuple, new: Any) -> Any:
    """Return a copy of the value with another one at this place."""
    if not place:
        return new
    value = copy.deepcopy(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return value


def refusal(reader: Reader, path: Path) -> str:
    """Return the message of the refusal, empty if the file is accepted."""
    try:
        reader.read(path)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return ""


NONSENSE = [
    None,
    True,
    -1,
    0,
    1.5,
    1e30,
    10**400,
    float("nan"),
    float("inf"),
    "abc",
    "",
    [],
    {},
    [[1]],
    {"a": [None]},
]


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_nonsense_in_any_field_is_accepted_or_refused_by_name(name, tmp_path):
    reader = READERS[name]
    refused = 0
    for place in places(reader.valid):
        for value in NONSENSE:
            path = written(reader, tmp_path, as_json(replaced(reader.valid, place, value)))
            if message := refusal(reader, path):
                refused += 1
                assert (
                    path.name in message or ".safetensors" in message
                )  # or the file that it names
                assert len(message) < 500 + 2 * len(str(path))

    assert refused


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("config", "scheduler")])
def test_the_field_that_is_wrong_is_named(name, tmp_path):
    """With an object in place of its value."""
    reader = READERS[name]
    named = 0
    for place in filter(None, places(reader.valid)):
        path = written(reader, tmp_path, as_json(replaced(reader.valid, place, {"odd": [{}]})))
        message = refusal(reader, path)
        named += f"`{'.'.join(map(str, place))}`" in message
        assert not message or f"`{place[0]}" in message or "has no node ManualSigmas" in message

    assert named


@pytest.mark.parametrize(
    "change",
    [
        {"mu": np.array(["a", "b"])},
        {"mu": np.zeros(2, complex)},
        {"mu": np.zeros(2, bool)},
        {"sigma": np.zeros((2, 2), "datetime64[s]")},
        {"sigma": np.array(1.0)},
        {"features": np.full((3, 2), np.nan, np.float16)},
        {"features": np.zeros((3, 2), "S3")},
        {"n": np.array([3, 4])},
        {"n": np.array(2.5)},
        {"channels": np.array("three")},
        {"extractor": np.array(3)},
        {"extractor": np.array(["a", "b"])},
    ],
    ids=lambda change: next(f"{key} {value.dtype} {value.shape}" for key, value in change.items()),
)
def test_arrays_of_other_kinds_are_refused_as_statistics(change, tmp_path):
    whole = {
        "mu": np.zeros(2),
        "sigma": np.eye(2),
        "n": 3,
        "channels": 3,
        "extractor": "x",
        "features": np.zeros((3, 2)),
    }
    np.savez(tmp_path / "whole.npz", **whole)
    Reference.load(tmp_path / "whole.npz")
    np.savez(tmp_path / "x.npz", **{**whole, **change})

    words = rf"x\.npz: {next(iter(change))} (must be|has)|x\.npz: mu must be \(F,\)"
    with pytest.raises(ValueError, match=words):
        Reference.load(tmp_path / "x.npz")
