"""Initial noises with one seed per sample index.

Sample i is a function of (seed, i) alone, so any batch size and any number of ranks see the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from oss_exp.checks import require_range

HELD_OUT = 1_000_000  # index of the first held-out sample: the same ones whatever the size of the search set

TRAINING = 3_000_000  # of the first that stages are trained on


class NoiseItem(TypedDict):
    """A sample: its number, its standard normal noise (*E) float32, and its class, -1 without classes."""

    index: int
    noise: Tensor
    label: int


class NoiseDataset(Dataset[NoiseItem]):
    """The samples from number `first` on, which have these classes in turn."""

    def __init__(
        self,
        seed: int,
        first: int,
        count: int,
        event_shape: tuple[int, ...],
        classes: Sequence[int] | None,
    ):
        self.seed, self.first, self.count, self.event_shape, self.classes = (
            seed,
            first,
            count,
            event_shape,
            classes,
        )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> NoiseItem:
        if not 0 <= position < self.count:
            raise IndexError(position)
        index = self.first + position
        noise = np.random.default_rng((self.seed, index)).standard_normal(
            self.event_shape, dtype=np.float32
        )
        label = -1 if self.classes is None else self.classes[position % len(self.classes)]
        return {"index": index, "noise": torch.from_numpy(noise), "label": label}


class NoiseData:
    """The search set, and a disjoint held-out set of noises.

    classes: null (unconditional), "all", or a list; "auto" is for runs, which put one of these in its place.
    per_sample: how many held-out noises the strategies that plan one schedule per sample are given.
    prompts: those that conditions number, where they number prompts.
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
        require_range(at_least=0, seed=seed)
        require_range(at_least=1, at_most=HELD_OUT, search_samples=search_samples)
        require_range(at_least=1, at_most=HELD_OUT, eval_samples=eval_samples)
        require_range(at_least=1, per_sample=per_sample, batch_size=batch_size)
        self.event_shape, self.classes, self.seed = event_shape, _listed(classes, num_classes), seed
        self.search_samples, self.eval_samples, self.batch_size = (
            search_samples,
            eval_samples,
            batch_size,
        )
        self.per_sample = min(per_sample, eval_samples)

    def noises(self, first: int, count: int) -> Dataset[NoiseItem]:
        """The samples from number `first` on."""
        return NoiseDataset(self.seed, first, count, self.event_shape, self.classes)

    def predict_dataloader(self) -> list[DataLoader]:
        """Search set first, then the held-out noises for per-sample strategies."""
        return [self._loader(0, self.search_samples), self._loader(HELD_OUT, self.per_sample)]

    def test_dataloader(self) -> DataLoader:
        return self._loader(HELD_OUT, self.eval_samples)

    def _loader(self, first: int, count: int) -> DataLoader:
        return DataLoader(self.noises(first, count), batch_size=self.batch_size)


def _listed(classes: Sequence[int] | str | None, num_classes: int | None) -> list[int] | None:
    """The indices of classes, of which the model has so many; None: there are none to condition on."""
    if classes is None:
        return None
    if num_classes is None:
        raise ValueError("classes is set but the model has no classes; set data.classes=null")
    if classes == "all":
        return list(range(num_classes))
    if isinstance(classes, str):
        raise ValueError(
            f'classes must be null, "all" or a list of indices where there is no run, got {classes!r}'
        )
    if not classes or not all(0 <= number < num_classes for number in classes):
        raise ValueError(
            f"classes must be indices from 0 to {num_classes - 1}, got {list(classes)}"
        )
    return list(classes)
