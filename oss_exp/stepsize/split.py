"""The split of the search samples into those that fit a schedule and those that judge it.

Legend: B samples of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oss_exp.stepsize.problem import Problem


def split_samples(problem: Problem, parts: int = 2) -> tuple[Tensor, Tensor]:
    """Return which of this rank's samples fit a schedule, and which judge it.

    The samples of all ranks are ordered by condition, then by number, and every
    `parts`-th of them judges. So conditions are on both sides wherever they have `parts`
    samples or more, in whatever turn they come, and with a single condition the numbers
    alone decide. The ranks' shares do not matter.

    Args:
        problem: the search set.
        parts: one of so many samples judges.

    Returns:
        Two complementary masks (B,) bool. With fewer than `parts` samples nobody judges.
    """
    collective = problem.collective
    last = collective.gather(problem.samples).max()
    keys = problem.group * (last + 1) + problem.samples
    position = torch.searchsorted(collective.gather(keys).sort().values, keys)
    judges = position % parts == parts - 1
    return ~judges, judges
