"""Fit the shipped exact model: a Gaussian mixture to a set of labelled images, saved with its provenance."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hydra.utils import call
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress

from oss_exp.files import save_asset
from oss_exp.models.families.mixture import fit
from oss_exp.tasks.fitting import versions


def fit_mixture(cfg: DictConfig) -> None:
    """Write task.output (.safetensors and .json) from the `images`."""
    images, labels = call(cfg.images)
    task = cfg.task
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("fitting classes", total=None)
        tensors = fit(
            images.flatten(1),
            labels,
            clusters=task.clusters,
            rank=task.rank,
            floor=task.floor,
            seed=task.seed,
            iterations=task.iterations,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    output = Path(task.output)
    data_hash = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    settings = {key: task[key] for key in ("clusters", "rank", "floor", "seed", "iterations")}
    provenance = {
        "name": output.stem,
        "event_shape": list(images.shape[1:]),
        "made_by": f"oss-exp task=fit_mixture images={task.data_name} "
        + " ".join(f"task.{key}={value}" for key, value in settings.items()),
        "data": {"name": task.data_name, "images": len(images), "sha256": data_hash},
        "versions": versions(),
    }
    digest = save_asset(output, tensors, provenance)
    Console().print(f"{output}: {output.stat().st_size / 1e6:.2f} MB, {len(labels)} images, SHA-256 {digest[:12]}")
