"""Statistics of real images, for FID, KID, precision and recall: from `images`, once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader

from oss_exp.escaping import PlainConsole
from oss_exp.evaluation.statistics import write_statistics
from oss_exp.tasks import border
from oss_exp.tasks.pretrain import load_images
from oss_exp.tasks.task import Count, Task


@dataclass(frozen=True, kw_only=True)
class Statistics(Task):
    """Write `output` (.npz): what evaluation.extractor sees in the `images`."""

    output: str = "fashion_mnist_test.npz"
    batch_size: Count = 256

    def __call__(self, cfg: DictConfig) -> None:
        images = load_images(cfg.images)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        extractor = border.build(cfg.evaluation.extractor, "evaluation.extractor", nn.Module).to(
            device
        )
        batches = DataLoader(images, self.batch_size)
        bar = track(batches, "reading images", console=PlainConsole(stderr=True))
        found = write_statistics(
            Path(self.output), extractor, ((x.to(device) + 1) / 2 for x, _ in bar)
        )
        PlainConsole().print(
            f"{found.path}: {found.n} images, {len(found.mu)} features of {found.extractor}",
            soft_wrap=True,
        )
