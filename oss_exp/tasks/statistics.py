"""Compute the statistics of real images for FID, KID, precision and recall: `task=statistics`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader

from oss_exp.escaping import PlainConsole
from oss_exp.evaluation.statistics import WIDEST, fingerprint, write_statistics
from oss_exp.tasks import border
from oss_exp.tasks.call_log import Calls
from oss_exp.tasks.pretrain import load_images
from oss_exp.tasks.task import Count, Task


@dataclass(frozen=True, kw_only=True)
class Statistics(Task):
    """Write the features that evaluation.extractor finds in the `images`.

    Attributes:
        output: Path of the statistics, .npz.
        batch_size: Images of a batch.
    """

    output: str = "fashion_mnist_test.npz"
    batch_size: Count = 256

    def __call__(self, cfg: DictConfig) -> None:
        # Images and extractor.
        images = load_images(cfg.images)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        node = cfg.evaluation.extractor
        extractor = border.build(node, "evaluation.extractor", nn.Module).to(device)

        # Features, from images in [0, 1]; those of a killed run are read from its log.
        batches = DataLoader(images, self.batch_size)
        bar = track(batches, "reading images", console=PlainConsole(stderr=True))
        pixels = ((x.to(device) + 1) / 2 for x, _ in bar)
        calls = Calls(Path(cfg.paths.output_dir) / "calls", rank=0)
        logged = partial(calls.answer, most_values=self.batch_size * WIDEST)
        with calls.of(fingerprint(extractor).replace(" ", "_")):
            statistics = write_statistics(Path(self.output), extractor, pixels, logged)
        calls.forget()

        num_features = len(statistics.mu)
        PlainConsole().print(
            f"{statistics.path}: {statistics.n} images, {num_features} features of "
            f"{statistics.extractor}",
            soft_wrap=True,
        )
