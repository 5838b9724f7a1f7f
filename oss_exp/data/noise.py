"""Initial noises with one seed per sample index.

Sample i is a function of (seed, i) alone, so any batch size and any number of ranks see the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

HELD_OUT = 1_000_000  # index of the first held-out sample: the same ones whatever the size of the search set

TRAINING = 3_000_000  # of the first that stages are trained on


class NoiseDataset(Dataset):
    """Items {index, noise (*E) float32, label}: standard normal noise and a class, or label -1 without classes."""

    def __init__(self, seed: int, first: int, count: int, event_shape: tuple[int, ...], classes: Sequence[int] | None):
        self.seed, self.first, self.count, self.event_shape, self.classes = seed, first, count, event_shape, classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> dict[str, Tensor | int]:
        if not 0 <= position < self.count:
            raise IndexError(position)
        index = self.first + position
        noise = np.random.default_rng((self.seed, index)).standard_normal(self.event_shape, dtype=np.float32)
        label = -1 if self.classes is None else self.classes[position % len(self.classes)]
        return {"index": index, "noise": torch.from_numpy(noise), "label": label}


class NoiseData:
    """The search set, and a disjoint held-out set of noises.

    classes: null (unconditional), "all", or a list; "auto" is settled by the run, which knows the model.
    per_sample: how many held-out noises the strategies that plan one schedule per sample are given.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        num_classes: int | None,
        seed: int,
        search_samples: int,
        eval_samples: int,
        per_sample: int,
        batch_size: int,
        classes: Sequence[int] | str | None,
    ):
        counts = {"search_samples": search_samples, "eval_samples": eval_samples, "batch_size": batch_size}
        for name, value in {**counts, "per_sample": per_sample}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"data.{name} must be a whole number, at least 1, got {value!r}")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"data.seed must be a whole number, at least 0, got {seed!r}")
        if search_samples > HELD_OUT:
            raise ValueError(f"data.search_samples must be at most {HELD_OUT}, got {search_samples}")
        if classes is not None and num_classes is None:
            raise ValueError("data.classes is set but the model has no classes; set data.classes=null")
        if classes == "all":
            classes = range(num_classes)
        elif isinstance(classes, str) or (classes is not None and not isinstance(classes, Sequence)):
            raise ValueError(f'data.classes must be null, "all" or a list of class indices, got {classes!r}')
        if classes is not None and not (classes and all(isinstance(c, int) and 0 <= c < num_classes for c in classes)):
            raise ValueError(f"data.classes must be indices from 0 to {num_classes - 1}, got {list(classes)}")
        self.event_shape, self.classes, self.seed = event_shape, None if classes is None else list(classes), seed
        self.search_samples, self.eval_samples, self.batch_size = search_samples, eval_samples, batch_size
        self.per_sample = min(per_sample, eval_samples)

    def noises(self, first: int, count: int) -> Dataset:
        """The samples from number `first` on."""
        return NoiseDataset(self.seed, first, count, self.event_shape, self.classes)

    def predict_dataloader(self) -> list[DataLoader]:
        """Search set first, then the held-out noises for per-sample strategies."""
        return [self._loader(0, self.search_samples), self._loader(HELD_OUT, self.per_sample)]

    def test_dataloader(self) -> DataLoader:
        return self._loader(HELD_OUT, self.eval_samples)

    def _loader(self, first: int, count: int) -> DataLoader:
        return DataLoader(self.noises(first, count), batch_size=self.batch_size)
