"""Initial noises with a seed for each sample index.

Sample i is a function of (seed, i) alone, so any batch size and any number of ranks see
the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from oss_exp.checks import require_range

# Index of the first held-out sample, which is the same whatever the size of the search set.
HELD_OUT = 1_000_000

# Index of the first sample that stages are trained on.
TRAINING = 3_000_000


class NoiseItem(TypedDict):
    """A sample: its index, standard normal noise (*E), float32, and class, -1 without classes."""

    index: int
    noise: Tensor
    label: int


class NoiseDataset(Dataset[NoiseItem]):
    """A range of samples.

    Args:
        seed: Seed of the noises.
        first: Index of the first sample.
        count: Number of samples.
        event_shape: Shape of a sample, *E.
        classes: Classes that the samples have in turn; None for no class.
    """

    def __init__(
        self,
        seed: int,
        first: int,
        count: int,
        event_shape: tuple[int, ...],
        classes: Sequence[int] | None,
    ):
        self.seed = seed
        self.first = first
        self.count = count
        self.event_shape = event_shape
        self.classes = classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> NoiseItem:
        if not 0 <= position < self.count:
            raise IndexError(position)
        index = self.first + position
        generator = np.random.default_rng((self.seed, index))
        noise = generator.standard_normal(self.event_shape, dtype=np.float32)
        label = -1 if self.classes is None else self.classes[position % len(self.classes)]
        return {"index": index, "noise": torch.from_numpy(noise), "label": label}


class NoiseData:
    """A search set of noises, and a disjoint held-out set.

    Args:
        event_shape: Shape of a sample, *E.
        num_classes: Number of the model's classes; None without classes.
        classes: None (unconditional), "all", or a list of classes that the samples have
            in turn. Runs replace "auto" by one of these.
        seed: Seed of the noises.
        search_samples: Size of the search set.
        eval_samples: Size of the held-out set.
        per_sample: Held-out noises for strategies that plan a schedule for each sample.
        batch_size: Samples in a batch.

    Attributes:
        prompts: The prompts that conditions number; None without prompts.
    """

    prompts: list[str] | None = None

    def __init__(
        self,
        event_shape: tuple[int, ...],
        num_classes: int | None,
        classes: Sequence[int] | Literal["all", "auto"] | None,
        seed: int = 0,
        search_samples: int = 64,
        eval_samples: int = 256,
        per_sample: int = 32,
        batch_size: int = 64,
    ):
        # Ranges.
        require_range(at_least=0, seed=seed)
        require_range(at_least=1, at_most=HELD_OUT, search_samples=search_samples)
        require_range(at_least=1, at_most=HELD_OUT, eval_samples=eval_samples)
        require_range(at_least=1, per_sample=per_sample, batch_size=batch_size)

        self.event_shape = event_shape
        self.classes = _class_list(classes, num_classes)
        self.seed = seed
        self.search_samples = search_samples
        self.eval_samples = eval_samples
        self.per_sample = min(per_sample, eval_samples)
        self.batch_size = batch_size

    def noises(self, first: int, count: int) -> Dataset[NoiseItem]:
        """Return `count` samples from number `first` on."""
        return NoiseDataset(self.seed, first, count, self.event_shape, self.classes)

    def predict_dataloader(self) -> list[DataLoader]:
        """Return loaders of the search set and of the held-out noises for per-sample strategies."""
        return [self._loader(0, self.search_samples), self._loader(HELD_OUT, self.per_sample)]

    def test_dataloader(self) -> DataLoader:
        """Return a loader of the held-out set."""
        return self._loader(HELD_OUT, self.eval_samples)

    def _loader(self, first: int, count: int) -> DataLoader:
        return DataLoader(self.noises(first, count), batch_size=self.batch_size)


def _class_list(classes: Sequence[int] | str | None, num_classes: int | None) -> list[int] | None:
    """Return the classes to condition on; None for no conditioning.

    Args:
        classes: As for `NoiseData`.
        num_classes: Number of the model's classes.
    """
    if classes is None:
        return None
    if num_classes is None:
        raise ValueError("classes is set but the model has no classes; set data.classes=null")
    if classes == "all":
        return list(range(num_classes))
    if isinstance(classes, str):
        raise ValueError(
            'classes must be null, "all" or a list of indices where there is no run, '
            f"got {classes!r}"
        )
    if not classes or not all(0 <= number < num_classes for number in classes):
        raise ValueError(
            f"classes must be indices from 0 to {num_classes - 1}, got {list(classes)}"
        )
    return list(classes)
