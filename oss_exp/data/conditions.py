"""Noises with conditions that are not classes: rows of an array (images to denoise), or prompts."""

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
    """A sample with a condition that is not a class."""

    condition: Tensor


class ConditionedDataset(Dataset[ConditionedItem]):
    """Samples with conditions.

    Args:
        noise: The samples.
        conditions: A condition for each of the first samples, shape (n, ...).
    """

    def __init__(self, noise: Dataset[NoiseItem], conditions: np.ndarray):
        self.noise = noise
        self.conditions = conditions

    def __len__(self) -> int:
        return len(self.conditions)

    def __getitem__(self, position: int) -> ConditionedItem:
        return {**self.noise[position], "condition": torch.as_tensor(self.conditions[position])}


class ConditionedData(NoiseData):
    """Search and held-out noises for a model whose conditions are not classes.

    Search samples have the first conditions, held-out samples the last ones; both start
    again where they end. So the held-out ones depend on nothing else, and conditions
    are shared only where there are more samples than conditions.

    Args:
        conditions: Shape (n, ...).
        event_shape: As for `NoiseData`, and so are the arguments below.
        num_classes: Must be None.
        seed: Seed of the noises.
        search_samples: Size of the search set.
        eval_samples: Size of the held-out set.
        per_sample: Held-out noises for strategies that plan a schedule for each sample.
        batch_size: Samples in a batch.
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
        """Return `count` samples from number `first` on, with their conditions."""
        places = np.arange(count)
        rows = (-1 - places if first == HELD_OUT else places) % len(self.conditions)
        return ConditionedDataset(super().noises(first, count), self.conditions[rows])


class ConditionedNoiseData(ConditionedData):
    """Noises with the rows of an array as conditions.

    Rows are shuffled in the same way for every seed. Search and held-out samples must
    not share any.

    Args:
        event_shape: As for `NoiseData`.
        num_classes: Must be None.
        conditions: An .npz file.
        key: Its array, with a condition in every row.
        seed: As for `NoiseData`, and so are the arguments below.
        search_samples: Size of the search set.
        eval_samples: Size of the held-out set.
        per_sample: Held-out noises for strategies that plan a schedule for each sample.
        batch_size: Samples in a batch.
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
                f"search_samples={self.search_samples} and eval_samples={self.eval_samples} "
                "that share none"
            )


class PromptData(ConditionedData):
    """Noises with prompts. A condition is a prompt's number in the file.

    Args:
        event_shape: As for `NoiseData`.
        num_classes: Must be None.
        prompts: A file as `read_prompts` takes it.
        seed: As for `NoiseData`, and so are the arguments below.
        search_samples: Size of the search set.
        eval_samples: Size of the held-out set.
        per_sample: Held-out noises for strategies that plan a schedule for each sample.
        batch_size: Samples in a batch.
    """

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
        texts = read_prompts(prompts)
        noises = seed, search_samples, eval_samples, per_sample, batch_size
        super().__init__(np.arange(len(texts)), event_shape, num_classes, *noises)
        self.prompts = texts


def read_array(path: Path, key: str) -> np.ndarray:
    """Read an array of conditions from an .npz file, without unpickling objects.

    Args:
        path: The file.
        key: Name of the array.

    Returns:
        Shape (n, ...), n >= 1, float32.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or has no such array of numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"conditions {path} do not exist; set data.conditions to an .npz file"
        )
    arrays = load_arrays(path, "conditions", "make the file again with numpy.savez", {key})

    # The array.
    array = arrays.get(key)
    if array is None:
        names = ", ".join(list(arrays)[:20])
        raise ValueError(
            f"conditions {path} have no array {key!r}; set data.key to one of {names:.400}"
        )
    if array.ndim < 2 or array.dtype.kind not in "fiu":
        raise ValueError(
            f"conditions {path}: {key} must be numbers, a condition in each row, "
            f"got {array.shape!s:.80}"
        )
    return array.astype(np.float32)
