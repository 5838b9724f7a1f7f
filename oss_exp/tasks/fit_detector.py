"""Train the shipped detector of garments, by which our GenEval judges pictures.

The task is `task=fit_detector`.
"""

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
from oss_exp.data.images import fashion_mnist
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
    """Train on scenes of the train split, judge on scenes of the test split.

    Writes `output` (.safetensors and .json).

    Attributes:
        output: Path of the weights.
        steps: Number of steps.
        batch_size: Scenes of a step.
        learning_rate: Highest learning rate of AdamW.
        seed: Seed of the initial weights and of the scenes.
    """

    output: str = "fashion_detector.safetensors"
    steps: Count = 6000
    batch_size: Count = 64
    learning_rate: Positive = 2.0e-3
    seed: Whole = 0

    def __call__(self, cfg: DictConfig) -> None:
        if border.class_of(cfg.images, "images") is not FashionScenes:
            raise ValueError(
                "task=fit_detector draws scenes of its own from images=fashion_scenes; leave "
                "out other images"
            )

        # Garments.
        require_both_splits(cfg.images)
        root = cfg.images.root
        download = cfg.images.get("download", False)
        train_set = Wardrobe(*fashion_mnist(root, "train", SIDE, download))
        test_set = Wardrobe(*fashion_mnist(root, "test", SIDE, download))

        # Training.
        torch.manual_seed(self.seed)
        network = FashionDetector()
        started = time.perf_counter()
        train(network, AnyScenes(train_set, self.seed, self.steps * self.batch_size), self)
        seconds = time.perf_counter() - started
        network.eval()

        # Weights and scores.
        scores_of = ceiling(network, test_set, seed=1)
        rounded = {name: round(share.mean, 4) for name, share in scores_of.items()}
        results = {"right_on_test_scenes": rounded}
        output = Path(self.output)
        save_asset(output, network.state_dict(), provenance(self, network, seconds, results))
        shares = ", ".join(f"{name} {share.mean:.1%}" for name, share in scores_of.items())
        PlainConsole().print(
            f"{output}: {output.stat().st_size / 1e6:.2f} MB; {shares}", soft_wrap=True
        )


class AnyScenes(Dataset):
    """Scenes of one to four garments: items (image, heat, edges, middles).

    Item i is a function of (seed, i) alone.

    Args:
        wardrobe: The garments.
        seed: Seed of the scenes.
        count: Number of scenes.
    """

    def __init__(self, wardrobe: Wardrobe, seed: int, count: int):
        self.wardrobe = wardrobe
        self.seed = seed
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        draw = np.random.default_rng((self.seed, i))
        image, objects = self.wardrobe.scene(self.wardrobe.anything(draw), draw)
        boxes = [(item.garment, item.box) for item in objects]
        return image, *targets(boxes, CANVAS)


def train(network: FashionDetector, scenes: AnyScenes, task: FitDetector) -> None:
    """Train a network with one pass through the scenes, in float32.

    Args:
        network: The network.
        scenes: The scenes.
        task: The options of the training.

    Raises:
        ValueError: If the loss is not finite.
    """
    # Optimizer and learning rate.
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), task.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, task.learning_rate, task.steps, pct_start=0.1
    )

    # Steps.
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
    """Return GenEval's scores of scenes that show exactly what was asked for.

    They are the highest scores that a perfect model can get from this detector.

    Args:
        network: The detector.
        wardrobe: The garments to draw scenes from.
        seed: Seed of the scenes.
    """
    # Scenes.
    wishes = listed(seed)
    images = []
    for i, wish in enumerate(wishes):
        image, _ = wardrobe.scene(wish, np.random.default_rng((seed, i)))
        images.append(image)

    # Objects in them.
    detections = []
    for batch in torch.stack(images).split(64):
        detections += network.detect(batch)

    # Verdicts.
    verdicts = []
    for image, objects, wish in zip(images, detections, wishes, strict=True):
        verdicts.append(look(network, image, objects, wish).correct)
    return scores([wish["tag"] for wish in wishes], verdicts)
