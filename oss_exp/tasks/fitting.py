"""Tools of the tasks that make weights: progress bar, provenance, labelled images."""

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
    """Return a progress bar of steps, with their `loss` and the remaining time.

    Args:
        total: Number of steps.
        completed: Steps that were taken before.
        disable: Show nothing.

    Returns:
        The progress, which is not started yet, and the id of its only task.
    """
    columns = (
        TextColumn("loss {task.fields[loss]:<8.3g}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=PlainConsole(stderr=True), disable=disable)
    return progress, progress.add_task("", total=total, completed=completed, loss=math.nan)


def provenance(
    task: Task, network: nn.Module, seconds: float, results: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the provenance of a network that was trained here.

    Args:
        task: The task, with its options.
        network: The network.
        seconds: Time that training has taken.
        results: What was measured afterwards.
    """
    options = asdict(task)
    options.pop("output")
    return {
        "name": Path(task.output).stem,
        "made_by": " ".join(["oss-exp", *HydraConfig.get().overrides.task]),
        **options,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        **results,
        "seconds": round(seconds),
        "hardware": cpu(),
        "versions": versions(),
    }


def labelled_images(images: DictConfig, **split: Split) -> tuple[Tensor, Tensor]:
    """Return all images of a configuration of conf/images, in memory.

    Args:
        images: The configuration.
        split: The split, if it has splits.

    Returns:
        The images (n, C, H, W) and their labels (n,).

    Raises:
        ValueError: If the images have no labels.
    """
    items = border.build(images, "images", **split)
    if isinstance(items, ImageFolder):
        pictures = torch.stack([image for image, _ in items])
        items = pictures, torch.tensor([label for _, label in items.samples])
    if not isinstance(items, tuple):
        raise ValueError("images has captions, and this task needs classes; choose other images")
    if NO_CLASS in items[1]:
        raise ValueError("images has no classes to fit; give images in a folder for each class")
    return items


def require_both_splits(images: DictConfig) -> None:
    """Check that a configuration of conf/images has a train and a test split, and chooses none.

    Raises:
        ValueError: If it has no splits, or one was chosen.
    """
    if "split" not in border.parameters_of(border.class_of(images, "images")).kinds:
        raise ValueError(
            "images must have a train and a test split, such as images=fashion_mnist_32"
        )
    if images.get("split", "train") != "train":
        raise ValueError(
            f"images.split={images.split} does nothing here: train and test are read; leave it out"
        )


def cpu() -> str:
    """Return the processor's kind and how many of its cores PyTorch uses."""
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores"
    return f"{cores}, {platform.machine()}"


def versions() -> dict[str, str]:
    """Return the versions of this package, PyTorch and Python."""
    return {
        "oss_exp": oss_exp.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
