"""A full or read-only disk ends any work with one message, and leaves whole files only."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_weights, run_cli
from safetensors.torch import load_file

from oss_exp.schedule import Free, StepSchedule

SEARCH = [
    "model=mixture_digits",
    "num_teacher_steps=20",
    "num_steps=[2,4]",
    "data.search_samples=6",
    "logger=none",
]
SEARCH += ["data.eval_samples=8", "data.per_sample=4", "trainer.enable_progress_bar=false"]
COMPARE = [*SEARCH, "stepsize=[edm,oss_shared]"]
NETWORK = [
    "model=dit_fashion",
    "model.event_shape=[1,8,8]",
    "model.backbone.size=8",
    "model.backbone.num_layers=1",
]
NETWORK += ["model.backbone.num_attention_heads=2", "model.backbone.attention_head_dim=8"]
TRAIN = [
    "task.max_steps=6",
    "task.save_every=2",
    "task.batch_size=8",
    "task.warmup_steps=1",
    "logger=none",
]
PRETRAIN = ["task=pretrain", "images=digits", "trainer.precision=32-true", *NETWORK, *TRAIN]
FINETUNE = [
    "task=finetune",
    "task.num_stages=2",
    "task.trajectories=8",
    "task.precision=32-true",
    *NETWORK,
    *TRAIN,
]
FINETUNE += ["stepsize=ddim", "num_teacher_steps=10", "num_steps=[3]", "data.search_samples=2"]
EXPORT = ["task=export", "exporter=comfyui"]


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a file system of so many KiB; skips where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kib: int, kind: str = "rw") -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"{kind},size={kib}k", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("may not mount a file system")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], check=False, capture_output=True)


def assert_whole(folder: Path) -> None:
    """Assert that every file can be read, but for the log of calls, which may end anywhere."""
    for file in folder.rglob("*"):
        assert not file.name.endswith(".tmp")
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            load_file(file)
        elif file.suffix == ".npz":
            with np.load(file) as arrays:
                assert all(array.size for array in arrays.values())
        elif file.suffix == ".ckpt":
            torch.load(file, weights_only=False)


def refused(arguments: list[str], folder: Path, capsys) -> str:
    """Run a command that fails and return its one message."""
    with pytest.raises(SystemExit):
        run_cli(*arguments, f"hydra.run.dir={folder / 'run'}")
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (message,) = [line for line in error.splitlines() if line.startswith("oss-exp: ")]
    return message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "kib", "message"),
    [
        (
            [*COMPARE, "task=search"],
            40,
            "cannot keep the network's answers in .*"
            "they come to about .* GB are free; free space, or",
        ),
        (
            [*COMPARE, "task=search", "keep_calls=false"],
            28,
            r"cannot write .*/schedules/.*: No space left.*; free space",
        ),
        (
            [*COMPARE, "keep_calls=false"],
            60,
            r"cannot write .*\.npz: No space left on device; free space",
        ),
        (
            PRETRAIN,
            92,
            r"cannot write .*/checkpoints/last.ckpt: No space left on device; free space",
        ),
        (
            FINETUNE,
            92,
            r"cannot write .*/checkpoints/stage_0.ckpt: No space left on device; free space",
        ),
    ],
    ids=["search", "schedules", "compare", "pretrain", "finetune"],
)
def test_a_full_disk_is_reported(arguments, kib, message, disk, tmp_path, capsys):
    if arguments is FINETUNE:
        arguments = [*FINETUNE, random_weights(tmp_path / "weights.safetensors", *NETWORK)]
    folder = disk(kib)
    assert re.search(message, refused(arguments, folder, capsys))
    assert_whole(folder)


def test_an_export_to_a_full_disk_leaves_nothing(disk, tmp_path, capsys):
    steps = StepSchedule(
        [0.95, 0.5, 0.2, 0.0], Free(), provenance={"native": {"clock": "flow time"}}
    )
    steps.save(tmp_path / "lists.json")
    folder = disk(4)
    (folder / "other").write_bytes(bytes(4096))
    schedule = f"task.schedule={tmp_path / 'lists.json'}"
    output = f"task.output={folder / 'comfy.json'}"

    message = refused([*EXPORT, schedule, output], tmp_path, capsys)

    assert "comfy.json: No space left on device; free space" in message
    assert [file.name for file in folder.iterdir()] == ["other"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [COMPARE, PRETRAIN, EXPORT], ids=["compare", "pretrain", "export"]
)
def test_a_read_only_disk_is_reported(arguments, disk, capsys):
    folder = disk(100, "ro")
    assert "Read-only file system" in refused(arguments, folder, capsys)
