"""What many tests need: the command line inside their own process, and files to give it."""

import gzip
import logging
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

from oss_exp.cli import CONF, main
from oss_exp.evaluation.comparison import Result
from oss_exp.evaluation.psnr import Interval
from oss_exp.files import save_asset
from oss_exp.models.checkpoints.weights import randomise

ORACLES = Path(__file__).parent / "oracles"


def run_cli(*arguments: str) -> None:
    """`oss-exp ARGUMENTS`, W&B offline; SystemExit where the command ends with an error.

    It saves the seconds that a process of its own needs to start.
    """
    handlers = logging.root.handlers[:]
    GlobalHydra.instance().clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDB_MODE", "offline")
            patch.setattr(sys, "argv", ["oss-exp", *arguments])
            main()
    finally:
        GlobalHydra.instance().clear()
        logging.root.handlers = handlers  # Hydra's write to a stream that pytest closes


def result(strategy: str, values: dict[int, float], baseline: bool = False, nfe: int = 5, arena: str = "a", **extra):
    """A measured schedule; values {sample: PSNR}, extra: other fields of `Result`."""
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
        strategy=strategy, nfe=nfe, baseline=baseline, psnr=interval, values=values, arena=f"{arena}{nfe}", **fields
    )


def write_fashion(
    folder: Path, pixels: torch.Tensor | np.ndarray, labels: Sequence[int], split: str = "train", zipped: bool = False
) -> None:
    """The two files of a split (train, t10k) of Fashion-MNIST: pixels (n, 28, 28) uint8, labels (n,)."""
    folder.mkdir(parents=True, exist_ok=True)
    images = struct.pack(">4i", 2051, len(pixels), 28, 28) + np.asarray(pixels, np.uint8).tobytes()
    classes = struct.pack(">2i", 2049, len(labels)) + np.asarray(labels, np.uint8).tobytes()
    for name, data in {"images-idx3": images, "labels-idx1": classes}.items():
        file = folder / f"{split}-{name}-ubyte{'.gz' if zipped else ''}"
        file.write_bytes(gzip.compress(data) if zipped else data)


def random_weights(file: Path, *settings: str) -> str:
    """Save weights of the model of these settings, filled at random; returns the setting that takes them."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        model = instantiate(compose("config", [*settings, "model.checkpoint=untrained"]).model)
    randomise(model.backbone, torch.Generator().manual_seed(0))
    save_asset(file, model.backbone.state_dict(), {})
    return f"model.checkpoint={file}"
