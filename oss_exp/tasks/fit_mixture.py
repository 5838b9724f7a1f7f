"""Fit the shipped exact model, a Gaussian mixture, to labelled images: `task=fit_mixture`."""

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
    """Fit a mixture to the `images`.

    Writes `output` (.safetensors and .json).

    Attributes:
        output: Path of the mixture.
        data_name: Name of the images, for the provenance.
        clusters: Components of a class.
        rank: Rank of a component's covariance.
        floor: Variance in all other directions.
        seed: Seed of k-means.
        iterations: Iterations of hard EM after k-means.
    """

    output: str = "mixture_fashion.safetensors"
    data_name: str
    clusters: Count = 3
    rank: Whole = 16
    floor: Positive = 0.001
    seed: Whole = 0
    iterations: Whole = 10

    def __call__(self, cfg: DictConfig) -> None:
        # Fit.
        images, labels = labelled_images(cfg.images)
        settings = {
            "clusters": self.clusters,
            "rank": self.rank,
            "floor": self.floor,
            "seed": self.seed,
            "iterations": self.iterations,
        }
        with Progress(console=PlainConsole(stderr=True)) as progress:
            bar = progress.add_task("fitting classes", total=None)

            def update(completed: int, total: int) -> None:
                progress.update(bar, completed=completed, total=total)

            tensors = fit(images.flatten(1), labels, **settings, progress=update)

        # File with its provenance.
        output = Path(self.output)
        data_hash = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        options = " ".join(f"task.{key}={value}" for key, value in settings.items())
        provenance = {
            "name": output.stem,
            "event_shape": list(images.shape[1:]),
            "made_by": f"oss-exp task=fit_mixture images={self.data_name} {options}",
            "data": {"name": self.data_name, "images": len(images), "sha256": data_hash},
            "versions": versions(),
        }
        digest = save_asset(output, tensors, provenance)
        size = output.stat().st_size / 1e6
        PlainConsole().print(
            f"{output}: {size:.2f} MB, {len(labels)} images, SHA-256 {digest[:12]}"
        )
