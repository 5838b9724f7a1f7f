"""Solvers have the order they claim, equal the formulas they are named after, and count their network calls."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from oss_exp.noise import CosinePath, DDPMPath, EDMPath, GaussianPath, linear_betas
from oss_exp.solvers import AdamsBashforth, BoundVelocity, Euler, Heun, LinearMultistep, State, sample, trajectory, walk
from oss_exp.steps import StepSchedule

SOLVERS = [Euler(), Heun(), AdamsBashforth(2), AdamsBashforth(3), AdamsBashforth(4)]


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Counting:
    """A velocity that keeps the times it was asked for, one list of rows per call."""

    def __init__(self, fn):
        self.fn, self.times = fn, []

    def __call__(self, x, t):
        self.times.append(t.tolist())
        return self.fn(x, t)


# --------------------------------------------------------------------------------------------------------------
# Accuracy
# --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact(gmm, velocity):
    """t -> the states of four samples at t in [0.3, 0.95], by SciPy's eighth-order method."""
    start = gmm["z"][:4]

    def slope(t: float, x: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(x).reshape(start.shape)
        return velocity(rows, torch.full((4,), t, dtype=torch.float64)).flatten().numpy()

    times = (0.95, 0.3)
    run = solve_ivp(slope, times, start.flatten().numpy(), "DOP853", dense_output=True, rtol=1e-12, atol=1e-13)
    return lambda t: torch.from_numpy(run.sol(float(t))).reshape(start.shape)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_the_error_falls_with_the_order(solver, velocity, exact):
    """A multistep solver gets its first velocities from the exact solution: its own warm-up is of lower order."""
    counts = np.array([64, 128, 256, 512])
    errors = []
    for count in counts:
        times = torch.linspace(0.95, 0.3, count + 1, dtype=torch.float64)
        known = solver.order - 1 if isinstance(solver, LinearMultistep) else 0
        past = [t.expand(4) for t in times[:known].flip(0)]
        outputs = tuple(velocity(exact(t[0]), t) for t in past)
        state = State(exact(times[known]), times[known].expand(4), outputs, tuple(past))
        for t_next in times[known + 1 :]:
            state = solver.advance(velocity, solver.observe(velocity, state), t_next)
        errors.append((state.x - exact(0.3)).square().mean().sqrt().item())
    slope = np.polyfit(np.log(1 / counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(solver.order, abs=0.2)


@pytest.mark.parametrize(
    ("order", "weights"),
    [
        (1, [1]),
        (2, [3 / 2, -1 / 2]),
        (3, [23 / 12, -16 / 12, 5 / 12]),
        (4, [55 / 24, -59 / 24, 37 / 24, -9 / 24]),
    ],
)
def test_adams_bashforth_has_the_textbook_weights_on_even_steps(order, weights):
    times = [float64(0.5 + 0.1 * h) for h in range(order)]
    a, b = AdamsBashforth(order).coefficients(times, float64(0.4))
    assert float(a) == 1
    assert [float(weight) for weight in b] == pytest.approx([-0.1 * weight for weight in weights], rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_bashforth_integrates_polynomials_exactly_on_uneven_steps(order):
    times = [float64(t) for t in (0.3, 0.55, 0.6, 0.95)[:order]]
    _, b = AdamsBashforth(order).coefficients(times, float64(0.05))
    for power in range(order):
        found = sum(weight * time**power for weight, time in zip(b, times, strict=True))
        exact = (0.05 ** (power + 1) - 0.3 ** (power + 1)) / (power + 1)
        assert float(found) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("order", [0, 5, "two", 2.5])
def test_a_wrong_order_is_refused(order):
    with pytest.raises(ValueError, match="order must be 1, 2, 3 or 4"):
        AdamsBashforth(order)


@pytest.mark.parametrize("grid", ["uniform", "edm", "ddpm"])
def test_euler_reproduces_the_teacher_of_the_released_search(grid, gmm, velocity, oss_arrays):
    ascending = oss_arrays[f"{grid}_N20.fm_steps"]
    states = trajectory(Euler(), velocity, gmm["z"], ascending.flip(0))
    torch.testing.assert_close(states.flip(0), oss_arrays[f"{grid}_N20.teacher_traj"], rtol=0, atol=1e-10)


def ddim_in_native_coordinates(mixture, path: GaussianPath, x, t, alpha, sigma):
    """x at t[0], with alpha and sigma at every t -> the native states at all t."""
    states = [path.scale(t[0]) * x]
    for i in range(len(t) - 1):
        x0 = mixture.denoise(states[-1] / path.scale(t[i]), t[i].expand(len(x)))
        states.append(alpha[i + 1] * x0 + sigma[i + 1] * (states[-1] - alpha[i] * x0) / sigma[i])
    return torch.stack(states)


@pytest.mark.parametrize("kind", ["ddpm", "cosine"])
def test_euler_is_ddim_in_variance_preserving_coordinates(kind, mixture, velocity, gmm):
    if kind == "ddpm":
        betas = linear_betas(1000, 1e-4, 0.02)
        path, tau = DDPMPath(betas), float64([999, 800, 400, 100, 7, -1])
        abar = torch.cat([torch.cumprod(1 - betas, 0), torch.ones(1, dtype=torch.float64)])  # index -1: clean data
        alpha, sigma = abar[tau.long()].sqrt(), (1 - abar[tau.long()]).sqrt()
    else:
        path, tau = CosinePath(), float64([0.99, 0.8, 0.5, 0.3, 0.1, 0])
        alpha, sigma = torch.cos(torch.pi / 2 * tau), torch.sin(torch.pi / 2 * tau)
    t = path.canonical(tau)
    native = ddim_in_native_coordinates(mixture, path, gmm["z"], t, alpha, sigma)
    canonical = trajectory(Euler(), velocity, gmm["z"], t)
    torch.testing.assert_close(native, path.scale(t)[:, None, None] * canonical, rtol=1e-10, atol=1e-10)


def test_euler_is_euler_in_sigma_in_edm_coordinates(mixture, velocity, gmm):
    path, sigma = EDMPath(), float64([80, 20, 5, 1, 0.2, 0.01, 0])
    t = path.canonical(sigma)
    states = [path.scale(t[0]) * gmm["z"]]
    for i in range(len(sigma) - 1):
        x0 = mixture.denoise(states[-1] / path.scale(t[i]), t[i].expand(16))
        states.append(states[-1] + (sigma[i + 1] - sigma[i]) * (states[-1] - x0) / sigma[i])
    canonical = trajectory(Euler(), velocity, gmm["z"], t)
    torch.testing.assert_close(torch.stack(states), path.scale(t)[:, None, None] * canonical, rtol=1e-10, atol=1e-10)


def test_heun_is_the_trapezoid_in_canonical_time_and_euler_into_0():
    def f(x, t):
        return 3 * x - 2 * t[:, None] + 1

    x, times = 0.7, [1.0, 0.6, 0.25, 0.01, 0.0]
    expected = [x]
    for t, s in pairwise(times):
        slope = 3 * x - 2 * t + 1
        if s > 0:
            slope = (slope + 3 * (x + (s - t) * slope) - 2 * s + 1) / 2
        x = x + (s - t) * slope
        expected.append(x)
    states = trajectory(Heun(), f, float64([[0.7]]), float64(times))
    np.testing.assert_allclose(states.flatten().numpy(), expected, rtol=1e-14)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_rows_may_jump_to_different_times_0_among_them(solver, mixture, gmm):
    f = BoundVelocity(lambda x, t, _: mixture.velocity(None, 1.0)(x, t), None, micro_batch=1)  # rows cannot mix
    x, t, t_next = gmm["z"][:4], float64([0.9, 0.8, 0.7, 0.02]), float64([0.5, 0, 0.01, 0])
    together = solver.advance(f, solver.observe(f, solver.init(x, t)), t_next)
    for m in range(4):
        alone = solver.advance(f, solver.observe(f, solver.init(x[m : m + 1], t[m : m + 1])), t_next[m : m + 1])
        assert torch.equal(together.x[m], alone.x[0])


# --------------------------------------------------------------------------------------------------------------
# Network calls
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize(("solver", "calls"), [(Euler(), {1: 1, 2: 2, 5: 5}), (Heun(), {1: 1, 2: 3, 5: 9})], ids=str)
def test_a_run_calls_the_network_nfe_times_and_never_at_clean_data(solver, calls, num_steps):
    f = Counting(lambda x, t: -x)
    steps = StepSchedule(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64))
    sample(solver, f, torch.ones(2, 3), steps)
    assert len(f.times) == solver.nfe(num_steps) == calls[num_steps]
    assert all(t > 0 for rows in f.times for t in rows)


def test_every_yielded_state_but_the_last_has_seen_the_network_at_its_own_time(velocity, gmm):
    times = float64([1, 0.6, 0.2, 0])
    states = list(walk(Euler(), velocity, gmm["z"], times))
    assert [state.t[0].item() for state in states] == times.tolist()
    for state in states[:-1]:
        assert torch.equal(state.outputs[0], velocity(state.x, state.t))


# --------------------------------------------------------------------------------------------------------------
# Schedules
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_a_per_sample_schedule_gives_each_sample_what_it_gets_alone(solver, mixture, gmm):
    f = BoundVelocity(lambda x, t, _: mixture.velocity(None, 1.0)(x, t), None, micro_batch=1)  # rows cannot mix
    times = float64([[1, 0.6, 0.1, 0], [0.9, 0.7, 0.5, 0], [0.99, 0.2, 0.01, 0]])
    together = sample(solver, f, gmm["z"][:3], StepSchedule(times, start="free", samples=(0, 1, 2)))
    for i in range(3):
        alone = sample(solver, f, gmm["z"][i : i + 1], StepSchedule(times[i], start="free"))
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_sample_is_the_end_of_the_trajectory(solver, velocity, gmm):
    times = float64([1, 0.6, 0.3, 0])
    assert torch.equal(
        sample(solver, velocity, gmm["z"], StepSchedule(times)), trajectory(solver, velocity, gmm["z"], times)[-1]
    )


def test_an_analytic_start_saves_the_call_at_pure_noise(mixture, gmm):
    label = torch.arange(16) % 10
    f = Counting(mixture.velocity(label, 1.0))
    steps = StepSchedule(float64([0.9, 0.4, 0]), start="analytic", mean=gmm["means"])
    saved = sample(Euler(), f, gmm["z"], steps, group=label)
    assert len(f.times) == 2
    full = sample(Euler(), f, gmm["z"], StepSchedule(float64([1, 0.9, 0.4, 0])))
    torch.testing.assert_close(saved, full, rtol=0, atol=1e-10)


def test_a_per_sample_schedule_for_other_samples_is_refused(velocity, gmm):
    steps = StepSchedule(float64([[1, 0], [0.9, 0]]), start="free", samples=(0, 1))
    with pytest.raises(ValueError, match="2 samples, the noise has 3"):
        sample(Euler(), velocity, gmm["z"][:3], steps)


# --------------------------------------------------------------------------------------------------------------
# BoundVelocity
# --------------------------------------------------------------------------------------------------------------


def rows(gmm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, t of 6 rows for 3 samples, and the samples' classes."""
    t = float64([0.9, 0.5, 0.2, 0.8, 0.4, 0.1])
    return gmm["fm_x"][:6], t, torch.tensor([4, 0, 7])


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5, 100])
def test_row_m_has_condition_m_mod_b_whatever_the_micro_batch(micro_batch, mixture, gmm):
    x, t, label = rows(gmm)
    sizes = []

    def network(x, t, y):
        sizes.append(len(x))
        return mixture.velocity(y, 1.0)(x, t)

    v = BoundVelocity(network, label, micro_batch)(x, t)
    assert max(sizes) <= micro_batch
    assert sum(sizes) == 6
    for m in range(6):
        alone = mixture.velocity(label[m % 3 : m % 3 + 1], 1.0)(x[m : m + 1], t[m : m + 1])
        torch.testing.assert_close(v[m], alone[0], rtol=1e-12, atol=1e-12)


def test_conditions_of_any_shape_are_tiled_whole():
    condition = torch.arange(12.0).reshape(3, 2, 2)
    v = BoundVelocity(lambda x, t, y: x + y, condition, micro_batch=4)(torch.zeros(6, 2, 2), torch.zeros(6))
    assert torch.equal(v, torch.cat([condition, condition]))


def test_a_subset_gives_the_rows_of_the_whole(mixture, gmm):
    x, t, label = rows(gmm)
    f = mixture.velocity(label, 1.5)
    chosen = torch.tensor([2, 0])
    part = f.subset(chosen)(x[:3][chosen], t[:3][chosen])
    torch.testing.assert_close(part, f(x[:3], t[:3])[chosen], rtol=1e-12, atol=1e-12)
    free = mixture.velocity(None, 1.0)
    assert torch.equal(free.subset(chosen)(x, t), free(x, t))
