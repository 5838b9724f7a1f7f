"""Guidance of an exact model: scale, channels, interval, and their cost in network rows."""

import json
from dataclasses import asdict

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from oss_exp.models.families.mixture import GaussianMixture
from oss_exp.models.guidance import NO_CLASS, Guidance
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, nfe, sample
from oss_exp.solvers.heun import Heun

LABELS = torch.tensor([0, 3, 7, 7])
TIMES = torch.tensor([0.9, 0.6, 0.3, 0.1], dtype=torch.float64)


def test_a_configured_guidance_is_written_as_json_and_read_back_equal():
    target = {"_target_": "oss_exp.models.guidance.Guidance"}
    configured = OmegaConf.create({**target, "scale": 2.0, "interval": [0.2, 0.8]})
    record = asdict(instantiate(configured))
    assert json.loads(json.dumps(record)) == record


@pytest.fixture(scope="module")
def digits() -> GaussianMixture:
    return GaussianMixture.from_asset(
        "mixture_digits.safetensors", guidance=Guidance(), micro_batch=3
    ).double()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def on_two_channels(network):
    """Turn a network of one channel into a network of two."""
    return lambda x, t, y: torch.cat([network(x[:, :1], t, y), network(x[:, 1:], t, y)], dim=1)


def test_channels_beyond_the_guided_ones_are_conditional(digits, x):
    both = torch.cat([x, x.flip(0)], dim=1)
    f = Guidance(3.0, channels=1).bind(on_two_channels(digits._velocity), LABELS, 100)
    all_channels = Guidance(3.0).bind(on_two_channels(digits._velocity), LABELS, 100)(both, TIMES)
    conditional = Guidance().bind(on_two_channels(digits._velocity), LABELS, 100)(both, TIMES)
    v = f(both, TIMES)
    torch.testing.assert_close(v[:, :1], all_channels[:, :1])
    torch.testing.assert_close(v[:, 1:], conditional[:, 1:])
    assert (all_channels[:, 1:] - conditional[:, 1:]).abs().max() > 0.01


def test_outside_the_interval_the_velocity_is_conditional(digits, x):
    inside = torch.tensor([False, True, True, False])
    v = digits.velocity(LABELS, Guidance(3.0, interval=[0.2, 0.7]))(x, TIMES)
    guided = digits.velocity(LABELS, Guidance(3.0))(x, TIMES)
    conditional = digits.velocity(LABELS, Guidance(1.0))(x, TIMES)

    torch.testing.assert_close(v[inside], guided[inside])
    torch.testing.assert_close(v[~inside], conditional[~inside])


def network_rows(
    guidance: Guidance, solver, steps: StepSchedule, model: GaussianMixture, noise: torch.Tensor
) -> int:
    """Count the rows of a sample that reach the network."""
    count = 0

    def network(x, t, y):
        nonlocal count
        count += len(x)
        return model._velocity(x, t, y)

    f = guidance.bind(network, LABELS, 100)
    sample(solver, f, noise, steps)
    assert nfe(solver, steps, f) * len(noise) == count

    return count // len(noise)


@pytest.mark.parametrize(
    ("guidance", "euler", "heun"),
    [(Guidance(), 4, 7), (Guidance(2.0), 8, 14), (Guidance(2.0, interval=[0.3, 0.8]), 6, 11)],
)
def test_nfe_is_the_number_of_network_rows(digits, x, guidance, euler, heun):
    steps = StepSchedule(torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64))
    assert network_rows(guidance, Euler(), steps, digits, x) == euler
    assert network_rows(guidance, Heun("t"), steps, digits, x) == heun


def test_the_answers_mix_to_the_velocity_in_and_outside_the_interval(digits, x):
    f = digits.velocity(LABELS, Guidance(2.5, interval=[0.2, 0.7]))
    first, second = f.outputs(x, TIMES)
    torch.testing.assert_close(2.5 * first - 1.5 * second, f(x, TIMES))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_no_class_is_the_whole_mixture(digits, x):
    of_none = digits._velocity(x, TIMES, torch.full((4,), NO_CLASS))
    torch.testing.assert_close(of_none, digits.velocity(None)(x, TIMES))
    mixed = digits._velocity(x, TIMES, torch.tensor([NO_CLASS, 3, NO_CLASS, 7]))
    torch.testing.assert_close(mixed[[0, 2]], of_none[[0, 2]])
    torch.testing.assert_close(mixed[[1, 3]], digits.velocity(LABELS)(x, TIMES)[[1, 3]])


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 1e30},
        {"scale": float("nan")},
        {"scale": 2.0, "channels": 0},
        {"scale": 2.0, "interval": [0.5]},
        {"scale": 2.0, "interval": [0.8, 0.2]},
        {"scale": 2.0, "interval": [0.0, 1.5]},
    ],
)
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(ValueError, match=f"{list(settings)[-1]} must be"):
        Guidance(**settings)
