"""What the tasks that make weights share: the bar of the loss, and what is told of how a network was trained."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

import oss_exp
from oss_exp.data.folder import ImageFolder
from oss_exp.data.images import Split
from oss_exp.escaping import PlainConsole
from oss_exp.models.guidance import NO_CLASS
from oss_exp.tasks import border
from oss_exp.tasks.task import Task


def loss_bar(total: int, completed: int = 0, disable: bool = False) -> tuple[Progress, TaskID]:
    """Steps with their `loss` and the time left; the one task of the progress, which has still to be started."""
    columns = (TextColumn("loss {task.fields[loss]:<8.3g}"), BarColumn(), MofNCompleteColumn())
    clocks = (TextColumn("steps"), TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, *clocks, console=PlainConsole(stderr=True), disable=disable)
    return progress, progress.add_task("", total=total, completed=completed, loss=math.nan)


def provenance(
    task: Task, network: nn.Module, seconds: float, found: Mapping[str, Any]
) -> dict[str, Any]:
    """Of a network that was trained here for so long: the command, its settings, and what was found."""
    return {
        "name": Path(task.output).stem,
        "made_by": " ".join(["oss-exp", *HydraConfig.get().overrides.task]),
        **{key: value for key, value in asdict(task).items() if key != "output"},
        "parameters": sum(p.numel() for p in network.parameters()),
        **found,
        "seconds": round(seconds),
        "hardware": f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": versions(),
    }


def labelled_images(images: DictConfig, **split: Split) -> tuple[Tensor, Tensor]:
    """Return all images (n, C, H, W) of a configuration of conf/images and their labels (n,), in memory."""
    items = border.build(images, "images", **split)
    if isinstance(items, ImageFolder):
        items = (
            torch.stack([image for image, _ in items]),
            torch.tensor([label for _, label in items.samples]),
        )
    if not isinstance(items, tuple):
        raise ValueError(
            "images has captions, and what is fitted here are classes; choose other images"
        )
    if NO_CLASS in items[1]:
        raise ValueError("images has no classes to fit; give images in a folder for each class")
    return items


def require_both_splits(images: DictConfig) -> None:
    """Raise ValueError where images have no splits, or one was chosen: the task reads both train and test."""
    if "split" not in border.parameters_of(border.class_of(images, "images")).kinds:
        raise ValueError(
            "images must have a train and a test split; choose images=fashion_mnist_32 or such"
        )
    if images.get("split", "train") != "train":
        raise ValueError(
            f"images.split={images.split} does nothing here: train and test are read; leave it out"
        )


def versions() -> dict[str, str]:
    return {
        "oss_exp": oss_exp.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
