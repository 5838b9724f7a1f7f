"""Helpers of many tests: runs of the command line, results, and files to give it."""

import gzip
import json
import logging
import multiprocessing
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from torch.multiprocessing import start_processes

from oss_exp.cli import CONF, main
from oss_exp.evaluation.comparison import Result
from oss_exp.evaluation.psnr import Interval
from oss_exp.files import save_asset
from oss_exp.models.checkpoints.weights import randomise

ORACLES = Path(__file__).parent / "oracles"


def run_cli(*arguments: str) -> None:
    """Run `oss-exp ARGUMENTS` in this process, W&B offline, which saves seconds of start-up.

    Raises:
        SystemExit: The command ends with an error.
    """
    handlers = logging.root.handlers[:]  # Hydra's write to a stream that pytest closes
    GlobalHydra.instance().clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDB_MODE", "offline")
            patch.setattr(sys, "argv", ["oss-exp", *arguments])
            main()
    finally:
        GlobalHydra.instance().clear()
        logging.root.handlers = handlers


FORKS = multiprocessing.get_context("forkserver")
"""Processes that start with everything imported, in a fraction of a second instead of five."""
FORKS.set_forkserver_preload(
    ["oss_exp.job", "oss_exp.tasks.run", "oss_exp.tasks.finetune", "diffusers", "helpers"]
)


def run_process(*arguments: str, folder: Path, **environment: str) -> str:
    """Run `oss-exp ARGUMENTS` in its own process and folder, and return its output.

    Raises:
        AssertionError: The command fails.
    """
    return _finish(start_process(arguments, folder, environment))


def free_port() -> int:
    """Return the number of a port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two_ranks(*arguments: str, folder: Path) -> None:
    """Run `oss-exp ARGUMENTS` as two ranks on the CPU, started as a cluster's launcher does."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "NODE_RANK": "0",
    }
    distributed = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]

    processes = []
    for rank in range(2):
        environment = {**shared, "LOCAL_RANK": str(rank)}
        processes.append(start_process([*arguments, *distributed], folder, environment))
    for process in processes:
        _finish(process)


def run_ranks(work: Callable[..., None], world: int, *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in `world` processes; raises the error of any of them."""
    start_processes(work, arguments, nprocs=world, start_method="forkserver")


def start_process(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> tuple[BaseProcess, Path]:
    """Start `oss-exp ARGUMENTS` in a folder, and return the process and the file of its output."""
    printed = Path(tempfile.mkdtemp()) / "printed.txt"
    process = FORKS.Process(target=_run, args=(arguments, folder, environment, printed))
    process.start()
    return process, printed


def _run(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], printed: Path
) -> None:
    """Run the command line in a forked process that prints to a file."""
    file = os.open(printed, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(folder)
    os.environ.update(environment)
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # Lightning reads it at import
    run_cli(*arguments)


def kill_at(pattern: str, folder: Path, arguments: Sequence[str], delay: float = 0.0) -> None:
    """Run `oss-exp ARGUMENTS` until a file of this pattern is in a folder, then kill it.

    Args:
        pattern: A glob pattern.
        folder: The folder.
        arguments: The command line.
        delay: Seconds between the file and SIGKILL.
    """
    command = [sys.executable, "-m", "oss_exp", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not any(folder.glob(pattern)) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    process.wait()


def metrics_of(folder: Path) -> dict:
    """Return the measurements of a run."""
    return json.loads((folder / "metrics.json").read_text())


def _finish(started: tuple[BaseProcess, Path]) -> str:
    """Wait for a process and return its output; AssertionError if it fails."""
    process, printed = started
    process.join()
    assert process.exitcode == 0, printed.read_text()
    return printed.read_text()


def mostly_slow(values: Iterable, *quick: Any) -> list:
    """Return parameters of a test, of which all but the quick ones are marked slow."""

    def slow(value: Any) -> Any:
        return pytest.param(*value if isinstance(value, tuple) else [value], marks=pytest.mark.slow)

    return [value if value in quick else slow(value) for value in values]


def result(
    strategy: str,
    values: dict[int, float],
    baseline: bool = False,
    nfe: int = 5,
    group: str = "a",
    **extra,
):
    """Return a measured schedule.

    Args:
        values: {sample: PSNR}.
        extra: Other fields of `Result`.
    """
    interval = Interval.of(np.array(list(values.values())))
    fields = {
        "run": "",
        "num_steps": nfe,
        "start": "pinned",
        "planning": {},
        "metrics": {},
        "spread": Interval.of(np.ones(2)),
        **extra,
    }
    return Result(
        strategy=strategy,
        nfe=nfe,
        baseline=baseline,
        psnr=interval,
        values=values,
        group=f"{group}{nfe}",
        **fields,
    )


def write_fashion(
    folder: Path,
    pixels: torch.Tensor | np.ndarray,
    labels: Sequence[int],
    split: str = "train",
    zipped: bool = False,
) -> None:
    """Write a split of Fashion-MNIST.

    Args:
        pixels: Images (n, 28, 28), uint8.
        labels: Classes (n,).
        split: `train` or `t10k`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = struct.pack(">4i", 2051, len(pixels), 28, 28) + np.asarray(pixels, np.uint8).tobytes()
    classes = struct.pack(">2i", 2049, len(labels)) + np.asarray(labels, np.uint8).tobytes()
    for name, data in {"images-idx3": images, "labels-idx1": classes}.items():
        file = folder / f"{split}-{name}-ubyte{'.gz' if zipped else ''}"
        file.write_bytes(gzip.compress(data) if zipped else data)


def random_weights(file: Path, *settings: str) -> str:
    """Save random weights for the model of these settings; return the setting that loads them."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        model = instantiate(compose("config", [*settings, "model.checkpoint=untrained"]).model)
    randomise(model.backbone, torch.Generator().manual_seed(0))
    save_asset(file, model.backbone.state_dict(), {})
    return f"model.checkpoint={file}"
