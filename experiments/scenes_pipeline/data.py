"""Scenes of coloured garments, by number."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch.utils.data import Subset

from experiments.common import configuration
from oss_exp.data.scenes import FashionScenes


@lru_cache
def _all() -> FashionScenes:
    return FashionScenes(configuration("task=pretrain", "images=fashion_scenes").images.root)


def scenes(numbers: Sequence[int]) -> Subset:
    """Return the scenes of these numbers.

    Each is ((3, 64, 64) in [-1, 1], number of the caption).
    """
    return Subset(_all(), [number % len(_all()) for number in numbers])
