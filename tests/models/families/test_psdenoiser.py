"""The adapter of 21cmPSDenoiser is exact, and agrees with the published package."""

import sys
from pathlib import Path

import exact_denoiser as exact
import pytest
import torch

from oss_exp.distances import XtMSE
from oss_exp.models.families.psdenoiser import LogRange, PSDenoiser
from oss_exp.models.guidance import Guidance
from oss_exp.noise import VPPath, VPSchedule
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.stepsize import OSSShared, Problem

YAML = {"beta_min": 0.1, "beta_max": 20.0, "time_min": 1e-3, "time_scale": 999.0, "micro_batch": 64}
TAUS = [1e-3, 0.02, 0.3, 0.7, 1.0]


def noise(count: int, event=exact.EVENT) -> torch.Tensor:
    return torch.randn(
        count, *event, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def canonical(tau: float) -> torch.Tensor:
    alpha, sigma = exact.alpha_sigma(torch.tensor(tau, dtype=torch.float64))
    return sigma / (alpha + sigma)


# --------------------------------------------------------------------------------------------------
# The adapter, with an exact network
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", TAUS)
def test_the_velocity_is_that_of_the_data_in_canonical_time(tau):
    model = exact.default()
    powers = exact.spectra(3)
    x = noise(3)
    t = canonical(tau)
    mean = exact.mean(model.noisy.scaled(powers))[:, None]
    # Gaussian data at x_t = (1 - t) x0 + t eps.
    surprise = (x - (1 - t) * mean) / ((1 - t) ** 2 * exact.SPREAD**2 + t**2)
    expected = t * surprise - (mean + (1 - t) * exact.SPREAD**2 * surprise)
    result = model.velocity(powers)(x, t.expand(3))

    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


def test_at_cleaner_times_than_in_training_the_clock_is_that_of_the_cleanest():
    model = exact.default()
    powers = exact.spectra(2)
    x = noise(2)
    clock = torch.full((2,), 0.999, dtype=torch.float64)
    eps = exact.ExactNoise()(x, clock, model.noisy.scaled(powers)[:, None])
    torch.testing.assert_close(
        model.velocity(powers)(x, torch.zeros(2, dtype=torch.float64)), eps - x
    )


@pytest.mark.slow
def test_many_small_steps_reach_the_exact_end_of_the_flow():
    model = exact.default()
    powers = exact.spectra(4)
    z = noise(4)
    times = VPSchedule(0.1, 20.0, 1e-3).nodes(4000)
    t = float(times[0])
    result = sample(Euler(), model.velocity(powers), t * z, StepSchedule(times))
    alpha, sigma = exact.alpha_sigma(torch.tensor(1.0, dtype=torch.float64))
    mean = exact.mean(model.noisy.scaled(powers))[:, None]
    spread = (alpha**2 * exact.SPREAD**2 + sigma**2).sqrt()
    expected = mean + exact.SPREAD * (sigma * z - alpha * mean) / spread

    torch.testing.assert_close(result, expected, rtol=0, atol=2e-3)


def test_every_row_has_the_condition_of_its_sample_in_any_micro_batch():
    powers = exact.spectra(3)
    x = noise(6)
    t = torch.full((6,), 0.4, dtype=torch.float64)
    whole = exact.default().velocity(powers)(x, t)
    pieces = exact.build(0.1, 20.0, 1e-3, 999.0, 2, None).velocity(powers)(x, t)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)
    alone = exact.default().velocity(powers[1:2])(x[4:5], t[:1])  # row 4 is sample 1
    torch.testing.assert_close(whole[4:5], alone, rtol=1e-12, atol=1e-12)


def test_powers_are_scaled_in_their_logarithm_and_back():
    scale = LogRange(low=-4.0, decades=10.0)
    powers = torch.tensor([1e-4, 10.0, 1e6], dtype=torch.float64)
    torch.testing.assert_close(
        scale.scaled(powers), torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    )
    torch.testing.assert_close(scale.power(scale.scaled(powers)), powers)
    x0 = torch.tensor([-1.5, -1.0, 0.0, 1.0])
    torch.testing.assert_close(exact.default().decode(x0), torch.tensor([0.0, 0.0, 0.5, 1.0]))


@pytest.mark.parametrize(
    ("condition", "guidance", "words"),
    [
        (None, None, r"denoises given spectra; set data=conditions"),
        (torch.ones(2, 3, 4), None, r"spectra of shape \(4, 3\).*got \(3, 4\)"),
        (torch.zeros(2, 4, 3), None, "must be positive and finite"),
        (torch.full((2, 4, 3), torch.nan), None, "must be positive and finite"),
        (torch.ones(2, 4, 3), Guidance(2.0), "cannot be guided"),
    ],
)
def test_conditions_that_it_cannot_denoise_are_refused(condition, guidance, words):
    with pytest.raises(ValueError, match=words):
        exact.default().velocity(condition, guidance)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "psdenoiser", None)
    with pytest.raises(
        ModuleNotFoundError,
        match=r"pip install 'oss_exp\[psdenoiser\]'.*--no-deps 21cmpsdenoiser==1",
    ):
        PSDenoiser.from_package(**YAML, checkpoint=None)


# --------------------------------------------------------------------------------------------------
# The published package
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip("psdenoiser", reason="21cmpsdenoiser is not installed")


@pytest.fixture(scope="module")
def published(package):
    return PSDenoiser.from_package(**YAML, checkpoint=None)


def test_the_published_weights_are_those_that_were_measured(published):
    assert (
        published.fingerprint == "6dd1962bfeb535826b32dbd3626e2349dda4e33b7fb68adcc2d1c48b761ec934"
    )
    assert sum(weights.numel() for weights in published.parameters()) == 9_118_961
    assert published.event_shape == (1, 32, 16)
    assert not published.network.training


@pytest.mark.parametrize("tau", [0.02, 0.4, 0.95])
def test_the_flow_is_that_of_the_packages_own_sampler(package, published, tau):
    powers = 10 ** torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
    sde = package.VPSDE(beta_min=0.1, beta_max=20.0)
    x = noise(2, (1, 32, 16)).float()
    sampler = package.GetODESampler(sde, x.shape, device="cpu")
    noisy = torch.from_numpy(package.DenoiserInput().normalize_noisy(powers.numpy()))[:, None]
    expected = sampler.drift_fn(published.network, x, torch.full((2,), tau), x_cdn=noisy)
    # dx / dtau, with x = scale(t) x_t and dx_t / dt = v.
    clock = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    t = published.path.canonical(clock)
    scale = published.path.scale(t)
    (dt,) = torch.autograd.grad(t, clock, retain_graph=True)
    (dscale,) = torch.autograd.grad(scale, clock)
    scale = float(scale.detach())
    v = published.velocity(powers)(x / scale, t.detach().expand(2))
    drift = float(dscale) * x / scale + scale * float(dt) * v

    torch.testing.assert_close(drift, expected, rtol=1e-3, atol=1e-3)


def test_a_search_runs_on_a_tiny_network_of_the_packages_class(package):
    torch.manual_seed(0)

    model = PSDenoiser(
        package.UNet(dim=(8, 8), channels=2, dim_mults=(1, 2, 4, 8)),
        VPPath(0.1, 20.0),
        time_min=1e-3,
        time_scale=999.0,
        noisy=LogRange(-4.0, 13.0),
        clean=LogRange(-3.5, 11.0),
        event_shape=(1, 8, 8),
        micro_batch=64,
        name="tiny",
        fingerprint="",
    )

    velocity = model.velocity(10 ** torch.randn(2, 8, 8))
    grid = VPSchedule(0.1, 20.0, 1e-3).nodes(8)
    z = float(grid[0]) * noise(2, (1, 8, 8)).float()
    steps = OSSShared("pinned", None, False, "mean").plan(
        Problem(velocity, z, grid, Euler(), XtMSE()), [3]
    )[3]
    x0 = sample(Euler(), velocity, z, steps)
    teacher = sample(Euler(), velocity, z, StepSchedule(grid))

    assert 0 < float((x0 - teacher).square().mean()) < float(teacher.square().mean())
    assert model.decode(x0).shape == (2, 1, 8, 8)


def test_importing_the_package_leaves_the_random_numbers_alone(package, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "psdenoiser"]:
        monkeypatch.delitem(sys.modules, name)  # it seeds torch when first imported
    torch.manual_seed(5)
    with pytest.raises(FileNotFoundError):
        PSDenoiser.from_package(**YAML, checkpoint="nowhere.pt")
    assert torch.initial_seed() == 5


def _write(path: Path, content) -> None:
    """Write bytes as they are, and other contents as a torch file."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)


@pytest.mark.parametrize(
    "content",
    [b"", b"not weights", {"other": torch.zeros(2)}, [1, 2], Path("code")],
    ids=["empty", "garbage", "other_network", "no_state", "pickled_code"],
)
def test_files_without_the_networks_weights_are_refused(package, tmp_path, content):
    _write(file := tmp_path / "weights.pt", content)
    with pytest.raises(
        ValueError,
        match=r"weights\.pt holds no weights of 21cmPSDenoiser's U-Net: .*checkpoint=null",
    ):
        PSDenoiser.from_package(**YAML, checkpoint=str(file))


def test_a_missing_checkpoint_is_refused(package):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere\.pt do not exist; set model\.checkpoint=null"
    ):
        PSDenoiser.from_package(**YAML, checkpoint="nowhere.pt")
