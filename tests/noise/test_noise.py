"""Paths have their textbook alpha and sigma; noise schedules equal released code and diffusers."""

import math

import numpy as np
import pytest
import torch

from oss_exp.noise import (
    CosinePath,
    DDIMSchedule,
    DDPMPath,
    EDMPath,
    EDMSchedule,
    FlowPath,
    FlowSchedule,
    LogSNRSchedule,
    QuadraticSchedule,
    VPPath,
    VPSchedule,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    shift_time,
)

LINEAR = linear_betas(1000, 1e-4, 0.02)
BETAS = {
    "linear": LINEAR,
    "scaled_linear": scaled_linear_betas(1000, 0.00085, 0.012),
    "cosine": cosine_betas(1000, 0.999),
    "zero_snr": scaled_linear_betas(1000, 0.00085, 0.012, zero_snr=True),
}
# Clean data, fractions below index 0, whole indices, and fractions near the last index.
INDICES = torch.cat(
    [torch.linspace(-1, 2, 61), torch.arange(3.0, 990.0), torch.linspace(990, 999, 55)]
).double()
NATIVE_TIMES = {
    "edm": (EDMPath(), torch.tensor([0, 1e-4, 0.002, 0.3, 1, 7.5, 80], dtype=torch.float64)),
    "flow": (FlowPath(1.0, 1.0), torch.linspace(0, 1, 23, dtype=torch.float64)),
    "flow_shift_3_scale_1000": (
        FlowPath(3.0, 1000.0),
        torch.linspace(0, 1000, 23, dtype=torch.float64),
    ),
    "flow_shift_below_1": (FlowPath(0.4, 1.0), torch.linspace(0, 1, 23, dtype=torch.float64)),
    "cosine": (CosinePath(), torch.linspace(0, 1, 23, dtype=torch.float64)),
    "vp": (VPPath(0.1, 20.0), torch.linspace(0, 1, 23, dtype=torch.float64)),
    **{f"ddpm_{name}": (DDPMPath(betas), INDICES) for name, betas in BETAS.items()},
}
SCHEDULES = {
    "flow": FlowSchedule(1.0),
    "flow_shift_3": FlowSchedule(3.0),
    "edm": EDMSchedule(0.002, 80.0, 7.0),
    "logsnr": LogSNRSchedule(0.002, 80.0),
    "ddim": DDIMSchedule(LINEAR),
    "quadratic": QuadraticSchedule(LINEAR),
    "vp": VPSchedule(0.1, 20.0, 1e-3),
}
SHIFTS = [0.3, 1.0, 3.0, 12.0]


def alphas_cumprod(betas: torch.Tensor) -> np.ndarray:
    """Return the cumulative products of 1 - beta, (T,)."""
    return np.cumprod(1 - betas.numpy())


# --------------------------------------------------------------------------------------------------
# Paths
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NATIVE_TIMES)
def test_native_undoes_canonical(name):
    path, tau = NATIVE_TIMES[name]
    torch.testing.assert_close(path.native(path.canonical(tau)), tau, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NATIVE_TIMES)
def test_canonical_undoes_native(name):
    path, tau = NATIVE_TIMES[name]
    t = torch.linspace(0, 1, 301, dtype=torch.float64) * path.canonical(tau[-1])
    torch.testing.assert_close(path.canonical(path.native(t)), t, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NATIVE_TIMES)
def test_canonical_time_is_0_at_clean_data_and_grows_with_the_native_clock(name):
    path, tau = NATIVE_TIMES[name]
    t = path.canonical(tau)
    assert t[0] == 0
    assert bool((t.diff() > 0).all())
    assert t[-1] <= 1


@pytest.mark.parametrize(
    ("path", "tau", "alpha", "sigma"),
    [
        (EDMPath(), np.array([0.002, 1.0, 80.0]), np.ones(3), np.array([0.002, 1.0, 80.0])),
        (
            FlowPath(1.0, 1.0),
            np.array([0.1, 0.5, 1.0]),
            np.array([0.9, 0.5, 0.0]),
            np.array([0.1, 0.5, 1.0]),
        ),
        # A clock in thousandths, shifted by 3: u = 1/4 is t = 1/2, u = 1/7 is t = 1/3.
        (
            FlowPath(3.0, 1000.0),
            np.array([250.0, 1000 / 7]),
            np.array([1 / 2, 2 / 3]),
            np.array([1 / 2, 1 / 3]),
        ),
        (
            CosinePath(),
            np.array([0.0, 1 / 3, 0.5]),
            np.cos(np.pi / 2 * np.array([0.0, 1 / 3, 0.5])),
            None,
        ),
    ],
    ids=["edm", "flow", "flow_shift", "cosine"],
)
def test_time_is_sigma_share_and_scale_is_alpha_plus_sigma(path, tau, alpha, sigma):
    sigma = np.sqrt(1 - alpha**2) if sigma is None else sigma  # variance preserving
    t = path.canonical(torch.tensor(tau))
    np.testing.assert_allclose(t.numpy(), sigma / (alpha + sigma), rtol=1e-12)
    np.testing.assert_allclose(path.scale(t).numpy(), alpha + sigma, rtol=1e-12)


def test_vp_times_have_the_alpha_and_sigma_of_the_score_sde_code():
    tau = np.array([1e-3, 0.2, 0.6, 1.0])
    log_alpha = -0.25 * tau**2 * (20.0 - 0.1) - 0.5 * tau * 0.1
    alpha = np.exp(log_alpha)
    sigma = np.sqrt(1 - np.exp(2 * log_alpha))
    t = VPPath(0.1, 20.0).canonical(torch.tensor(tau))
    np.testing.assert_allclose(t.numpy(), sigma / (alpha + sigma), rtol=1e-10)
    np.testing.assert_allclose(VPPath(0.1, 20.0).scale(t).numpy(), alpha + sigma, rtol=1e-10)


def test_noise_beyond_the_end_of_the_vp_process_has_its_last_time():
    t = torch.tensor([0.995, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        VPPath(0.1, 20.0).native(t), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-14
    )


def test_the_vp_process_is_the_limit_of_the_linear_chain():
    indices = torch.arange(0, 1000, 37, dtype=torch.float64)
    t = VPPath(0.1, 20.0).canonical((indices + 1) / 1000)
    torch.testing.assert_close(DDPMPath(LINEAR).canonical(indices), t, rtol=0, atol=3e-3)


@pytest.mark.parametrize("name", BETAS)
def test_ddpm_indices_have_the_alpha_and_sigma_of_the_chain(name):
    path = DDPMPath(BETAS[name])
    abar = alphas_cumprod(BETAS[name])
    alpha = np.sqrt(abar)
    sigma = np.sqrt(1 - abar)
    t = path.canonical(torch.arange(1000, dtype=torch.float64))
    np.testing.assert_allclose(t.numpy(), sigma / (alpha + sigma), rtol=1e-12)
    np.testing.assert_allclose(path.scale(t).numpy(), alpha + sigma, rtol=1e-12)


def test_ddpm_fractions_interpolate_log_ratio_above_index_0_and_the_ratio_itself_below():
    path = DDPMPath(LINEAR)
    abar = alphas_cumprod(LINEAR)
    ratio = np.sqrt((1 - abar) / abar)
    expected = np.array(
        [0.75 * ratio[0], ratio[4] ** 0.7 * ratio[5] ** 0.3, np.sqrt(ratio[998] * ratio[999])]
    )
    t = path.canonical(torch.tensor([-0.25, 4.3, 998.5], dtype=torch.float64))

    np.testing.assert_allclose((t / (1 - t)).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("betas", "options"),
    [
        (BETAS["linear"], {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        (
            BETAS["scaled_linear"],
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        (BETAS["cosine"], {"beta_schedule": "squaredcos_cap_v2"}),
        (
            BETAS["zero_snr"],
            {
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "rescale_betas_zero_snr": True,
            },
        ),
    ],
    ids=list(BETAS),
)
def test_ddpm_chain_equals_diffusers(betas, options):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=1000, **options)
    abar = scheduler.alphas_cumprod.double()
    expected = (1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt())

    # The library's chain is float32.
    np.testing.assert_allclose(alphas_cumprod(betas), abar.numpy(), rtol=1e-4)
    t = DDPMPath(betas).canonical(torch.arange(1000, dtype=torch.float64))
    torch.testing.assert_close(t, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", SHIFTS)
def test_shift_time_is_inverted_by_one_over_shift_and_keeps_the_ends(shift):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = shift_time(t, shift)

    torch.testing.assert_close(shift_time(shifted, 1 / shift), t, rtol=1e-12, atol=1e-14)
    assert shifted[0] == 0
    assert shifted[-1] == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_shift_multiplies_sigma_over_alpha(shift):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = shift_time(t, shift)
    odds = shifted[:-1] / (1 - shifted[:-1])
    torch.testing.assert_close(odds, shift * t[:-1] / (1 - t[:-1]), rtol=1e-11, atol=1e-14)


# --------------------------------------------------------------------------------------------------
# Noise schedules
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 200])
@pytest.mark.parametrize("name", SCHEDULES)
def test_nodes_strictly_decrease_from_at_most_1_to_0(name, num_steps):
    nodes = SCHEDULES[name].nodes(num_steps)
    assert nodes.dtype == torch.float64
    assert len(nodes) == num_steps + 1
    assert 0 < nodes[0] <= 1
    assert nodes[-1] == 0
    assert bool((nodes.diff() < 0).all())


@pytest.mark.parametrize("num_steps", [20, 50, 100])
@pytest.mark.parametrize(("grid", "name"), [("uniform", "flow"), ("edm", "edm"), ("ddpm", "ddim")])
def test_nodes_equal_the_grids_of_the_released_search(oss_arrays, grid, name, num_steps):
    ascending = oss_arrays[f"{grid}_N{num_steps}.fm_steps"]
    torch.testing.assert_close(
        SCHEDULES[name].nodes(num_steps), ascending.flip(0), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_nodes_equal_diffusers(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12))
    torch.testing.assert_close(
        FlowSchedule(shift).nodes(12), scheduler.sigmas.double(), rtol=0, atol=1e-6
    )


def test_edm_nodes_equal_diffusers():
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    scheduler.set_timesteps(18)
    sigmas = EDMPath().native(EDMSchedule(0.002, 80.0, 7.0).nodes(18))
    torch.testing.assert_close(sigmas, scheduler.sigmas.double(), rtol=1e-5, atol=0)


def test_logsnr_nodes_are_uniform_in_log_sigma_between_the_ends():
    sigmas = EDMPath().native(LogSNRSchedule(0.01, 50.0).nodes(9))[:-1].numpy()
    np.testing.assert_allclose(sigmas, np.geomspace(50.0, 0.01, 9), rtol=1e-12)


def test_vp_nodes_are_uniform_in_the_process_time_from_1_to_time_min():
    tau = VPPath(0.1, 20.0).native(VPSchedule(0.1, 20.0, 1e-3).nodes(5))
    expected = [1.0, 0.75025, 0.5005, 0.25075, 0.001, 0.0]
    torch.testing.assert_close(tau, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_steps", [4, 10, 28])
def test_ddim_nodes_are_evenly_spaced_integer_indices(num_steps):
    indices = DDPMPath(LINEAR).native(DDIMSchedule(LINEAR).nodes(num_steps))
    expected = [*(round(999 * i / (num_steps - 1)) for i in reversed(range(num_steps))), -1]
    torch.testing.assert_close(
        indices, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8
    )


def test_quadratic_nodes_are_uniform_in_the_square_root_of_the_index():
    indices = DDPMPath(LINEAR).native(QuadraticSchedule(LINEAR).nodes(10))
    expected = math.sqrt(1000) * torch.linspace(1, 0, 11, dtype=torch.float64)
    torch.testing.assert_close((indices + 1).clamp(min=0).sqrt(), expected, rtol=1e-8, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: EDMSchedule(80.0, 0.002, 7.0),
            "sigma_min must be below sigma_max, got 80.0 and 0.002",
        ),
        (lambda: EDMSchedule(0.0, 80.0, 7.0), "sigma_min must be above 0 and .*, got 0"),
        (
            lambda: EDMSchedule(0.002, 1e30, 7.0),
            r"sigma_max must be above 0 and at most 1e\+12, got 1e\+30",
        ),
        (lambda: EDMSchedule(0.002, math.inf, 7.0), "sigma_max must be .* got inf"),
        (lambda: EDMSchedule(0.002, 80.0, 0.0), "rho must be from 0.1 to 100, got 0"),
        (lambda: EDMSchedule(0.002, 80.0, 1e-30), "rho must be .* got 1e-30"),
        (lambda: LogSNRSchedule(1.0, 1.0), "sigma_min must be below sigma_max"),
        (lambda: FlowSchedule(0.0), "shift must be from 1e-06 to .*, got 0"),
        (lambda: FlowSchedule(math.nan), "shift must be .* got nan"),
        (lambda: FlowPath(-1.0, 1.0), "shift must be .* got -1"),
        (lambda: FlowPath(1.0, 0.0), "time_scale must be .* got 0"),
        (lambda: VPPath(0.0, 20.0), "beta_min must be above 0 and at most 100, got 0"),
        (lambda: VPPath(20.0, 0.1), "beta_min must be below beta_max, got 20"),
        (lambda: VPSchedule(20.0, 0.1, 1e-3), "beta_min must be below beta_max, got 20"),
        (lambda: VPSchedule(0.1, 20.0, 0.0), "time_min must be above 0 and below 1, got 0"),
        (lambda: DDPMPath(torch.tensor([0.1])), "at least two"),
        (lambda: DDPMPath(torch.tensor([0.0, 0.1])), r"in \(0, 1\)"),
        (lambda: DDPMPath(torch.tensor([0.1, math.nan])), r"in \(0, 1\)"),
        (lambda: DDPMPath(torch.full((9,), 1e-30)), "float64 cannot tell"),
        (lambda: DDIMSchedule(torch.full((1000,), 0.9)), "float64 cannot tell"),
        (lambda: linear_betas(1), "num_steps must be from 2 to .*, got 1"),
        (lambda: linear_betas(10**12), "num_steps must be from 2 to 1e"),
        (lambda: linear_betas(end=1e30), "end must be at least 1e-09 and below 1"),
        (lambda: scaled_linear_betas(start=-1), "start must be at least 1e-09"),
        (lambda: cosine_betas(max_beta=1), "max_beta must be .* below 1, got 1"),
    ],
)
def test_impossible_physics_is_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("num_steps", [0, -3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_fewer_than_one_step_is_refused(name, num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be from 1 to .*, got {num_steps}"):
        SCHEDULES[name].nodes(num_steps)


def test_a_chain_has_no_more_ddim_steps_than_indices():
    short = DDIMSchedule(linear_betas(20, 1e-4, 0.02))
    assert len(short.nodes(20)) == 21
    with pytest.raises(ValueError, match=r"no 21 distinct times.*fewer steps"):
        short.nodes(21)


def test_the_refusal_of_a_long_chain_fits_on_a_few_lines():
    with pytest.raises(ValueError, match="fewer steps") as error:
        DDIMSchedule(LINEAR).nodes(1001)
    assert len(str(error.value)) < 400
