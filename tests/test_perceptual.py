"""The perceptual distance sees a layer's output for each row, whatever the batching and the guidance."""

import pytest
import torch

from oss_exp.distances import Perceptual, Select
from oss_exp.noise import FlowSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.stepsize import OSSShared, Problem
from oss_exp.velocity import BoundVelocity


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh()).double()
        self.outer = torch.nn.Linear(5, 3).double()
        self.unused = torch.nn.Identity()

    def velocity(self, condition, mix=(1.0,), micro_batch=100) -> BoundVelocity:
        def fn(x, t, y):
            shift = 0 if y is None else y[:, None]
            answers = [self.outer(self.inner(x * t[:, None] + shift * r)) for r in range(len(mix))]
            return answers[0] if len(mix) == 1 else torch.stack(answers, dim=1)

        return BoundVelocity(fn, condition, micro_batch, mix)


@pytest.fixture(scope="module")
def net() -> Net:
    return Net()


def states(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator).double(), torch.rand(
        count, generator=generator
    ).double()


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 100])
def test_the_features_are_the_layers_output_whatever_the_micro_batch(net, micro_batch):
    x, t = states(6)
    found = (
        Perceptual("inner", 0.0)
        .bind(net)
        .features(x, t, net.velocity(None, micro_batch=micro_batch))
    )
    torch.testing.assert_close(found, net.inner(x * t[:, None]))


@pytest.mark.parametrize("micro_batch", [1, 4, 100])
def test_under_guidance_both_calls_are_compared(net, micro_batch):
    (x, t) = states(6)
    y = torch.tensor([1.0, 2.0, 3.0])
    found = (
        Perceptual("inner", 0.0).bind(net).features(x, t, net.velocity(y, (2.0, -1.0), micro_batch))
    )
    expected = [net.inner(x * t[:, None] + y.repeat(2)[:, None] * r) for r in range(2)]
    torch.testing.assert_close(found, torch.cat(expected, dim=1))


@pytest.mark.parametrize("norm", [1, 2])
def test_identity_symmetry_and_rows_of_their_own(net, norm):
    distance = Perceptual("inner", 0.0, norm=norm).bind(net)
    (x, t) = states(4)
    (y, _) = states(4, seed=1)
    a, b = (distance.features(rows, t, net.velocity(None)) for rows in (x, y))
    assert distance.between(a, a).tolist() == [0] * 4
    assert torch.equal(distance.between(a, b), distance.between(b, a))
    y[2] += 1
    changed = distance.between(a, distance.features(y, t, net.velocity(None))) != distance.between(
        a, b
    )

    assert changed.tolist() == [False, False, True, False]


def test_clean_data_is_shown_at_the_least_time(net):
    x, _ = states(3)
    distance = Perceptual("inner", 0.25).bind(net)
    clean, least = (
        distance.features(x, torch.full((3,), t).double(), net.velocity(None)) for t in (0.0, 0.25)
    )
    assert torch.equal(clean, least)


def test_a_search_by_responsibilities_replays(mixture, gmm):
    distance = Perceptual("responsibilities", 0.001).bind(mixture)
    problem = Problem(
        mixture.velocity(None), gmm["z"], FlowSchedule(1.0).nodes(12), Euler(), distance
    )
    steps = OSSShared("free", None, True, "mean").plan(problem, [3])[3]
    end = torch.tensor([12])
    found = problem.cost(sample(Euler(), problem.velocity, problem.noise, steps), end).mean()
    uniform = problem.cost(problem.teacher.states[0] * 0 + gmm["means"][0], end).mean()

    assert 0 < found < uniform


@pytest.mark.parametrize("layer", ["", "nowhere", "inner.7"])
def test_an_unknown_layer_is_refused_with_the_known_ones(net, layer):
    with pytest.raises(ValueError, match=r"not a layer of the model; it has inner, inner\.0"):
        Perceptual(layer, 0.0).bind(net)


def test_a_layer_that_does_not_run_is_refused(net):
    with pytest.raises(ValueError, match="unused does not run"):
        Perceptual("unused", 0.0).bind(net).features(*states(2), net.velocity(None))


def test_select_binds_what_it_wraps(net):
    assert (
        Select(Perceptual("inner", 0.0), frames=None, channels=2).bind(net).distance.module
        is net.inner
    )
