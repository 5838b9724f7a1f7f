"""Train the shipped detector of garments, by which our own GenEval judges pictures."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from oss_exp.data.captioned import SIDE
from oss_exp.data.images import Split, fashion_mnist
from oss_exp.data.scenes import CANVAS, FashionScenes, Wardrobe, listed
from oss_exp.escaping import PlainConsole
from oss_exp.evaluation.psnr import Interval
from oss_exp.files import save_asset
from oss_exp.geneval.detectors import FashionDetector, look, targets
from oss_exp.geneval.rules import scores
from oss_exp.tasks import border
from oss_exp.tasks.fitting import loss_bar, provenance, require_both_splits
from oss_exp.tasks.task import Count, Positive, Task, Whole


@dataclass(frozen=True, kw_only=True)
class FitDetector(Task):
    """Write `output` (.safetensors and .json): trained on scenes of the train split, judged on the test split's."""

    output: str = "fashion_detector.safetensors"
    steps: Count = 6000
    batch_size: Count = 64
    learning_rate: Positive = 2.0e-3
    seed: Whole = 0

    def __call__(self, cfg: DictConfig) -> None:
        if border.class_of(cfg.images, "images") is not FashionScenes:
            raise ValueError(
                "task=fit_detector draws scenes of its own from images=fashion_scenes; leave others out"
            )
        require_both_splits(cfg.images)
        root, download = cfg.images.root, cfg.images.get("download", False)
        splits: tuple[Split, Split] = ("train", "test")
        train_set, test_set = (
            Wardrobe(*fashion_mnist(root, split, SIDE, download)) for split in splits
        )
        torch.manual_seed(self.seed)
        network = FashionDetector()
        started = time.perf_counter()
        train(network, AnyScenes(train_set, self.seed, self.steps * self.batch_size), self)
        seconds = time.perf_counter() - started
        network.eval()
        right = ceiling(network, test_set, seed=1)
        found = {
            "right_on_test_scenes": {name: round(share.mean, 4) for name, share in right.items()}
        }
        output = Path(self.output)
        save_asset(output, network.state_dict(), provenance(self, network, seconds, found))
        shares = ", ".join(f"{name} {share.mean:.1%}" for name, share in right.items())
        PlainConsole().print(
            f"{output}: {output.stat().st_size / 1e6:.2f} MB; {shares}", soft_wrap=True
        )


class AnyScenes(Dataset):
    """count scenes of one to four garments; item i, a function of (seed, i), is (image, heat, edges, middles)."""

    def __init__(self, wardrobe: Wardrobe, seed: int, count: int):
        self.wardrobe, self.seed, self.count = wardrobe, seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        draw = np.random.default_rng((self.seed, i))
        image, objects = self.wardrobe.scene(self.wardrobe.anything(draw), draw)
        return image, *targets([(each.garment, each.box) for each in objects], CANVAS)


def train(network: FashionDetector, scenes: AnyScenes, task: FitDetector) -> None:
    """Once through the scenes, in float32."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), task.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, task.learning_rate, task.steps, pct_start=0.1
    )
    progress, bar = loss_bar(task.steps)
    with progress:
        for batch in DataLoader(scenes, task.batch_size):
            loss = network.loss(*batch)
            if not math.isfinite(loss.item()):
                raise ValueError(f"the loss is {loss.item()}; lower task.learning_rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update(bar, advance=1, loss=loss.item())


def ceiling(network: FashionDetector, wardrobe: Wardrobe, seed: int) -> dict[str, Interval]:
    """GenEval's scores of scenes that show exactly what was wished: what the detector lets a perfect model have."""
    wished = listed(seed)
    drawn = [
        wardrobe.scene(wish, np.random.default_rng((seed, i)))[0] for i, wish in enumerate(wished)
    ]
    images = torch.stack(drawn)
    seen = [objects for batch in images.split(64) for objects in network.detect(batch)]
    verdicts = [look(network, *each) for each in zip(images, seen, wished, strict=True)]
    return scores([wish["tag"] for wish in wished], [verdict.correct for verdict in verdicts])
