"""Theorems for every solver in conf/solver, at every order and in every variant."""

from contextlib import suppress
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from helpers import mostly_slow
from hydra.utils import instantiate
from omegaconf import OmegaConf
from references import LATER, PINNED, difference, float64, run
from scipy.integrate import solve_ivp

from oss_exp.schedule import Free, SolverSteps, StepSchedule
from oss_exp.solvers import Euler, LinearMultistep, State, nfe, sample, trajectory, walk
from oss_exp.solvers.deis import DEIS
from oss_exp.solvers.dpm_solver import DPMSolver
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.solvers.heun import Heun
from oss_exp.solvers.ipndm import IPNDM
from oss_exp.solvers.unipc import UniPC
from oss_exp.velocity import BoundVelocity

FILES = sorted((Path(__file__).parents[2] / "conf" / "solver").glob("*.yaml"))


def choices(solver) -> dict[str, list]:
    """The values of each field that names a variant, and of an order that can be chosen."""
    hints = get_type_hints(type(solver))
    literals = {name: hint for name, hint in hints.items() if get_origin(hint) is Literal}
    values = {name: list(get_args(hint)) for name, hint in literals.items()}

    if "order" in {field.name for field in fields(solver)}:
        values["order"] = []
        for order in range(1, 10):
            with suppress(ValueError):
                values["order"].append(replace(solver, order=order).order)
    return values


BASES = [instantiate(OmegaConf.load(file)) for file in FILES]
VARIANTS = [
    replace(base, **dict(zip(choices(base), values, strict=True)))
    for base in BASES
    for values in product(*choices(base).values())
]
SOLVERS = list(dict.fromkeys(VARIANTS))
MULTISTEP = [solver for solver in SOLVERS if isinstance(solver, LinearMultistep)]


def label(solver) -> str:
    """Return the name of the solver with its variant."""
    variant = [str(getattr(solver, name)) for name in choices(solver)]
    return "-".join([type(solver).__name__, *variant])


def parametrize(solvers):
    """Return the mark that runs a test for each of these solvers."""
    return pytest.mark.parametrize("solver", solvers, ids=label)


every_solver = parametrize(SOLVERS)


@pytest.fixture(scope="module")
def row_by_row(mixture):
    """The velocity one row at a time, so that rows cannot change one another's rounding."""
    return BoundVelocity(lambda x, t, _: mixture.velocity(None)(x, t), None, micro_batch=1)


# --------------------------------------------------------------------------------------------------
# Accuracy
# --------------------------------------------------------------------------------------------------


def accuracy(solver) -> int:
    """Return the order of the errors, which differs from the solver's order for two classes."""
    if isinstance(solver, UniPC):
        # The corrector gains one order; a last step by the predictor alone keeps it.
        return solver.order + 1
    if isinstance(solver, DPMSolverPP):
        # The released third order takes half of the second derivative that it needs.
        return min(solver.order, 2)
    return solver.order


@pytest.fixture(scope="module")
def exact(gmm, velocity):
    """A function t -> states of twelve samples at t in [0.35, 0.65], by SciPy's DOP853."""
    start = gmm["z"][:12]

    def slope(t: float, x: np.ndarray) -> np.ndarray:
        states = torch.from_numpy(x).reshape(start.shape)
        return velocity(states, float64(t).expand(12)).flatten().numpy()

    times = (0.65, 0.35)
    path = solve_ivp(
        slope, times, start.flatten().numpy(), "DOP853", dense_output=True, rtol=1e-12, atol=1e-13
    )
    return lambda t: torch.from_numpy(path.sol(float(t))).reshape(start.shape)


def error_after(solver, count: int, velocity, exact) -> float:
    """Return the RMS error after `count` steps, even in sigma, from t = 0.65 to 0.35.

    Multistep solvers get their first outputs from the exact solution: their warm-up is of lower
    order. Steps even in sigma are those for which iPNDM's uniform weights have their order.
    """
    sigmas = torch.linspace(0.65 / 0.35, 0.35 / 0.65, count + 1, dtype=torch.float64)
    times = sigmas / (1 + sigmas)

    # The exact past.
    warm_up = solver.order - 1 if isinstance(solver, LinearMultistep) else 0
    past = [t.expand(12) for t in times[:warm_up].flip(0)]
    outputs = [solver.output(exact(t[0]), velocity(exact(t[0]), t), t) for t in past]
    state = State(exact(times[warm_up]), times[warm_up].expand(12), tuple(outputs), tuple(past))

    for t_next in times[warm_up + 1 :]:
        state = solver.advance(velocity, solver.observe(velocity, state), t_next)
    return (state.x - exact(times[-1])).square().mean().sqrt().item()


@pytest.mark.slow
@every_solver
def test_the_error_falls_with_the_order(solver, velocity, exact):
    errors = [error_after(solver, count, velocity, exact) for count in (80, 160)]
    slope = np.log2(errors[0] / errors[1])
    assert slope == pytest.approx(accuracy(solver), abs=0.2)


@every_solver
def test_float32_states_stay_float32(solver, velocity, gmm):
    x = gmm["z"][:4]
    times = PINNED
    low = run(solver, lambda x, t: velocity(x.double(), t).float(), x.float(), times)
    assert low.dtype == torch.float32
    assert difference(low, run(solver, velocity, x, times)) < 1e-4


# --------------------------------------------------------------------------------------------------
# Pure noise
# --------------------------------------------------------------------------------------------------


def limit(solver) -> Literal["reached", "slow"] | None:
    """Return how runs from t = 1 - delta approach the run from t = 1, or None if they do not.

    They do not where a step of infinite length becomes Euler's (DPM-Solver, Heun in sigma), with
    iPNDM's uniform weights, which ignore the distance of a node, and with bh1's correction, which
    grows with that distance. UniPC and DPM-Solver++ of order 3 lose a node at t = 1 and go on with
    the published rule for the order below, which is no limit either.
    """
    match solver:
        case DEIS(order=1) | DPMSolver(order=1) | DPMSolverPP(order=1):
            return "reached"
        case UniPC(order=1, variant="bh2") | IPNDM(order=1) | IPNDM(weights="exact"):
            return "reached"
        case Heun(clock="t"):
            return "reached"
        case DPMSolverPP(order=2) | DEIS():
            return "slow"  # their clocks are logarithms
    regular = isinstance(solver, LinearMultistep) and 1 not in solver.singular_at
    return "reached" if regular else None


@every_solver
def test_a_run_from_pure_noise_is_finite_and_the_limit_of_others(solver, velocity, gmm):
    exact = run(solver, velocity, gmm["z"], PINNED)
    assert exact.isfinite().all()
    near = [torch.cat([PINNED[:1] - delta, PINNED[1:]]) for delta in (1e-3, 1e-6, 1e-9)]
    errors = [difference(run(solver, velocity, gmm["z"], times), exact) for times in near]

    match limit(solver):
        case "reached":
            assert errors[2] < 1e-7
        case "slow":
            assert errors[2] < 0.85 * errors[1] < 0.6 * errors[0]


# --------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "times",
    [
        float64([1, 1, 0.9, 0.9], [0, 0.4, 0, 0.4]),
        float64(
            [1, 1, 0.98, 0.6],
            [0.8, 0.9, 0.9, 0.5],
            [0.6, 0.2, 0.5, 0.3],
            [0.5, 0.1, 0.2, 0.2],
            [0.3, 0, 0, 0.1],
        ),
    ],
    ids=["first", "later"],
)
@every_solver
def test_rows_may_jump_to_different_times(solver, times, row_by_row, gmm):
    """Each row as alone, at times 0 and 1 too; the network is NaN at clean data."""

    def f(x, t):
        return row_by_row(x, t).where(t[:, None] > 0, torch.nan)

    orders = [min(solver.order, step + 1) for step in range(len(times) - 1)]
    *_, together = walk(solver, f, gmm["z"][:4], times, orders)
    for m in range(4):
        *_, alone = walk(solver, f, gmm["z"][m : m + 1], times[:, m : m + 1], orders)
        assert difference(together.x[m], alone.x[0]) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    "orders", [None, torch.tensor([[1, 2, 3, 1], [1, 1, 1, 1], [1, 2, 2, 3]])], ids=["", "orders"]
)
@every_solver
def test_a_per_sample_schedule_gives_each_sample_what_it_gets_alone(
    solver, orders, row_by_row, gmm
):
    times = float64([1, 0.6, 0.3, 0.1, 0], [0.9, 0.7, 0.6, 0.5, 0], [0.99, 0.8, 0.2, 0.01, 0])
    if orders is not None:
        orders = orders.clamp(max=solver.order) if isinstance(solver, LinearMultistep) else None
    steps = StepSchedule(times, Free(), steps=SolverSteps(orders), samples=(0, 1, 2))
    together = sample(solver, row_by_row, gmm["z"][:3], steps)

    for i in range(3):
        row_orders = None if orders is None else orders[i]
        steps = StepSchedule(times[i], Free(), steps=SolverSteps(row_orders))
        alone = sample(solver, row_by_row, gmm["z"][i : i + 1], steps)
        assert difference(together[i], alone[0]) < 1e-12


@every_solver
def test_a_state_can_be_cut_to_some_rows(solver, row_by_row, gmm):
    rows = torch.tensor([2, 0, 2])
    times = torch.stack([PINNED, LATER, 0.9 * LATER], dim=1)
    states = list(walk(solver, row_by_row, gmm["z"][:3], times))
    cut = solver.advance(row_by_row, states[2].map(lambda tensor: tensor[rows]), times[3][rows])
    whole = solver.advance(row_by_row, states[2], times[3])
    assert difference(cut.x, whole.x[rows]) < 1e-12


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [1, 0.98])
@pytest.mark.parametrize("num_steps", mostly_slow([1, 2, 5], 2))
@every_solver
def test_a_run_calls_the_network_nfe_times_and_never_at_clean_data(solver, num_steps, start):
    call_times = []

    def f(x, t):
        call_times.append(t)
        return -x

    times = torch.linspace(start, 0, num_steps + 1, dtype=torch.float64)
    run(solver, f, torch.ones(2, 3), times)

    assert len(call_times) == nfe(solver, StepSchedule(times))
    assert all((t > 0).all() for t in call_times)


@every_solver
def test_sample_is_the_end_of_the_trajectory(solver, velocity, gmm):
    states = trajectory(solver, velocity, gmm["z"], PINNED)
    assert len(states) == len(PINNED)
    assert torch.equal(sample(solver, velocity, gmm["z"], StepSchedule(PINNED)), states[-1])


@every_solver
def test_gradients_with_respect_to_the_times(solver, velocity, gmm):
    """Finite at times 1 and 0 too, and equal to central differences between them."""
    generator = torch.Generator().manual_seed(0)
    times = torch.stack([PINNED, LATER], dim=1).requires_grad_()
    weight = torch.randn(2, 64, dtype=torch.float64, generator=generator)
    direction = torch.randn(7, 2, dtype=torch.float64, generator=generator)
    direction[[0, -1]] = 0

    def end(times):
        *_, last = walk(solver, velocity, gmm["z"][:2], times)
        return (weight * last.x).sum()

    (gradient,) = torch.autograd.grad(end(times), times)
    assert gradient.isfinite().all()
    with torch.no_grad():
        central = (end(times + 1e-5 * direction) - end(times - 1e-5 * direction)) / 2e-5

    torch.testing.assert_close((gradient * direction).sum(), central, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Orders
# --------------------------------------------------------------------------------------------------


@parametrize([solver for solver in MULTISTEP if solver.order == 3])
def test_orders_warm_up_and_may_fall_at_the_end(solver):
    orders = [solver.orders(num_steps) for num_steps in (1, 2, 3, 6)]
    if solver.lower_order_final:
        assert orders == [[1], [1, 1], [1, 2, 1], [1, 2, 3, 3, 2, 1]]
    else:
        assert orders == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 3, 3, 3]]


@parametrize([solver for solver in MULTISTEP if "order" in choices(solver)])
def test_stored_orders_are_run(solver, velocity, gmm):
    for order in range(1, solver.order + 1):
        lower = replace(solver, order=order)
        steps = StepSchedule(PINNED, steps=SolverSteps(torch.tensor(lower.orders(6))))
        stored = sample(solver, velocity, gmm["z"], steps)
        assert difference(stored, run(lower, velocity, gmm["z"], PINNED)) < 1e-12
        if order == 1 and not isinstance(solver, UniPC):  # UniPC corrects the step
            assert difference(stored, run(Euler(), velocity, gmm["z"], PINNED)) < 1e-12


@parametrize(MULTISTEP)
def test_a_stored_order_above_the_solvers_is_refused(solver, velocity, gmm):
    orders = torch.arange(1, 7).clamp(max=solver.order + 1)
    words = f"steps of order {solver.order + 1}, .* goes up to {solver.order}; choose"
    with pytest.raises(ValueError, match=words):
        sample(solver, velocity, gmm["z"], StepSchedule(PINNED, steps=SolverSteps(orders)))


@parametrize(MULTISTEP)
def test_an_order_above_the_outputs_is_refused(solver, velocity, gmm):
    state = solver.observe(velocity, solver.init(gmm["z"], PINNED[0]))
    with pytest.raises(ValueError, match="1 outputs allow orders 1 to 1"):
        solver.advance(velocity, state, PINNED[1], 2)


@pytest.mark.parametrize("order", [0, -1, float("nan"), "one above"])
@parametrize([solver for solver in BASES if "order" in choices(solver)])
def test_a_wrong_order_is_refused(solver, order):
    highest = max(choices(solver)["order"])
    with pytest.raises(ValueError, match=f"order must be from 1 to {highest}, got"):
        replace(solver, order=highest + 1 if order == "one above" else order)


@parametrize([solver for solver in BASES if set(choices(solver)) - {"order"}])
def test_a_wrong_variant_is_refused(solver):
    for field, variants in choices(solver).items():
        if field == "order":
            continue
        words = f"{field} must be one of {', '.join(variants)}, got 'other'"
        with pytest.raises(ValueError, match=words):
            replace(solver, **{field: "other"})
