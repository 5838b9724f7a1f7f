"""Files that try to run code, to write elsewhere or to fill the memory, for every reader.

A case is made in a folder of its own and then read. Beside that folder lies `outside`, with a
secret that must not be read and where nothing may appear.
"""

from __future__ import annotations

import copy
import gzip
import io
import itertools
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import oss_exp
from oss_exp.calibration import Calibration
from oss_exp.data.conditions import read_array
from oss_exp.data.prompts import read_prompts
from oss_exp.evaluation.classifier import FashionFeatures
from oss_exp.evaluation.features import load_weights
from oss_exp.evaluation.statistics import Reference
from oss_exp.export.diffusers import Diffusers
from oss_exp.export.oss_scheduler import OSSScheduler
from oss_exp.export.reading import read_list
from oss_exp.files import load_config, sha256
from oss_exp.geneval.rules import read_metadata
from oss_exp.models.checkpoints.weights import locate, read
from oss_exp.models.families.mixture import GaussianMixture
from oss_exp.models.stages import StageFolder, StageParameters
from oss_exp.report import write
from oss_exp.report.page import gather
from oss_exp.reproduce.older_cells import older_cell
from oss_exp.schedule import StepSchedule

MARK = "executed"  # the file that a payload leaves in `outside`
HASH = "0" * 64

Maker = Callable[[Path], Path]  # writes files into a folder, and returns what is read
Cases = Iterator[tuple[str, Maker, bool]]  # the name, the maker, whether it is large


@dataclass(frozen=True)
class Case:
    """A file or a folder for a reader.

    Attributes:
        reader: Key of READERS.
        name: What is hostile about it.
        make: Writes the files into a folder, and returns what is read.
        large: Whether it takes a second, or much disk or memory.
    """

    reader: str
    name: str
    make: Maker
    large: bool = False


# --------------------------------------------------------------------------------------------------
# Payloads
# --------------------------------------------------------------------------------------------------


class Command:
    """An object that runs a command when it is unpickled."""

    def __init__(self, name: str = "system"):
        self.name = name

    def __reduce__(self) -> Any:
        if self.name == "eval":
            return eval, (f"open({str(mark())!r}, 'w')",)
        return os.system, (f"touch {mark()}",)


class Program(nn.Module):
    """A module that writes a file as soon as its archive is opened."""

    def __init__(self, file: str):
        super().__init__()
        self.file = file

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.file, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.file, self.training = state
        torch.save(torch.ones(1), self.file)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def write_program(path: Path, written: Path) -> None:
    """Save a TorchScript archive that writes a file as soon as it is opened."""
    torch.jit.script(Program(str(written))).save(path)


def mark() -> Path:
    """Return the file that a payload writes, seen from the folder of a case."""
    return Path.cwd().parent / "outside" / MARK


def pickled(value: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol)


def torch_file(value: Any, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def tensors(**values: torch.Tensor) -> bytes:
    return safetensors.torch.save(values)


def header(entries: Any, data: bytes = b"") -> bytes:
    """Return a safetensors file with this header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def npz(compressed: bool = True, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def npy(shape: str, dtype: str = "|u1", data: bytes = b"") -> bytes:
    """Return an array file with this shape and dtype in its header."""
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}}}\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


def zipped(**parts: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@cache
def zip_bomb(name: str, first: bytes, gigabytes: int) -> bytes:
    """Return a zip file of some megabytes with a part of many gigabytes of zeros."""
    buffer = io.BytesIO()
    block = bytes(1 << 26)
    archive = zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open(name, "w", force_zip64=True) as part:
        part.write(first)
        for _ in range(gigabytes << 4):
            part.write(block)
    return buffer.getvalue()


@cache
def gzip_bomb(gigabytes: int) -> bytes:
    buffer = io.BytesIO()
    block = bytes(1 << 26)
    with gzip.open(buffer, "wb", compresslevel=1) as file:
        for _ in range(gigabytes << 4):
            file.write(block)
    return buffer.getvalue()


def bombs() -> dict[str, Callable[[], bytes]]:
    """Return the functions that make the bombs, in seconds at their first call."""
    return {
        "pictures": lambda: zip_bomb("teacher.npy", npy("(1073741824, 2, 2, 1)"), 4),
        "numbers": lambda: zip_bomb("mu.npy", npy("(536870912,)", "<f8"), 4),
        "tensors": lambda: zip_bomb("x/data/0", b"", 4),
        "images": lambda: gzip_bomb(4),
    }


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    """Return a PNG with this size in its header."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND", b"")


def picture(size: tuple[int, int] = (4, 4), form: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, form, **options)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------
# How files are made
# --------------------------------------------------------------------------------------------------


def put(name: str, content: bytes | str | Callable[[], bytes]) -> Maker:
    """Return a maker of a file with this content, which is computed when it is needed."""

    def make(folder: Path) -> Path:
        path = _place(folder, name)
        data = content() if callable(content) else content
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    return make


def link(name: str, target: str) -> Maker:
    def make(folder: Path) -> Path:
        path = _place(folder, name)
        path.symlink_to(target)
        return path

    return make


def pipe(name: str) -> Maker:
    def make(folder: Path) -> Path:
        path = _place(folder, name)
        os.mkfifo(path)
        return path

    return make


def directory(name: str) -> Maker:
    def make(folder: Path) -> Path:
        (folder / name).mkdir(parents=True)
        return folder / name

    return make


def sparse(name: str, size: int) -> Maker:
    """Return a maker of a file of zeros that takes no room on the disk."""

    def make(folder: Path) -> Path:
        path = _place(folder, name)
        with path.open("wb") as file:
            file.truncate(size)
        return path

    return make


def _place(folder: Path, name: str) -> Path:
    """Return the path of a new file, whose parents are made."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def strange(name: str) -> dict[str, Maker]:
    """Return makers of things that are no ordinary file."""
    return {
        "a pipe": pipe(name),
        "a folder": directory(name),
        "a link to the end of the memory": link(name, "/dev/zero"),
        "a link to itself": link(name, name),
        "a link to a secret": link(name, "../outside/secret.txt"),
        "40 GiB of zeros": sparse(name, 40 << 30),
        "nothing": put(name, b""),
    }


def broken_json(name: str) -> dict[str, Maker]:
    return {
        "a million levels": put(name, lambda: b'{"a":' * 1_000_000),
        "a million brackets": put(name, lambda: b"[" * 1_000_000),
        "a number of a million digits": put(name, lambda: b'{"version":' + b"9" * 1_000_000 + b"}"),
        "a name of 10 MB": put(name, lambda: b'{"' + b"x" * 10_000_000 + b'":1}'),
        "half a character": put(name, b'{"a":"\\ud800"}'),
        "control characters": put(name, '{"\\u001b[31m\\u0007": "\\u001b]0;owned\\u0007"}'),
        "another encoding": put(name, '{"a": 1}'.encode("utf-16")),
        "a pickle": put(name, lambda: pickled(Command())),
    }


def many_json(name: str) -> dict[str, Maker]:
    contents = {
        "40 million empty objects": lambda: b'{"times":[' + b"{}," * 40_000_000 + b"{}]}",
        "60 million numbers": lambda: b'{"times":[' + b"1," * 60_000_000 + b"0]}",
        "a million fields": lambda: as_json({f"f{i}": [] for i in range(1_000_000)}).encode(),
        "30 million texts": lambda: b'{"times":[' + b'"",' * 30_000_000 + b'""]}',
    }
    return {title: put(name, content) for title, content in contents.items()}


# No strategy, model or label may have one of these names.
NAMES = [
    "../../outside/executed",
    "..",
    "/tmp/executed",
    "a/b",
    "a\\b",
    "C:\\executed",
    "a\x00b",
    "\x1b[2J\x1b]0;owned\x07",
    "a\nb",
    "a\u202eb",
    "",
    "x" * 100_000,
]

# --------------------------------------------------------------------------------------------------
# Valid records, which the cases change in one place
# --------------------------------------------------------------------------------------------------

SCHEDULE: dict[str, Any] = {
    "format": "oss_exp/step_schedule",
    "version": 3,
    "times": [1.0, 0.5, 0.0],
    "samples": None,
    "start": {"kind": "free", "start_time": 1.0},
    "steps": {"kind": "solver", "orders": [1, 2]},
    "provenance": {"model": {"name": "m"}, "strategy": {"name": "s", "baseline": False}},
}
INTERVAL = {"mean": 1.0, "low": 0.5, "high": 1.5, "n": 3}
ROW: dict[str, Any] = {
    "strategy": "s",
    "num_steps": 2,
    "nfe": 2,
    "baseline": False,
    "start": "free",
    "planning": {},
    "psnr": INTERVAL,
    "spread": INTERVAL,
    "metrics": {},
    "per_image": {"index": [0, 1, 2], "psnr": [1.0, 2.0, 3.0]},
}
METRICS: dict[str, Any] = {
    "model": {"name": "m"},
    "teacher": {"noise_schedule": {}, "num_steps": 4},
    "solver": {},
    "seed": 0,
    "teacher_metrics": {},
    "rows": [ROW],
}
CALIBRATION: dict[str, Any] = {
    "format": "oss_exp/calibration",
    "version": 1,
    "quantiles": [0.05, 0.95],
    "last_step_only": False,
    "times": [1.0, 0.5, 0.0],
    "low": [-1.0, -1.0, -1.0],
    "high": [1.0, 1.0, 1.0],
    "provenance": {},
}
CURVE = {
    "num_steps": 2,
    "calibrated": False,
    "times": [1.0, 0.0],
    "low": [-1.0, -1.0],
    "high": [1.0, 1.0],
}
WISH = {
    "tag": "colors",
    "include": [{"class": "dress", "count": 1, "color": "red"}],
    "prompt": "a red dress",
}
VERDICT = {"number": 0, "reasons": [], "objects": {}}
GENEVAL: dict[str, Any] = {
    "prompts": [WISH],
    "images_per_prompt": 1,
    "rows": [
        {"label": label, "num_steps": 2, "verdicts": [VERDICT]} for label in ("teacher", "s_2")
    ],
}
STAGES: dict[str, Any] = {
    "format": "oss_exp/stages",
    "version": 1,
    "base": {"name": "m", "sha256": HASH},
    "cuts": [0.5],
}
PICTURES = {name: np.zeros((2, 4, 4, 1), np.uint8) for name in ("teacher", "s K=2")}


def changed(record: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """Return a copy with another value at a place such as rows.0.strategy."""
    record = copy.deepcopy(record)
    *above, last = (int(part) if part.isdigit() else part for part in place.split("."))
    inner: Any = record
    for part in above:
        inner = inner[part]
    inner[last] = value
    return record


def as_json(record: Any) -> str:
    return json.dumps(record)


def run_folder(*others: Maker, without: tuple[str, ...] = (), **records: Any) -> Maker:
    """Return a maker of a finished run.

    Args:
        others: Makers of files that take the place of the run's own.
        without: Files and folders that are deleted.
        records: Contents by the name of the file without .json.
    """

    def make(folder: Path) -> Path:
        run = folder / "sweep" / "0"
        _write_run(run, records)

        # Delete.
        for name in without:
            _delete(run / name)

        # Replace.
        for other in others:
            path = other(folder / "made")
            target = _place(run, str(path.relative_to(folder / "made")))
            _delete(target)
            os.rename(path, target)
        return run

    return make


def _write_run(run: Path, records: dict[str, Any]) -> None:
    """Write the files of a finished run, some of them with other records."""
    contents = {
        "metrics": METRICS,
        "schedules/s_2": SCHEDULE,
        "teacher": {"times": [1.0, 0.5, 0.0]},
        **records,
    }
    for name, record in contents.items():
        if record is not None:
            put(f"{name}.json", as_json(record))(run)
    put("config.yaml", "num_teacher_steps: 4\n")(run)
    put("samples.npz", lambda: npz(**PICTURES))(run)


def _delete(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


# --------------------------------------------------------------------------------------------------
# The cases of each reader
# --------------------------------------------------------------------------------------------------


def schedules() -> Cases:
    # Names.
    for place in ("strategy", "model"):
        for number, name in enumerate(NAMES):
            make = _changed_schedule(f"provenance.{place}.name", name)
            yield f"the {place}'s name, {number}", make, False
    names = ["../outside/secret.txt", "..", "/etc/passwd", "a\x00b", "x" * 5000, "\x1b[31m"]
    for number, name in enumerate(names):
        start = {"kind": "analytic", "start_time": 1.0, "mean": {"file": name, "sha256": HASH}}
        yield f"the name of its mean, {number}", _changed_schedule("start", start), False

    # Values.
    weights = {"kind": "fitted", "weights": [[1.0], []], "mean": {"file": "m"}}
    command = {"_target_": "os.system", "command": f"touch {MARK}"}
    changes = {
        "a name that is a list": ("provenance.strategy.name", [["x"]]),
        "a planning that is text": ("provenance.planning", {"cost_per_round": "x", "seconds": "x"}),
        "20,000 times": ("times", [1 - i / 20_000 for i in range(20_001)]),
        "times of different lengths": ("times", [[1.0, 0.0], [1.0, 0.5, 0.0]]),
        "times that are not finite": ("times", [float("nan"), float("inf")]),
        "an order of 400 digits": ("steps.orders", [1, 10**400]),
        "an order of 20 digits": ("steps.orders", [1, 10**20]),
        "a sample of 30 digits": ("samples", [10**30]),
        "weights of different lengths": ("steps", weights),
        "a class as its solver": ("provenance.solver", command),
    }
    for title, (place, value) in changes.items():
        yield title, _changed_schedule(place, value), False

    # Means.
    for title, data in means().items():
        yield f"a mean: {title}", _with_mean(data), title.startswith("large")


def _changed_schedule(place: str, value: Any) -> Maker:
    return put("x.json", as_json(changed(SCHEDULE, place, value)))


def means() -> dict[str, Callable[[], bytes]]:
    """Return contents that are no proper safetensors files."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}

    def with_entry(size: int = 4, **changes: Any) -> Callable[[], bytes]:
        return lambda: header({"mean": {**entry, **changes}}, bytes(size))

    return {
        "a pickle": lambda: pickled({"mean": Command()}),
        "a torch file": lambda: torch_file({"mean": Command()}),
        "a header of 2^63 bytes": lambda: struct.pack("<Q", 1 << 63) + b"{}",
        "a header of a gigabyte": lambda: struct.pack("<Q", 1 << 30) + b"{}",
        "deep": lambda: header(b'{"mean":' * 100_000),
        "a shape of 2^80": with_entry(shape=[1 << 40, 1 << 40]),
        "negative offsets": with_entry(data_offsets=[-4, 0]),
        "overlapping": lambda: header({"mean": entry, "other": entry}, bytes(4)),
        "past the end": with_entry(shape=[1000], data_offsets=[0, 4000]),
        "an unknown dtype": with_entry(dtype="os.system"),
        "no mean": lambda: tensors(other=torch.ones(1)),
        "not finite": lambda: tensors(mean=torch.tensor([float("nan")])),
        "large: half a million tensors": lambda: header({f"t{i}": empty for i in range(500_000)}),
        "large: a gigabyte and more": with_entry((1 << 30) + 4, shape=[1]),
    }


def _with_mean(data: Callable[[], bytes]) -> Maker:
    """Return a maker of a schedule with this file as its mean."""

    def make(folder: Path) -> Path:
        content = data()
        put("m.safetensors", content)(folder)
        mean = {
            "kind": "analytic",
            "start_time": 1.0,
            "mean": {"file": "m.safetensors", "sha256": sha256(content)},
        }
        return put("x.json", as_json(changed(SCHEDULE, "start", mean)))(folder)

    return make


# Every line repeats the one before nine times.
ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n"
for above, name in itertools.pairwise("abcdefghi"):
    ALIASES += f"{name}: &{name} [{','.join(['*' + above] * 9)}]\n"

CONFIGS = {
    "an object of Python": "a: !!python/object/apply:os.system ['touch ../outside/executed']\n",
    "a name of Python": "a: !!python/name:os.system\n",
    "a class that is called": (
        "noise_schedule: {_target_: os.system, command: touch ../outside/executed}\n"
    ),
    "a class of ours that reads": (
        "noise_schedule: {_target_: oss_exp.Reference.load, path: ../outside/secret.txt}\n"
    ),
    "the environment": "num_teacher_steps: ${oc.env:HOME}\nmodel: ${oc.decode:'[1]'}\n",
    "an interpolation of itself": "a: ${b}\nb: ${a}\n",
    "an interpolation that is none": "a: '${oc.env:'\n",
    "aliases that multiply": ALIASES,
    "an alias of itself": "a: &a [*a]\n",
    "deep lists": "a: " + "[" * 10_000,
    "deep mappings": "".join(f"{' ' * i}a:\n" for i in range(400)),
    "a list": "- 1\n",
    "text": "x",
    "nothing": "",
    "a number of a million digits": "a: " + "9" * 1_000_000,
    "10 MB": "a: " + "x" * 10_000_000,
    "control characters": 'a: "\\e[31m"\n',
    "bytes": b"\xff\xfe\x00",
    "a task that is a list": "task: [1]\nevaluation: 3\nmodel: [x]\n",
    "metrics that are mappings": "evaluation: {metrics: [{a: 1}]}\n",
}
RUN_FILES = (
    "config.yaml",
    "metrics.json",
    "teacher.json",
    "samples.npz",
    "trajectories.npz",
    "schedules/s_2.json",
)
RECORD_FILES = (
    "metrics.json",
    "teacher.json",
    "training.json",
    "amplitude.json",
    "finetune.json",
    "geneval.json",
)


def run_folders() -> Cases:
    yield from _folders_with_broken_files()
    yield from _folders_with_names()
    yield from _folders_with_pictures()
    yield from _folders_with_many()

    # Others.
    elsewhere = link("schedules", "../../../outside")
    yield "schedules elsewhere", run_folder(elsewhere, without=("schedules",)), False
    yield "the teacher's times rise", run_folder(teacher={"times": [0.0, 1.0]}), False
    geneval = changed(GENEVAL, "images_per_prompt", 10**30)
    yield "a picture count of 10^30", run_folder(geneval=geneval), False


def _folders_with_broken_files() -> Cases:
    for title, text in CONFIGS.items():
        yield f"config.yaml: {title}", run_folder(put("config.yaml", text)), False
    for file in RUN_FILES:
        for title, make in strange(file).items():
            yield f"{file}: {title}", run_folder(make), False
    for file in RECORD_FILES:
        for title, make in broken_json(file).items():
            yield f"{file}: {title}", run_folder(make), False
    for title, make in many_json("metrics.json").items():
        yield f"metrics.json: {title}", run_folder(make), True


def _folders_with_names() -> Cases:
    for number, name in enumerate(NAMES):
        metrics = changed(METRICS, "rows.0.strategy", name)
        yield f"the strategy of a row, {number}", run_folder(metrics=metrics), False
        metrics = changed(METRICS, "model.name", name)
        yield f"the model's name, {number}", run_folder(metrics=metrics), False
        metrics = changed(METRICS, "rows.0.metrics", {name: 1.0})
        yield f"a metric's name, {number}", run_folder(metrics=metrics), False
        geneval = changed(GENEVAL, "rows.1.label", name)
        yield f"a label of GenEval, {number}", run_folder(geneval=geneval), False


def _folders_with_pictures() -> Cases:
    for title, data in arrays().items():
        for file in ("samples.npz", "trajectories.npz"):
            make = run_folder(put(file, data))
            yield f"{file}: {title}", make, title.startswith("large")
    file = "images/teacher/000000.png"
    for title, data in images().items():
        make = run_folder(put(file, data), geneval=GENEVAL)
        yield f"a picture of GenEval: {title}", make, False
    make = run_folder(link(file, "../../../../../outside/secret.png"), geneval=GENEVAL)
    yield "a picture of GenEval: a link to a secret", make, False


def _folders_with_many() -> Cases:
    yield "2,000 schedules", run_folder(_copies), False
    yield "a million times of the teacher", run_folder(teacher={"times": [0.5] * 1_000_000}), False
    yield "half a million losses", run_folder(training={"losses": [1.0] * 500_000}), True

    # Curves.
    curves = [{"strategy": f"s{i}", **CURVE} for i in range(400)]
    amplitude = {"curves": [{"strategy": "teacher", **CURVE}, *curves]}
    yield "400 curves", run_folder(amplitude=amplitude), True

    # Rows.
    rows = []
    for i in range(900):
        rows.append({**ROW, "strategy": f"s{i}", "num_steps": i})
    yield "900 rows", run_folder(metrics=changed(METRICS, "rows", rows)), True


def _copies(folder: Path) -> Path:
    for number in range(2000):
        put(f"schedules/s_{number}.json", as_json(SCHEDULE))(folder)
    return folder / "schedules"


def sweeps() -> Cases:
    def failing(make_error: Maker) -> Maker:
        def make(folder: Path) -> Path:
            run_folder()(folder)
            make_error(folder / "sweep" / "1")
            return folder / "sweep"

        return make

    for title, make in strange("error.log").items():
        yield f"error.log: {title}", failing(make), False
    text = "\x1b]0;owned\x07 [bold]x | <script>\n"
    yield "error.log: control characters", failing(put("error.log", text)), False
    yield "error.log: a line of 50 MB", failing(put("error.log", lambda: b"x" * 50_000_000)), False
    yield "a folder in itself", failing(link("loop", "..")), False


def resumed() -> Cases:
    for title, text in CONFIGS.items():
        yield title, put("config.yaml", text), False
    for title, make in strange("config.yaml").items():
        yield title, make, False


def cells() -> Cases:
    for title, text in CONFIGS.items():

        def make(folder: Path, text: str | bytes = text) -> Path:
            put("cells/0123/config.yaml", text)(folder)
            cell = {
                "overrides": [],
                "parent": "../../outside",
                "files": {"../x": HASH},
                "packages": {},
            }
            put("cells/0123/cell.json", as_json(cell))(folder)
            return folder / "cells"

        yield title, make, False


def calibrations() -> Cases:
    changes = {
        "provenance": {"model": [1]},
        "times": [[1.0]],
        "low": [[1.0], [1.0, 2.0], []],
        "high": [1e308, -1e308, 10**400],
        "quantiles": ["__import__"],
    }
    for field, value in changes.items():
        yield field, put("x.json", as_json(changed(CALIBRATION, field, value))), False


def arrays() -> dict[str, bytes | Callable[[], bytes]]:
    """Return files for all readers of .npz."""
    objects = np.array([Command()], dtype=object)
    pickles = {"teacher": objects, "mu": objects, "x": objects, "x0/teacher": objects}
    small = np.zeros((2, 4, 4, 1), np.uint8)
    tall = np.zeros((2, 9, 4, 1), np.uint8)

    # Headers of one array, or of many.
    def headers(**shapes: str) -> Callable[[], bytes]:
        return lambda: zipped(**{f"{name}.npy": npy(shape) for name, shape in shapes.items()})

    huge = "(1152921504606846976,)"
    code = "__import__('os').system('true')"
    outside = {"../../outside/executed.npy": npy("(1,)", data=b"0")}
    wrong_checksum = npz(compressed=False, **PICTURES).replace(b"\0" * 32, b"\1" * 32, 1)
    return {
        "a pickled object": lambda: npz(**pickles),
        "a pickle": lambda: pickled(Command()),
        "one array alone": lambda: npy("(1,)", data=b"0"),
        "a header that is code": headers(teacher=code),
        "a header of 60,000 digits": headers(mu=f"({'9' * 60_000},)"),
        "a shape of 2^60": headers(teacher=huge, mu=huge),
        "a negative shape": headers(teacher="(-1, 4)", mu="(-1, 4)"),
        "texts of a gigabyte": lambda: zipped(**{"mu.npy": npy("(1,)", "<U268435456")}),
        "a name with ..": lambda: zipped(**outside),
        "20,000 arrays": lambda: zipped(**{f"a{i}.npy": npy("(0,)") for i in range(20_000)}),
        "a cut zip": lambda: npz(**PICTURES)[:-30],
        "a wrong checksum": wrong_checksum,
        "other pictures than the teacher's": lambda: npz(**PICTURES | {"s K=2": tall}),
        "pictures of numbers": lambda: npz(teacher=np.zeros((2, 4, 4, 1))),
        "pictures of nothing": lambda: npz(teacher=np.zeros((0, 4, 4, 1), np.uint8)),
        "pictures in six dimensions": lambda: npz(teacher=np.zeros((1,) * 6, np.uint8)),
        "no teacher": lambda: npz(other=small),
        "large: 4 GiB of zeros": bombs()["pictures"],
        "large: 4 GiB of numbers": bombs()["numbers"],
    }


def images() -> dict[str, bytes | Callable[[], bytes]]:
    """Return files for all readers of pictures."""
    script = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
        b"(x) (w) file closefile\n"
    )
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    return {
        "60,000 x 60,000 pixels": png_of(60_000, 60_000),
        "2^31 x 1 pixels": png_of(2**31 - 1, 1),
        "12,000 x 12,000 pixels": lambda: png_of(12_000, 12_000, bytes(12_000 * 36_001)),
        "cut": lambda: picture((64, 64))[:60],
        "no picture": b"touch executed",
        "a pickle": lambda: pickled(Command()),
        "PostScript": script,
        "SVG": svg,
        "nothing": b"",
    }


def statistics() -> Cases:
    for title, data in arrays().items():
        yield title, put("x.npz", data), title.startswith("large")
    for title, make in strange("x.npz").items():
        yield title, make, False


def folders_of_images() -> Cases:
    for title, data in images().items():

        def make(folder: Path, data: Any = data) -> Path:
            put("root/a/0.png", data)(folder)
            return folder / "root"

        yield title, make, False
    for title, form in {"a pipe": pipe, "a folder": directory}.items():

        def strange_one(folder: Path, form: Any = form) -> Path:
            form("root/a/0.png")(folder)
            return folder / "root"

        yield title, strange_one, False


def idx() -> Cases:
    huge = struct.pack(">4i", 2051, 2**31 - 1, 28, 28) + bytes(784)
    contents: dict[str, Any] = {
        "4 GiB of zeros": bombs()["images"],
        "no gzip": b"x",
        "cut": gzip.compress(bytes(1000))[:20],
        "a pickle": lambda: gzip.compress(pickled(Command())),
        "a header of 2^31 images": gzip.compress(huge),
    }
    for title, data in contents.items():

        def make(folder: Path, data: Any = data) -> Path:
            for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
                put(name, data)(folder)
            return folder

        yield title, make, title.startswith("4 GiB")


def checkpoints() -> Cases:
    for title, data in means().items():
        yield f"safetensors: {title}", put("x.safetensors", data), title.startswith("large")
    archive = {"x/data.pkl": pickled(Command()), "x/version": b"3\n"}
    many = {f"w{i}": [] for i in range(1_000_000)}
    contents: dict[str, Any] = {
        # Pickles.
        "a pickle that runs": lambda: pickled(Command()),
        "a pickle that evaluates": lambda: pickled({"a": Command("eval")}),
        "a pickle in a dict": lambda: pickled({"state_dict": {"w": Command()}}, 4),
        "a torch file that runs": lambda: torch_file({"w": Command()}),
        "a torch file in the old form": lambda: torch_file({"w": Command()}, old=True),
        "a whole module": lambda: torch_file(nn.Linear(1, 1)),
        "a pickle of getattr": b"c__builtin__\ngetattr\n(c__builtin__\ndict\nVget\ntR.",
        "a pickle of an extension": b"\x80\x02\x82\x01.",
        "a pickle of an instance": b"(S'touch executed'\nios\nsystem\n.",
        "a pickle of an outer object": b"\x80\x02U\x01aQ.",
        "a pickle of os._wrap": b"\x80\x02cos\nsystem\nq\x00.",
        "a pickle of torch.load": b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00aR.",
        "a pickle of 2^40 bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
        "a pickle that is deep": lambda: b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".",
        "a pickle of itself": b"\x80\x02}q\x00U\x01ah\x00s.",
        "a pickle without end": b"\x80\x02}",
        # Archives and indices.
        "a zip without records": lambda: zipped(a=b"x"),
        "a zip whose record is a pickle": lambda: zipped(**archive),
        "half a torch file": lambda: torch_file({"w": torch.ones(100)})[:500],
        "an index of shards elsewhere": as_json({"weight_map": {"w": "../outside/secret.txt"}}),
        "an index of shards that are missing": as_json({"weight_map": {"w": "a.safetensors"}}),
        "an index of a million": lambda: as_json({"weight_map": many}),
        "HTML": b"<!doctype html><script>alert(1)</script>",
    }
    for title, data in contents.items():
        yield title, put("x.pt", data), "million" in title

    for title, make in strange("x.safetensors").items():
        yield title, make, False
    yield "a torch file of 4 GiB of zeros", put("x.pt", bombs()["tensors"]), True


def programs() -> Cases:
    def script(folder: Path) -> Path:
        write_program(folder / "x.pt", folder.parent / "outside" / MARK)
        return folder / "x.pt"

    yield "a program", script, False
    similar = {"x/constants.pkl": pickled(Command()), "x/data.pkl": b"x"}
    nested = {"y/x/constants.pkl": b"x", "x/data.pkl": pickled(Command())}
    contents: dict[str, Any] = {
        "a pickle": lambda: torch_file({"w": Command()}),
        "a zip that looks like one": lambda: zipped(**similar),
        "a zip of one in another": lambda: zipped(**nested),
        "nothing of one": lambda: zipped(**{"constants.pkl": b""}),
        "the old form": lambda: torch_file({"w": Command()}, old=True),
    }
    for title, data in contents.items():
        yield title, put("x.pt", data), False
    for title, make in strange("x.pt").items():
        yield title, make, False


def prompts() -> Cases:
    for ending in ("txt", "json", "jsonl"):
        for title, make in strange(f"x.{ending}").items():
            yield f".{ending}: {title}", make, False
    for ending in ("json", "jsonl"):
        for title, make in broken_json(f"x.{ending}").items():
            yield f".{ending}: {title}", make, False
    for title, make in many_json("x.json").items():
        yield f".json: {title}", make, True
    yield "60 million lines", put("x.txt", lambda: b"a\n" * 60_000_000), True


def workflows() -> Cases:
    node = {"class_type": "ManualSigmas", "inputs": {"sigmas": "1, 0"}}

    def with_sigmas(sigmas: Any) -> str:
        return as_json({"1": {**node, "inputs": {"sigmas": sigmas}}})

    contents: dict[str, Any] = {
        "sigmas of code": with_sigmas("__import__('os').system('true')"),
        "sigmas that are a list of lists": with_sigmas([[[]]]),
        "a link to a node that is missing": with_sigmas(["9", 0]),
        "nodes that name each other": with_sigmas(["1", 0]),
        "100,000 nodes": lambda: as_json({str(i): node for i in range(100_000)}),
        "nodes that are texts": as_json({"1": "x", "nodes": [[]], "links": 3}),
        "a title with control characters": as_json({"\x1b[31m": node, "2": node}),
        "numbers without end": "1" * 1_000_000,
        "a million numbers": lambda: ",".join(["1"] * 1_000_000),
        "code": "[x for x in ().__class__.__bases__[0].__subclasses__()]",
        "not finite": "nan, inf, -inf",
    }
    for title, data in contents.items():
        yield title, put("x.json", data), False
    for title, make in {**strange("x.json"), **broken_json("x.json")}.items():
        yield title, make, False


def stages() -> Cases:
    for title, data in means().items():
        yield title, _stages_with(data), title.startswith("large")

    # Weights.
    lora = {"weight.lora_A": torch.ones(1, 1)}
    yield "half of a low-rank change", _stages_with(lambda: tensors(**lora)), False
    wide = {**lora, "weight.lora_B": torch.ones(7, 1)}
    yield "a low-rank change of another shape", _stages_with(lambda: tensors(**wide)), False
    yield "another weight", _stages_with(lambda: tensors(other=torch.ones(1))), False

    # Records.
    record = changed(STAGES, "cuts", [0.5] * 1_000_000)
    yield "a million cuts", _stages_with(lambda: b"", record), False
    yield "a hash that is a list", _stages_with(lambda: b"", STAGES, {"sha256": [HASH]}), False
    for number, name in enumerate(NAMES):
        record = changed(STAGES, "base.name", name)
        yield f"the base's name, {number}", _stages_with(lambda: b"", record), False
    for title, make in broken_json("stages.json").items():
        yield title, lambda folder, make=make: make(folder).parent, False


def _stages_with(data: Callable[[], bytes], record: Any = STAGES, about: Any = None) -> Maker:
    """Return a maker of two stages with these weights; `about` is written beside each of them."""

    def make(folder: Path) -> Path:
        put("stages.json", as_json(record))(folder)
        for number in range(2):
            content = data()
            put(f"stage_{number}.safetensors", content)(folder)
            put(f"stage_{number}.json", as_json(about or {"sha256": sha256(content)}))(folder)
        return folder

    return make


def records() -> Cases:
    """Yield cases for JSON readers that have none of their own."""
    for title, make in {**strange("x.json"), **broken_json("x.json")}.items():
        yield title, make, False
    for title, make in many_json("x.json").items():
        yield title, make, True


def schedulers() -> Cases:
    names = (
        "os.system",
        "../../outside/secret",
        "SchedulerMixin",
        "__import__",
        "DDIMScheduler\x00",
        "AutoModel",
    )
    for name in names:
        record = {"_class_name": name, "_module": "os", "auto_map": {"AutoModel": "evil.py"}}
        yield f"the class {name!r:.30}", put("scheduler_config.json", as_json(record)), False
    for title, make in broken_json("scheduler_config.json").items():
        yield title, make, False


def assets() -> Cases:
    for title, data in means().items():
        yield title, _asset(data), title.startswith("large")
    for number, name in enumerate(NAMES):
        yield f"its name, {number}", _asset(_one_tensor, name=name), False
    yield "a shape of 2^40", _asset(_one_tensor, event_shape=[1 << 40]), False


def _one_tensor() -> bytes:
    return tensors(a=torch.ones(1))


def _asset(data: Callable[[], bytes], **record: Any) -> Maker:
    """Return a maker of a file of weights with the record beside it."""

    def make(folder: Path) -> Path:
        content = data()
        about = {"sha256": sha256(content), "name": "m", "event_shape": [1, 4, 4], **record}
        put("x.json", as_json(about))(folder)
        return put("x.safetensors", content)(folder)

    return make


# --------------------------------------------------------------------------------------------------
# The readers
# --------------------------------------------------------------------------------------------------


def _first_image(root: Path) -> Any:
    return oss_exp.image_folder(root, 8)[0]


def _stage_parameters(folder: Path) -> Any:
    weights = StageFolder.load(folder)
    parameters = StageParameters(nn.Linear(1, 1), weights, range(len(weights)))
    parameters.use(1)
    return parameters


def _latents() -> Cases:
    for title, data in means().items():
        yield title, put("x.safetensors", data), title.startswith("large")


def _resume(file: Path) -> Any:
    from omegaconf import OmegaConf

    from oss_exp.tasks.compatibility import require_same

    (file.parent / "schedules").mkdir(exist_ok=True)
    require_same(OmegaConf.create({"task": {"x": 1}}), file.parent)


# Reader -> the function that reads, and its cases.
READERS: dict[str, tuple[Callable[[Path], Any], Callable[[], Cases]]] = {
    "step schedules": (StepSchedule.load, schedules),
    "step schedules of other programs": (OSSScheduler.from_schedule, records),
    "run folders": (write, run_folders),
    "sweeps": (gather, sweeps),
    "folders that a run goes on in": (_resume, resumed),
    "cells of a reproduction": (lambda path: older_cell(path, {}, {}, None), cells),
    "configurations": (lambda path: load_config(path, "configuration"), resumed),
    "calibrations": (Calibration.load, calibrations),
    "stages": (_stage_parameters, stages),
    "checkpoints": (
        lambda path: read(locate(str(path), ["x.safetensors"], "elsewhere")),
        checkpoints,
    ),
    "TorchScript": (lambda path: load_weights(path, "weights", "them"), programs),
    "assets": (FashionFeatures.from_asset, assets),
    "mixtures": (GaussianMixture.from_asset, assets),
    "statistics": (Reference.load, statistics),
    "conditions": (lambda path: read_array(path, "x"), statistics),
    "latents": (lambda path: oss_exp.cached_latents(path), _latents),
    "folders of images": (_first_image, folders_of_images),
    "IDX files": (lambda root: oss_exp.fashion_mnist(root), idx),
    "prompts": (read_prompts, prompts),
    "GenEval's metadata": (read_metadata, records),
    "workflows and lists of sigmas": (lambda path: read_list(str(path), "flow", None), workflows),
    "schedulers": (lambda path: Diffusers(scheduler=str(path)).own_scheduler(), schedulers),
}


def cases() -> list[Case]:
    """Return all cases, those of a reader in a row."""
    listed = []
    for reader, (_, cases_of_reader) in READERS.items():
        for name, make, large in cases_of_reader():
            listed.append(Case(reader, name, make, large))
    return listed
