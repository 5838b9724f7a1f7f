"""Noises with a condition each, such as an image to denoise: rows of an array in a file.

Search samples and held-out samples share no row, and as with noises the held-out ones do not depend on how many search
samples there are.
"""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from oss_exp.tasks.data import HELD_OUT, NoiseData, NoiseDataset


class ConditionedDataset(Dataset):
    """The items of `noise`, each with its `condition`: conditions (len(noise), ...)."""

    def __init__(self, noise: NoiseDataset, conditions: np.ndarray):
        self.noise, self.conditions = noise, conditions

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, position: int) -> dict[str, Tensor | int]:
        return {**self.noise[position], "condition": torch.from_numpy(self.conditions[position])}


class ConditionedNoiseData(NoiseData):
    """`NoiseData` for a model whose conditions are arrays instead of classes.

    conditions: an .npz file; key: its array with a condition in every row. They are shuffled, in the same way for every
    seed; search samples take them from the front, held-out samples from the back.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        num_classes: int | None,
        conditions: str,
        key: str,
        seed: int,
        search_samples: int,
        eval_samples: int,
        per_sample: int,
        batch_size: int,
    ):
        if num_classes is not None:
            raise ValueError(f"data=conditions has no classes and the model has {num_classes}; choose data=noise")
        super().__init__(event_shape, None, seed, search_samples, eval_samples, per_sample, batch_size, None)
        rows = read_array(Path(conditions).expanduser(), key)
        if search_samples + eval_samples > len(rows):
            raise ValueError(
                f"data.conditions={conditions} has {len(rows)} conditions, too few for "
                f"data.search_samples={search_samples} and data.eval_samples={eval_samples} that share none"
            )
        self.conditions = rows[np.random.default_rng(0).permutation(len(rows))]

    def _loader(self, first: int, count: int) -> DataLoader:
        noise = super()._loader(first, count).dataset
        rows = self.conditions[::-1] if first >= HELD_OUT else self.conditions
        return DataLoader(ConditionedDataset(noise, rows[:count].copy()), batch_size=self.batch_size)


def read_array(path: Path, key: str) -> np.ndarray:
    """The array `key` of an .npz file, float32, at least one row. Objects in it are not unpickled."""
    if not path.is_file():
        raise FileNotFoundError(f"conditions {path} do not exist; set data.conditions to an .npz file")
    try:
        with np.load(path) as arrays:
            found = list(arrays)
            array = arrays[key] if key in found else None
    except (OSError, EOFError, ValueError, TypeError, AttributeError, BadZipFile) as error:
        raise ValueError(f"conditions {path} cannot be read as an .npz file: {error}") from None
    if array is None:
        raise ValueError(f"conditions {path} have no array {key!r}; set data.key to one of {', '.join(found)}")
    if array.ndim < 2 or array.dtype.kind not in "fiu":
        raise ValueError(f"conditions {path}: {key} must be numbers with a condition in each row, got {array.shape}")
    return array.astype(np.float32)
