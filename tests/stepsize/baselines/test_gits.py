"""GITS equals the released code, and its steps are the best of all by enumeration."""

import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier, get_ident

import pytest
import torch
from helpers import ORACLES
from replay import RowCounter
from safetensors.torch import load_file

from oss_exp.distances import XtMSE
from oss_exp.noise import EDMPath, EDMSchedule, FlowSchedule, LogSNRSchedule
from oss_exp.schedule import Analytic, Pinned, StepSchedule
from oss_exp.solvers import Euler, sample, trajectory
from oss_exp.solvers.dpm_solver import DPMSolver
from oss_exp.solvers.heun import Heun
from oss_exp.solvers.ipndm import IPNDM
from oss_exp.solvers.unipc import UniPC
from oss_exp.stepsize import Collective, Problem
from oss_exp.stepsize.baselines.gits import (
    GITS,
    best_free_node,
    cost_matrix,
    edm_trajectory,
    exact_steps,
    off_the_line,
)

ORACLE = json.loads((ORACLES / "gits.json").read_text())
EDM = EDMSchedule(sigma_min=0.002, sigma_max=80.0, rho=7.0)
GRID = FlowSchedule(shift=1.0).nodes(40)
ADAMS = {
    1: (1,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@pytest.fixture(scope="module")
def arrays():
    return load_file(ORACLES / "gits.safetensors")


@pytest.fixture(scope="module")
def denoise_eps(velocity):
    """A function (x (B, 64) in EDM coordinates, sigma) -> the predicted noise."""

    def eps(x, sigma):
        t = sigma / (1 + sigma)
        x = x * (1 - t)
        return x + (1 - t) * velocity(x, t.expand(len(x)))

    return eps


def afs_student(method, eps_of, x, sigmas):
    """Return the end of a released student with an analytical first step, from x (B, D)."""
    history = []
    for sigma, sigma_next in itertools.pairwise(sigmas):
        eps = eps_of(x, sigma) if history else x / (1 + sigma**2).sqrt()
        history.append(eps)
        if method == "ipndm":  # the weights of equal steps, fewer while it warms up
            weights = ADAMS[min(len(history), 4)]
            slope = sum(w * e for w, e in zip(weights, reversed(history), strict=False))
        elif method == "heun":
            slope = (eps + eps_of(x + (sigma_next - sigma) * eps, sigma_next)) / 2
        else:
            slope = eps
        x = x + (sigma_next - sigma) * slope
    return x


@pytest.fixture(scope="module")
def teachers(arrays, velocity):
    """The (states, eps) of the four teachers, which stop at sigma = 0.002."""
    runs = {}
    solvers = {"euler": Euler(), "ipndm": IPNDM(4, "uniform")}
    for size, name in itertools.product((21, 61), solvers):
        times = EDMPath().canonical(arrays[f"sigmas_{size}"])
        x = arrays["latents"].flatten(1) * times[0]
        runs[name, size] = edm_trajectory(solvers[name], velocity, x, times)
    return runs


# --------------------------------------------------------------------------------------------------
# The released numbers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ORACLE["cases"], ids=lambda case: case["cost_matrix"])
def test_teacher_cost_matrix_and_steps_equal_released_code(case, arrays, teachers):
    states, eps = teachers[case["teacher"], case["num_steps_tea"]]
    final = arrays[f"teacher_{case['teacher']}{case['max_order']}_{case['num_steps_tea']}.final"]
    assert (states[-1] - final.flatten(1)).abs().max() < 1e-10

    sigmas = arrays[f"sigmas_{case['num_steps_tea']}"]
    cost = cost_matrix(states, eps, sigmas, case["metric"], Collective())
    expected = arrays[case["cost_matrix"]]

    assert (cost - expected).abs().max() < 1e-10 * expected.abs().max()

    assert len(case["dp"]) == 28
    for choice in case["dp"]:
        for table in (cost, expected):
            assert exact_steps(table, choice["num_steps"] - 1, choice["coeff"]) == choice["dp_list"]


def test_steps_of_random_tables_equal_released_code():
    for case in ORACLE["pure_dp"]:
        cost = torch.tensor(case["cost_matrix"], dtype=torch.float64)
        for choice in case["dp"]:
            assert exact_steps(cost, choice["num_steps"] - 1, choice["coeff"]) == choice["dp_list"]


def test_the_deviation_equals_released_code(arrays):
    line = arrays["dev_unit.traj"].flatten(2).transpose(0, 1)  # (3, 7, 16)
    deviation = torch.stack([off_the_line(x[1:-1] - x[0], x[-1] - x[0]).norm(dim=-1) for x in line])
    assert (deviation - arrays["dev_unit.dev"]).abs().max() < 1e-12


def test_schedules_equal_released_code(arrays):
    for name in arrays:
        if not name.startswith(("schedule", "sigmas")):
            continue
        expected = arrays[name]
        rho, low, high = (5, 0.01, 50) if "rho5" in name else (7, 0.002, 80)
        schedule = LogSNRSchedule(low, high) if "logsnr" in name else EDMSchedule(low, high, rho)
        sigmas = EDMPath().native(schedule.nodes(len(expected))[:-1])
        assert ((sigmas - expected) / expected).abs().max() < 1e-10, name


def test_the_analytical_first_step_equals_released_code(arrays, teachers, denoise_eps):
    sigmas = arrays["sigmas_21"]
    start = arrays["latents"].flatten(1) * sigmas[0]
    target = teachers["ipndm", 21][0][-1]
    for case in ORACLE["afs"]:
        path = case["dp_list_afs_on_before_insertion"]

        def run(nodes, case=case):
            return afs_student(case["student_solver"], denoise_eps, start, sigmas[[0, *nodes]])

        node = best_free_node(range(1, path[1]), path, run, target, Collective())
        assert [0, node, *path[1:]] == case["dp_list_afs_on"]

    assert len(ORACLE["afs"]) == 18


# --------------------------------------------------------------------------------------------------
# Theorems
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coeff", [0.8, 1.0, 1.3])
def test_exactly_k_steps_are_the_best_of_all_paths(coeff):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        cost = torch.randn(8, 8, dtype=torch.float64, generator=generator).triu(1)

        def total(path, cost=cost):
            steps = enumerate(itertools.pairwise(path))
            return sum(coeff**k * float(cost[i, j]) for k, (i, j) in steps)

        for k in range(1, 8):
            paths = ([0, *middle, 7] for middle in itertools.combinations(range(1, 7), k - 1))
            assert exact_steps(cost, k, coeff) == min(paths, key=total)


def test_between_equals_the_smallest_next_node():
    cost = torch.ones(6, 6, dtype=torch.float64).triu(1)
    assert exact_steps(cost, 3, 1.0) == [0, 1, 2, 5]


@pytest.mark.parametrize(
    "solver", [Euler(), IPNDM(3, "exact"), Heun("sigma"), Heun("t"), DPMSolver(3)], ids=str
)
def test_eps_is_the_prediction_at_the_node(velocity, gmm, denoise_eps, solver):
    """Whatever the solver calls the network for between two nodes; t = 0 is a node too."""
    times = EDM.nodes(9)
    noise = gmm["z"][:4] * times[0]
    states, eps = edm_trajectory(solver, velocity, noise, times)

    assert torch.equal(states[-1], trajectory(solver, velocity, noise, times)[-1])
    for x, prediction, sigma in zip(states, eps, EDMPath().native(times), strict=False):
        assert (prediction - denoise_eps(x, sigma)).abs().max() < 1e-9


def gits(schedule=EDM, num_nodes=20, solver=None, metric="dev", coeff=1.15, afs=False):
    return GITS(schedule, num_nodes, solver or Euler(), metric, coeff, afs)


def problem_of(velocity, z, grid=GRID, **settings):
    return Problem(velocity, z, grid, Euler(), XtMSE(), **settings)


@pytest.mark.parametrize("grid", [GRID, EDM.nodes(30)], ids=["from t = 1", "from sigma = 80"])
@pytest.mark.parametrize("solver", [Euler(), Heun("sigma"), UniPC(2, "bh2", True)], ids=str)
def test_a_plan_has_the_best_steps_of_its_teacher(velocity, gmm, solver, grid):
    """On any grid of the problem: from the same unit noise, with the problem's first time."""
    counter = RowCounter(velocity)
    strategy = gits(solver=solver, metric="l2")
    plans = strategy.plan(problem_of(counter, gmm["z"] * grid[0], grid=grid), [3, 6, 20])
    assert counter.rows == 16 * strategy.network_calls(len(grid) - 1, [3, 6, 20])

    # The best steps over the teacher's costs.
    times = EDM.nodes(20)
    states, eps = edm_trajectory(solver, velocity, gmm["z"] * times[0], times)
    cost = cost_matrix(states, eps, EDMPath().native(times), "l2", Collective())
    for k, plan in plans.items():
        nodes = exact_steps(cost, k, 1.15)
        assert plan.times.tolist() == [float(grid[0]), *times[nodes[1:]].tolist()]
        assert (plan.start.kind, plan.start_time, plan.num_steps) == ("pinned", float(grid[0]), k)


def test_plan_with_the_analytical_first_step(velocity, gmm):
    """Its node is the best that could be inserted; without any the start is pinned."""
    problem = problem_of(velocity, gmm["z"], group=torch.arange(16) % 2, num_groups=3)
    times = EDM.nodes(20)
    pinned = gits().plan(problem, [1, 4, 20])
    plans = gits(afs=True).plan(problem, [1, 4, 20])
    target = trajectory(Euler(), velocity, gmm["z"] * times[0], times)[-1]
    for k in (1, 4):
        plan = plans[k]
        assert (plan.start.kind, plan.num_steps, plan.mean.shape) == ("analytic", k, (3, 64))
        assert plan.times[1:].tolist() == pinned[k].times[1:].tolist()
        between = times[(times < times[0]) & (times > plan.times[1])]

        errors = []
        for t in between:
            candidate = replace(plan, times=torch.cat([t[None], plan.times[1:]]))
            x0 = sample(Euler(), velocity, gmm["z"], candidate, problem.group)
            errors.append((x0 - target).norm(dim=1).mean())
        assert plan.times[0] == between[torch.stack(errors).argmin()]

    assert plans[20].start == Pinned()
    assert plans[20].times.tolist() == pinned[20].times.tolist()


def test_analytic_start_is_the_analytical_first_step(gmm):
    """Up to 1 / (2 sigma_N), and in the limit exactly."""
    for sigma, bound in ((80.0, 1 / 160), (1e6, 1e-6)):
        noise = gmm["z"]
        t_n = sigma / (1 + sigma)
        t = torch.tensor(0.6, dtype=torch.float64)
        x = noise * sigma
        sigma_next = float(EDMPath().native(t))
        jump = x + (sigma_next - sigma) * x / math.sqrt(1 + sigma**2)
        plan = StepSchedule(torch.tensor([0.6, 0.0]), Analytic(torch.zeros(1, 64), t_n))
        difference = plan.initial_state(noise * t_n) - (1 - t) * jump

        assert (difference.abs() <= bound * noise.abs()).all()


class Threads(Collective):
    """Ranks that are threads, each waiting for the parts of the others."""

    def __init__(self, ranks):
        self.barrier = Barrier(ranks)
        self.parts = {}

    def sum(self, tensor):
        self.parts[get_ident()] = tensor
        self.barrier.wait()
        total = sum(self.parts.values())
        self.barrier.wait()
        return total


@pytest.mark.parametrize("metric", ["dev", "l1", "l2"])
def test_any_split_into_ranks_gives_the_same_steps(velocity, gmm, metric):
    strategy = gits(metric=metric, afs=True)
    ranks = Threads(2)
    whole = strategy.plan(problem_of(velocity, gmm["z"]), [3, 5])

    def plan(part):
        return strategy.plan(problem_of(velocity, part, collective=ranks), [3, 5])

    with ThreadPoolExecutor(2) as pool:
        for plans in pool.map(plan, gmm["z"].split([11, 5])):
            for k in (3, 5):
                assert torch.equal(plans[k].times, whole[k].times)


# --------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"metric": "bdev"}, "metric must be one of dev, l1, l2"),
        ({"coeff": 0.0}, "coeff must be from 0.1 to 10, got"),
        ({"coeff": -1.0}, "coeff must be from 0.1 to 10, got"),
        ({"coeff": math.nan}, "coeff must be from 0.1 to 10, got"),
        ({"coeff": math.inf}, "coeff must be from 0.1 to 10, got"),
        (
            {"schedule": FlowSchedule(3.0)},
            r"FlowSchedule\(shift=3.0\) starts at t = 1.*such as edm",
        ),
        ({"num_nodes": 0}, "num_nodes must be from 1 to 10000, got 0"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        gits(**wrong)


def test_problems_that_it_cannot_plan_for(velocity, gmm):
    problem = problem_of(velocity, gmm["z"])

    with pytest.raises(ValueError, match="its own 4 steps and is asked for 5"):
        gits(num_nodes=4).plan(problem, [3, 5])
    with pytest.raises(ValueError, match="from 1 to 40"):
        gits(num_nodes=60).plan(problem, [41])
    with pytest.raises(ValueError, match="above the teacher's first"):
        gits().plan(problem_of(velocity, gmm["z"], GRID[30:]), [5])
    with pytest.raises(ValueError, match="NaN"):
        gits().plan(problem_of(lambda x, t: x * math.nan, gmm["z"]), [3])
    with pytest.raises(ValueError, match="4 nodes allow 1 to 3 steps"):
        exact_steps(torch.zeros(4, 4), 4, 1.0)
