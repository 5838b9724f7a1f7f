"""The perceptual distance compares a layer's outputs, for any batching and guidance."""

import pytest
import torch

from oss_exp.distances import Perceptual, Select
from oss_exp.noise import FlowSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.stepsize import OSSShared, Problem
from oss_exp.tasks.call_log import Calls
from oss_exp.velocity import BoundVelocity


class Net(torch.nn.Module):
    """A small network with an inner, an outer and an unused layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh()).double()
        self.outer = torch.nn.Linear(5, 3).double()
        self.unused = torch.nn.Identity()

    def velocity(self, condition, mix=(1.0,), micro_batch=100) -> BoundVelocity:
        def fn(x, t, y):
            shift = 0 if y is None else y[:, None]
            outputs = [self.outer(self.inner(x * t[:, None] + shift * r)) for r in range(len(mix))]
            return outputs[0] if len(mix) == 1 else torch.stack(outputs, dim=1)

        return BoundVelocity(fn, condition, micro_batch, mix)


@pytest.fixture(scope="module")
def net() -> Net:
    return Net()


def states(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return states (count, 3) and their times (count,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator).double()
    return x, torch.rand(count, generator=generator).double()


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 100])
def test_the_features_are_the_layers_output_whatever_the_micro_batch(net, micro_batch):
    x, t = states(6)
    distance = Perceptual("inner", 0.0).bind(net)
    features = distance.features(x, t, net.velocity(None, micro_batch=micro_batch))
    torch.testing.assert_close(features, net.inner(x * t[:, None]))


@pytest.mark.parametrize("micro_batch", [1, 4, 100])
def test_under_guidance_both_calls_are_compared(net, micro_batch):
    x, t = states(6)
    y = torch.tensor([1.0, 2.0, 3.0])
    distance = Perceptual("inner", 0.0).bind(net)
    features = distance.features(x, t, net.velocity(y, (2.0, -1.0), micro_batch))
    expected = [net.inner(x * t[:, None] + y.repeat(2)[:, None] * r) for r in range(2)]
    torch.testing.assert_close(features, torch.cat(expected, dim=1))


@pytest.mark.parametrize("norm", [1, 2])
def test_the_distance_is_symmetric_and_0_between_equals(net, norm):
    distance = Perceptual("inner", 0.0, norm=norm).bind(net)
    x, t = states(4)
    y, _ = states(4, seed=1)
    a = distance.features(x, t, net.velocity(None))
    b = distance.features(y, t, net.velocity(None))

    assert distance.between(a, a).tolist() == [0] * 4
    assert torch.equal(distance.between(a, b), distance.between(b, a))


@pytest.mark.parametrize("norm", [1, 2])
def test_changing_one_row_changes_only_its_value(net, norm):
    distance = Perceptual("inner", 0.0, norm=norm).bind(net)
    x, t = states(4)
    y, _ = states(4, seed=1)
    a = distance.features(x, t, net.velocity(None))
    before = distance.between(a, distance.features(y, t, net.velocity(None)))

    y[2] += 1
    after = distance.between(a, distance.features(y, t, net.velocity(None)))

    assert (after != before).tolist() == [False, False, True, False]


def test_clean_data_is_shown_at_the_least_time(net):
    x, _ = states(3)
    distance = Perceptual("inner", 0.25).bind(net)

    def features(t: float) -> torch.Tensor:
        return distance.features(x, torch.full((3,), t).double(), net.velocity(None))

    assert torch.equal(features(0.0), features(0.25))


def test_a_search_by_responsibilities_beats_a_mean_of_the_mixture(mixture, gmm):
    distance = Perceptual("responsibilities", 0.001).bind(mixture)
    grid = FlowSchedule(1.0).nodes(12)
    problem = Problem(mixture.velocity(None), gmm["z"], grid, Euler(), distance)
    steps = OSSShared("free", None, True, "mean").plan(problem, [3])[3]
    end = torch.tensor([12])
    cost = problem.cost(sample(Euler(), problem.velocity, problem.noise, steps), end).mean()
    uniform = problem.cost(problem.teacher.states[0] * 0 + gmm["means"][0], end).mean()

    assert 0 < cost < uniform


@pytest.mark.parametrize("layer", ["", "nowhere", "inner.7"])
def test_an_unknown_layer_is_refused_with_the_known_ones(net, layer):
    with pytest.raises(ValueError, match=r"not a layer of the model; it has inner, inner\.0"):
        Perceptual(layer, 0.0).bind(net)


def test_a_layer_that_does_not_run_is_refused(net):
    with pytest.raises(ValueError, match="unused does not run"):
        Perceptual("unused", 0.0).bind(net).features(*states(2), net.velocity(None))


def test_select_binds_what_it_wraps(net):
    distance = Select(Perceptual("inner", 0.0), frames=None, channels=2).bind(net)
    assert distance.distance.module is net.inner


def test_a_search_whose_answers_are_in_a_log_gives_the_same_schedule(net, tmp_path):
    log = Calls(tmp_path, rank=0)
    velocity = log.recorded(net.velocity(None))
    grid = FlowSchedule().nodes(8)
    distance = Perceptual("inner", 0.05).bind(net)
    schedules = []
    for _ in range(2):
        problem = Problem(velocity, states(4)[0], grid, Euler(), distance)
        with log.of("work"):
            schedules.append(OSSShared("pinned", None, False, "mean").plan(problem, [3])[3])
    assert schedules[0].times.tolist() == schedules[1].times.tolist()
