"""Train the shipped classifier of Fashion-MNIST: `task=fit_classifier`.

Its features compare generated images with real ones.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from oss_exp.escaping import PlainConsole
from oss_exp.evaluation.classifier import FashionFeatures
from oss_exp.files import save_asset
from oss_exp.tasks.fitting import labelled_images, loss_bar, provenance, require_both_splits
from oss_exp.tasks.task import Amount, Count, Positive, Task, Whole


@dataclass(frozen=True, kw_only=True)
class FitClassifier(Task):
    """Train on the train split, measure on the test split.

    Writes `output` (.safetensors and .json).

    Attributes:
        output: Path of the weights.
        epochs: Passes through the images.
        batch_size: Images of a step.
        learning_rate: Highest learning rate of SGD.
        weight_decay: Weight decay of SGD.
        shift: Largest shift of an image, in pixels, up, down or sideways.
        erase: Side of the black square in every second image, in pixels.
        seed: Seed of the initial weights and of the training.
    """

    output: str = "fashion_features.safetensors"
    epochs: Count = 20
    batch_size: Count = 256
    learning_rate: Positive = 0.1
    weight_decay: Amount = 3.0e-4
    shift: Whole = 1
    erase: Whole = 8
    seed: Whole = 0

    def __call__(self, cfg: DictConfig) -> None:
        # Images.
        require_both_splits(cfg.images)
        images, labels = pixels(labelled_images(cfg.images, split="train"))
        test_images, test_labels = pixels(labelled_images(cfg.images, split="test"))

        # Training.
        torch.manual_seed(self.seed)
        network = FashionFeatures()
        started = time.perf_counter()
        train(network, images, labels, self)
        seconds = time.perf_counter() - started
        test_accuracy = accuracy(network, test_images, test_labels)

        # Weights and provenance.
        data_hash = hashlib.sha256()
        for tensor in (images, labels, test_images, test_labels):
            data_hash.update(tensor.numpy().tobytes())
        data = {
            "train_images": len(images),
            "test_images": len(test_images),
            "sha256": data_hash.hexdigest(),
        }
        results = {"test_accuracy": test_accuracy, "data": data}
        output = Path(self.output)
        save_asset(output, network.state_dict(), provenance(self, network, seconds, results))
        size = output.stat().st_size / 1e6
        PlainConsole().print(
            f"{output}: {size:.2f} MB, test accuracy {test_accuracy:.2%}", soft_wrap=True
        )


def pixels(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Map images from [-1, 1] to [0, 1]; the labels stay."""
    return (data[0] + 1) / 2, data[1]


def train(network: FashionFeatures, images: Tensor, labels: Tensor, task: FitClassifier) -> None:
    """Train a network in bfloat16.

    Args:
        network: The network.
        images: Images (n, 1, 32, 32) in [0, 1].
        labels: Their classes (n,).
        task: The options of the training.

    Raises:
        ValueError: If the loss is not finite.
    """
    # Optimizer and learning rate.
    network.train().to(memory_format=torch.channels_last)
    steps = task.epochs * math.ceil(len(images) / task.batch_size)
    optimizer = torch.optim.SGD(
        network.parameters(),
        task.learning_rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=task.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, task.learning_rate, steps, cycle_momentum=False
    )

    # Steps.
    progress, bar = loss_bar(steps)
    with progress:
        for epoch in range(task.epochs):
            for batch in torch.randperm(len(images)).split(task.batch_size):
                with torch.autocast("cpu", torch.bfloat16):
                    logits = network.logits(augment(images[batch], task.shift, task.erase))
                loss = F.cross_entropy(logits.float(), labels[batch])

                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update(bar, advance=1, loss=loss.item())

            if not math.isfinite(loss.item()):
                raise ValueError(
                    f"the loss is {loss.item()} in epoch {epoch + 1}; lower task.learning_rate"
                )


def augment(images: Tensor, shift: int, erase: int) -> Tensor:
    """Shift images at random, and put a black square into every second one.

    No image is mirrored: a generated shoe that points the wrong way should not look like a real
    one.

    Args:
        images: Images (B, 1, S, S).
        shift: Largest shift, in pixels.
        erase: Side of the square, in pixels.
    """
    count = len(images)
    size = images.shape[-1]
    places = torch.arange(size)

    # Shift: a window of the image in a wider black frame.
    corner = torch.randint(0, 2 * shift + 1, (count, 2, 1))
    rows, columns = (places + corner).unbind(1)  # (B, S) each
    framed = F.pad(images, [shift] * 4)
    samples = torch.arange(count)[:, None, None]
    moved = framed[samples, 0, rows[:, :, None], columns[:, None, :]]

    # Erase.
    corner = torch.randint(1 - erase, size, (count, 2, 1))
    rows, columns = (places - corner).unbind(1)
    inside_rows = (rows >= 0) & (rows < erase)
    inside_columns = (columns >= 0) & (columns < erase)
    is_erased = torch.rand(count, 1, 1) < 0.5
    square = is_erased & inside_rows[:, :, None] & inside_columns[:, None, :]
    return moved.masked_fill(square, 0)[:, None]


@torch.no_grad()
def accuracy(network: FashionFeatures, images: Tensor, labels: Tensor) -> float:
    """Return the share of images (n, 1, 32, 32) that are classified as their labels (n,)."""
    network.eval()
    answers = torch.cat([network.logits(batch).argmax(dim=1) for batch in images.split(1000)])
    return (answers == labels).double().mean().item()
