"""Fit the shipped exact model: a Gaussian mixture to a set of labelled images, saved with its provenance."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from rich.progress import Progress

from oss_exp.escaping import PlainConsole
from oss_exp.files import save_asset
from oss_exp.models.families.mixture import fit
from oss_exp.tasks.fitting import labelled_images, versions
from oss_exp.tasks.task import Count, Positive, Task, Whole


@dataclass(frozen=True, kw_only=True)
class FitMixture(Task):
    """Write `output` (.safetensors and .json) from the `images`.

    clusters: of a class; rank: of each component's covariance; floor: variance in every other direction.
    """

    output: str = "mixture_fashion.safetensors"
    data_name: str
    clusters: Count = 3
    rank: Whole = 16
    floor: Positive = 0.001
    seed: Whole = 0
    iterations: Whole = 10

    def __call__(self, cfg: DictConfig) -> None:
        images, labels = labelled_images(cfg.images)
        settings = {
            key: getattr(self, key) for key in ("clusters", "rank", "floor", "seed", "iterations")
        }
        with Progress(console=PlainConsole(stderr=True)) as progress:
            bar = progress.add_task("fitting classes", total=None)
            tensors = fit(
                images.flatten(1),
                labels,
                **settings,
                progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )
        output = Path(self.output)
        data_hash = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        provenance = {
            "name": output.stem,
            "event_shape": list(images.shape[1:]),
            "made_by": f"oss-exp task=fit_mixture images={self.data_name} "
            + " ".join(f"task.{key}={value}" for key, value in settings.items()),
            "data": {"name": self.data_name, "images": len(images), "sha256": data_hash},
            "versions": versions(),
        }
        digest = save_asset(output, tensors, provenance)
        PlainConsole().print(
            f"{output}: {output.stat().st_size / 1e6:.2f} MB, {len(labels)} images, SHA-256 {digest[:12]}"
        )
