"""Statistics of real images, for FID, KID, precision and recall: from `images`, once."""

from __future__ import annotations

from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader

from oss_exp.evaluation.statistics import write_statistics
from oss_exp.tasks.pretrain import load_images


def statistics(cfg: DictConfig) -> None:
    """Write task.output (.npz): what evaluation.extractor sees in `images`."""
    images = load_images(cfg.images)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor = instantiate(cfg.evaluation.extractor).to(device)
    batches = DataLoader(images, cfg.task.batch_size)
    bar = track(batches, "reading images", console=Console(stderr=True))
    found = write_statistics(Path(cfg.task.output), extractor, ((x.to(device) + 1) / 2 for x, _ in bar))
    Console().print(f"{found.path}: {found.n} images, {len(found.mu)} features of {found.extractor}", soft_wrap=True)
