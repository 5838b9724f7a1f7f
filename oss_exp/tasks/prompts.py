"""Noises, each with a prompt: the condition is the prompt's number in the list that data and model read."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from oss_exp.models.prompts import read_prompts
from oss_exp.tasks.data import HELD_OUT, NoiseData, NoiseDataset


class PromptDataset(Dataset):
    """The items of `noise`, each with its `condition`, a number below num_prompts."""

    def __init__(self, noise: NoiseDataset, num_prompts: int):
        self.noise, self.num_prompts = noise, num_prompts

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, position: int) -> dict[str, Tensor | int]:
        item = self.noise[position]
        place = item["index"] if item["index"] < HELD_OUT else HELD_OUT - 1 - item["index"]
        return {**item, "condition": place % self.num_prompts}


class PromptData(NoiseData):
    """`NoiseData` for a model whose conditions are prompts.

    prompts: their file, as `read_prompts` takes it. Search samples take them from the front, held-out samples from the
    back, and both start again where the list ends; so the held-out ones depend on nothing else, and there are prompts
    in common only where there are more samples than prompts.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        num_classes: int | None,
        prompts: str,
        seed: int,
        search_samples: int,
        eval_samples: int,
        per_sample: int,
        batch_size: int,
    ):
        if num_classes is not None:
            raise ValueError(f"data=prompts has no classes and the model has {num_classes}; choose data=noise")
        super().__init__(event_shape, None, seed, search_samples, eval_samples, per_sample, batch_size, None)
        self.num_prompts = len(read_prompts(prompts))

    def _loader(self, first: int, count: int) -> DataLoader:
        noise = super()._loader(first, count).dataset
        return DataLoader(PromptDataset(noise, self.num_prompts), batch_size=self.batch_size)
