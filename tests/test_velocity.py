"""A bound velocity has one condition per sample, runs in micro-batches, and mixes guidance."""

import pytest
import torch
from references import difference, float64

from oss_exp.models.guidance import Guidance
from oss_exp.velocity import BoundVelocity, joined


@pytest.fixture
def rows(gmm):
    """States and times of 6 rows for 3 samples, and the samples' classes."""
    return gmm["fm_x"][:6], float64(0.9, 0.5, 0.2, 0.8, 0.4, 0.1), torch.tensor([4, 0, 7])


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5, 100])
def test_row_m_has_condition_m_mod_b_whatever_the_micro_batch(micro_batch, mixture, rows):
    x, t, label = rows
    sizes = []

    def network(x, t, y):
        sizes.append(len(x))
        return mixture.velocity(y)(x, t)

    v = BoundVelocity(network, label, micro_batch)(x, t)
    assert max(sizes) <= micro_batch
    assert sum(sizes) == 6
    for m in range(6):
        alone = mixture.velocity(label[m % 3 : m % 3 + 1])(x[m : m + 1], t[m : m + 1])
        assert difference(v[m], alone[0]) < 1e-12


def test_no_rows_at_a_time_are_refused():
    with pytest.raises(ValueError, match="at least 1 row, got 0"):
        BoundVelocity(lambda x, t, y: x, None, micro_batch=0)


def test_conditions_of_any_shape_are_tiled_whole():
    condition = torch.arange(12.0).reshape(3, 2, 2)
    velocity = BoundVelocity(lambda x, t, y: x + y, condition, micro_batch=4)
    v = velocity(torch.zeros(6, 2, 2), torch.zeros(6))
    assert torch.equal(v, torch.cat([condition, condition]))


def test_an_offloaded_network_gets_a_micro_batch_at_a_time(mixture, rows):
    """On torch's meta device, which has shapes but no numbers."""
    x, t, label = rows
    calls = []

    def network(x, t, y):
        calls.append((x.device.type, t.device.type, y.device.type, len(x)))
        return torch.zeros(x.shape)

    v = BoundVelocity(network, label.to("meta"), 4).offloaded(torch.device("meta"))(x, t)
    assert calls == [("meta", "meta", "meta", 4), ("meta", "meta", "meta", 2)]
    assert v.device.type == "cpu"


def test_a_network_offloaded_to_its_device_gives_the_same(mixture, rows):
    x, t, label = rows
    here = mixture.velocity(label, Guidance(1.5))
    assert torch.equal(here.offloaded(torch.device("cpu"))(x, t), here(x, t))


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_a_subset_gives_the_rows_of_the_whole(guidance, mixture, rows):
    x, t, label = rows
    f = mixture.velocity(label, Guidance(guidance))
    chosen = torch.tensor([2, 0])
    part = f.subset(chosen)
    assert part.mix == f.mix
    assert difference(part(x[:3][chosen], t[:3][chosen]), f(x[:3], t[:3])[chosen]) < 1e-12

    free = mixture.velocity(None)
    assert torch.equal(free.subset(chosen)(x, t), free(x, t))


def test_guidance_mixes_the_outputs_with_and_without_the_condition(mixture, rows):
    x, t, label = rows
    guided = mixture.velocity(label, Guidance(1.5))
    outputs = [mixture.velocity(y)(x, t) for y in (label, None)]

    assert guided.rows_at(float64(0.5)).tolist() == [2]
    assert guided.raw(x, t).shape == (6, 2, 64)
    assert difference(torch.stack(guided.outputs(x, t)), torch.stack(outputs)) < 1e-12
    assert difference(guided(x, t), outputs[1] + 1.5 * (outputs[0] - outputs[1])) < 1e-12
    assert torch.equal(guided.combine(guided.outputs(x, t)), guided(x, t))


def test_without_guidance_the_one_output_is_the_velocity(mixture, rows):
    x, t, label = rows
    bound = mixture.velocity(label)
    for f in (bound, BoundVelocity.of(lambda x, t: bound(x, t))):
        (output,) = f.outputs(x, t)
        assert torch.equal(output, bound(x, t))
        assert f.combine([output]) is output


# ----------------------------------------------------------------------------------------------
# Several velocities as one
# ----------------------------------------------------------------------------------------------


def scaled(scales: list[float], classes: torch.Tensor) -> list[BoundVelocity]:
    """Return velocities g (t + c) x of samples with classes c (B,)."""

    def bound(scale: float) -> BoundVelocity:
        return BoundVelocity(lambda x, t, c: scale * (t + c)[:, None] * x, classes, micro_batch=3)

    return [bound(scale) for scale in scales]


def test_joined_velocities_serve_their_own_samples():
    classes = torch.tensor([0.0, 1.0, 2.0])
    velocities = scaled([1.0, 3.0], classes)
    x = torch.randn(3 * 2 * 2, 5)
    t = torch.rand(3 * 2 * 2)

    result = joined(velocities)(x, t).unflatten(0, (2, 3, 2))
    for number, velocity in enumerate(velocities):
        rows = torch.arange(12).unflatten(0, (2, 3, 2))[:, :, number].flatten()
        expected = velocity(x[rows], t[rows])
        assert torch.equal(result[:, :, number].flatten(0, 1), expected)


def test_some_samples_of_joined_velocities_are_as_in_all():
    velocity = joined(scaled([1.0, 3.0], torch.tensor([0.0, 1.0, 2.0])))
    x = torch.randn(6, 5)
    t = torch.rand(6)
    samples = torch.tensor([5, 0, 3])
    assert torch.equal(velocity.subset(samples)(x[samples], t[samples]), velocity(x, t)[samples])


def test_velocities_without_conditions_are_not_joined():
    with pytest.raises(ValueError, match="each sample has a condition"):
        joined([BoundVelocity(), BoundVelocity()])
