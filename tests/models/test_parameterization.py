"""A network's exact answer gives the exact velocity, whatever it predicts."""

import copy

import pytest
import torch

from oss_exp.models.parameterization import (
    DataPrediction,
    EDMPrediction,
    FlowVelocity,
    NoisePrediction,
    VPVelocity,
)
from oss_exp.noise import CosinePath, DDPMPath, EDMPath, FlowPath, linear_betas

PATHS = [
    FlowPath(1.0, 1000.0),
    FlowPath(3.0, 1.0),
    CosinePath(),
    DDPMPath(linear_betas(1000, 1e-4, 0.02)),
    EDMPath(),
]
KINDS = [EDMPrediction(0.5, 0.002, 80.0, 1.0), EDMPrediction(0.8, 0.01, 50.0, 1000.0)]
for path in PATHS:
    KINDS += [FlowVelocity(path), NoisePrediction(path, 0.99), DataPrediction(path, 1e-3)]
EVERY = pytest.mark.parametrize(
    "kind", KINDS, ids=lambda kind: f"{type(kind).__name__}-{type(kind.path).__name__}"
)


def triple(t: float) -> tuple[torch.Tensor, ...]:
    """Return x0, noise, the state between them and its times, for three rows."""
    x0, noise = torch.randn(
        2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    return x0, noise, (1 - t) * x0 + t * noise, torch.full((3,), t, dtype=torch.float64)


@EVERY
@pytest.mark.parametrize("t", [0.002, 0.1, 0.5, 0.9, 0.985])
def test_the_right_answer_gives_the_velocity(kind, t):
    x0, noise, x, time = triple(t)
    v = kind.velocity(kind.target(x0, noise, time), x, time)
    torch.testing.assert_close(v, noise - x0, rtol=1e-9, atol=1e-9)


@EVERY
@pytest.mark.parametrize("t", [0.0, 1e-6, 0.5, 0.99, 1.0])
def test_inputs_and_velocities_are_finite_at_both_ends(kind, t):
    if isinstance(kind, FlowVelocity | DataPrediction) and isinstance(kind.path, EDMPath):
        t = min(t, 0.99)  # a variance-exploding state is infinite at t = 1
    _, noise, x, time = triple(t)
    question, clock = kind.inputs(x.float(), time)
    assert question.dtype == clock.dtype == torch.float32
    assert question.isfinite().all()
    assert clock.isfinite().all()
    assert kind.velocity(noise, x, time).isfinite().all()


@pytest.mark.parametrize("kind", [FlowVelocity(), DataPrediction()])
@pytest.mark.parametrize("t", [0.01, 0.3, 0.9])
def test_the_loss_is_the_error_of_the_velocity(kind, t):
    x0, noise, x, time = triple(t)
    output = torch.sin(3 * x)
    target = kind.target(x0, noise, time)
    difference = kind.velocity(output, x, time) - kind.velocity(target, x, time)
    torch.testing.assert_close(kind.loss(output, target, time), difference.square().mean())


def test_edm_is_the_denoiser_of_karras_et_al():
    """Karras et al. 2022, eq. 7 and table 1: D = c_skip x + c_out F(c_in x; ln(sigma) / 4)."""
    kind = EDMPrediction(0.5, 0.002, 80.0, 1.0)
    sigma = 3.0
    sd = 0.5
    x0, noise, x, t = triple(sigma / (1 + sigma))
    native = x0 + sigma * noise
    question, clock = kind.inputs(x, t)

    torch.testing.assert_close(question, native / (sigma**2 + sd**2) ** 0.5)
    torch.testing.assert_close(clock, torch.full((3,), sigma, dtype=torch.float64).log() / 4)

    output = torch.sin(question)
    skip = sd**2 / (sigma**2 + sd**2)
    out = sigma * sd / (sigma**2 + sd**2) ** 0.5
    denoised = skip * native + out * output

    torch.testing.assert_close(x - t[0] * kind.velocity(output, x, t), denoised)
    torch.testing.assert_close(kind.target(x0, noise, t), (x0 - skip * native) / out)


def test_edm_targets_have_unit_variance():
    """For data of variance sigma_data^2, preconditioning gives targets of variance 1 at every t."""
    kind = EDMPrediction(0.8, 0.002, 80.0, 1.0)
    x0, noise = torch.randn(
        2, 20000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    for t in (0.01, 0.3, 0.9):
        time = torch.full((20000,), t, dtype=torch.float64)
        x = (1 - t) * 0.8 * x0 + t * noise
        assert kind.target(0.8 * x0, noise, time).var() == pytest.approx(1, abs=0.03)
        assert kind.inputs(x, time)[0].var() == pytest.approx(1, abs=0.03)


def test_a_noise_network_is_called_at_no_later_time_than_in_training():
    kind = NoisePrediction(DDPMPath(linear_betas(1000, 1e-4, 0.02)), 0.9936)
    _, noise, x, late = triple(0.9999)
    assert torch.equal(kind.inputs(x, late)[1], kind.inputs(x, torch.full_like(late, 0.9936))[1])
    assert kind.velocity(noise, x, late).abs().max() < 1000


@pytest.mark.parametrize(
    "kind",
    [
        FlowVelocity(PATHS[0]),
        NoisePrediction(PATHS[2], 0.99),
        DataPrediction(PATHS[4], 1e-3),
        KINDS[0],
    ],
)
def test_copies_are_independent_and_frozen(kind):
    _, _, x, time = triple(0.5)
    network_input, _ = kind.inputs(x, time)
    assert torch.equal(copy.deepcopy(kind).inputs(x, time)[0], network_input)
    with pytest.raises(AttributeError):
        kind.path = None


@pytest.mark.parametrize(
    "make",
    [
        lambda: NoisePrediction(PATHS[0], 1.0),
        lambda: DataPrediction(PATHS[0], 0.0),
        lambda: EDMPrediction(0.0, 0.002, 80.0, 1.0),
        lambda: EDMPrediction(0.5, -1.0, 80.0, 1.0),
        lambda: EDMPrediction(0.5, 0.002, 80.0, 1e30),
        lambda: VPVelocity(PATHS[0], 1.01),
    ],
)
def test_settings_without_meaning_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()
