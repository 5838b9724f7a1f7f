"""Noises with a condition each that is no class: a row of an array in a file (an image to denoise), or a prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from oss_exp.data.noise import HELD_OUT, NoiseData, NoiseItem
from oss_exp.data.prompts import read_prompts
from oss_exp.files import load_arrays


class ConditionedItem(NoiseItem):
    """A sample with a condition that is no class."""

    condition: Tensor


class ConditionedDataset(Dataset[ConditionedItem]):
    """The first items of `noise`, one for each row of `conditions` (n, ...)."""

    def __init__(self, noise: Dataset[NoiseItem], conditions: np.ndarray):
        self.noise, self.conditions = noise, conditions

    def __len__(self) -> int:
        return len(self.conditions)

    def __getitem__(self, position: int) -> ConditionedItem:
        return {**self.noise[position], "condition": torch.as_tensor(self.conditions[position])}


class ConditionedData(NoiseData):
    """`NoiseData`, whose other settings are `noise`, for a model whose conditions are no classes.

    Of conditions (n, ...) search samples take the first, held-out samples the last, and both start again where they
    end; so the held-out ones depend on nothing else, and some are in common only where there are more samples.
    """

    def __init__(
        self,
        conditions: np.ndarray,
        event_shape: tuple[int, ...],
        num_classes: int | None,
        seed: int,
        search_samples: int,
        eval_samples: int,
        per_sample: int,
        batch_size: int,
    ):
        if num_classes is not None:
            raise ValueError(
                f"this data has no classes and the model has {num_classes}; choose data=noise"
            )
        super().__init__(
            event_shape, None, None, seed, search_samples, eval_samples, per_sample, batch_size
        )
        self.conditions = conditions

    def noises(self, first: int, count: int) -> Dataset[ConditionedItem]:
        places = np.arange(count)
        rows = (-1 - places if first == HELD_OUT else places) % len(self.conditions)
        return ConditionedDataset(super().noises(first, count), self.conditions[rows])


class ConditionedNoiseData(ConditionedData):
    """conditions: an .npz file; key: its array with a condition in every row, shuffled in the same way for every seed.

    ValueError where search and held-out samples would have some in common.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        num_classes: int | None,
        conditions: str | Path,
        key: str = "deltasq_realisations",
        seed: int = 0,
        search_samples: int = 32,
        eval_samples: int = 128,
        per_sample: int = 32,
        batch_size: int = 64,
    ):
        rows = read_array(Path(conditions).expanduser(), key)
        shuffled = rows[np.random.default_rng(0).permutation(len(rows))]
        noises = seed, search_samples, eval_samples, per_sample, batch_size
        super().__init__(shuffled, event_shape, num_classes, *noises)
        if self.search_samples + self.eval_samples > len(rows):
            raise ValueError(
                f"conditions={conditions} has {len(rows)} conditions, too few for "
                f"search_samples={self.search_samples} and eval_samples={self.eval_samples} that share none"
            )


class PromptData(ConditionedData):
    """Noises with the prompts of a file, as `read_prompts` takes it. A condition is a prompt's number in the file."""

    def __init__(
        self,
        event_shape: tuple[int, ...],
        num_classes: int | None,
        prompts: str | Path = "prompts.txt",
        seed: int = 0,
        search_samples: int = 8,
        eval_samples: int = 16,
        per_sample: int = 8,
        batch_size: int = 8,
    ):
        listed = read_prompts(prompts)
        noises = seed, search_samples, eval_samples, per_sample, batch_size
        super().__init__(np.arange(len(listed)), event_shape, num_classes, *noises)
        self.prompts = listed


def read_array(path: Path, key: str) -> np.ndarray:
    """The array `key` of an .npz file, float32, at least one row. Objects in it are not unpickled."""
    if not path.is_file():
        raise FileNotFoundError(
            f"conditions {path} do not exist; set data.conditions to an .npz file"
        )
    arrays = load_arrays(path, "conditions", "make the file again with numpy.savez", {key})
    if (array := arrays.get(key)) is None:
        names = ", ".join(list(arrays)[:20])
        raise ValueError(
            f"conditions {path} have no array {key!r}; set data.key to one of {names:.400}"
        )
    if array.ndim < 2 or array.dtype.kind not in "fiu":
        raise ValueError(
            f"conditions {path}: {key} must be numbers, a condition in each row, got {array.shape!s:.80}"
        )
    return array.astype(np.float32)
