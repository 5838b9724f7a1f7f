"""The split of the search samples: every condition is on both sides, whatever the ranks hold."""

from dataclasses import dataclass

import pytest
import torch

from oss_exp.stepsize import Collective, Problem
from oss_exp.stepsize.split import split_samples


def problem_of(groups: torch.Tensor, num_groups: int, samples=None, collective=None) -> Problem:
    """Return a problem of samples with these conditions."""
    noise = torch.zeros(len(groups), 1)
    return Problem(
        noise=noise,
        samples=samples,
        group=groups,
        num_groups=num_groups,
        collective=collective or Collective(),
    )


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("num_classes", range(1, 13))
def test_conditions_in_turn_are_on_both_sides(num_classes, parts):
    for count in range(parts * num_classes, 3 * parts * num_classes):
        groups = torch.arange(count) % num_classes
        for side in split_samples(problem_of(groups, num_classes), parts):
            assert groups[side].unique().tolist() == list(range(num_classes))


def test_a_few_of_many_classes_are_on_both_sides():
    groups = torch.tensor([3, 141, 59, 265, 358, 979, 323, 846]).repeat(4)
    for side in split_samples(problem_of(groups, 1000)):
        assert len(groups[side].unique()) == 8
        assert len(groups[side]) == 16


@pytest.mark.parametrize("parts", [2, 4])
def test_one_condition_is_split_by_number(parts):
    fits, judges = split_samples(problem_of(torch.zeros(10, dtype=torch.long), 1), parts)
    assert judges.nonzero()[:, 0].tolist() == list(range(parts - 1, 10, parts))
    assert torch.equal(fits, ~judges)


@dataclass
class Gathered(Collective):
    """A rank that receives all ranks' tensors in the order of its calls."""

    results: list[torch.Tensor]

    def gather(self, tensor):
        return self.results.pop(0)


def test_ranks_split_as_one_process_does():
    samples = torch.arange(23)
    groups = samples % 5
    whole = split_samples(problem_of(groups, 5))[1]
    keys = groups * 23 + samples
    order = torch.cat([samples[0::2], samples[1::2]])

    for rank in range(2):
        rows = samples[rank::2]
        collective = Gathered([samples[order], keys[order]])
        part = problem_of(groups[rows], 5, samples[rows], collective)
        assert torch.equal(split_samples(part)[1], whole[rows])
