"""Any number of processes gives the same schedules, bit for bit, and the same fitted weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import run_ranks

from oss_exp.distances import X0MSE, XtMSE
from oss_exp.models.families.mixture import GaussianMixture
from oss_exp.models.guidance import Guidance
from oss_exp.noise import EDMSchedule, FlowSchedule
from oss_exp.schedule import FittedSteps
from oss_exp.solvers import Euler
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.stepsize import OSS, Band, ClosedForm, OSSAve, OSSBest, OSSFit, OSSShared, Problem
from oss_exp.stepsize.baselines.bns import BNS
from oss_exp.stepsize.baselines.dyweight import DyWeight
from oss_exp.stepsize.baselines.gits import GITS
from oss_exp.stepsize.baselines.gs import GS
from oss_exp.stepsize.baselines.ld3 import LD3
from oss_exp.stepsize.baselines.olss import OLSS
from oss_exp.stepsize.baselines.profiles import TORS, Entropic, SharpEuler
from oss_exp.tasks.collective import DistributedCollective

STRATEGIES = {
    "oss": OSS("analytic", None, True, 3),
    "oss_band": OSS("free", Band(4, 2, 1), False, 3),
    "oss_ave": OSSAve("free", None, False, "median", 3),
    "oss_mean": OSSAve("free", None, True, "mean", 3),
    "oss_shared": OSSShared("analytic", None, True, "log_mean"),
    "oss_shared_band": OSSShared("free", Band(4, 3, 1), True, "mean"),
    "gits": GITS(EDMSchedule(0.002, 80, 7), 12, Euler(), "dev", 1.05, afs=True),
    "ld3": LD3(ClosedForm(FlowSchedule(1.0), "pinned"), iterations=4, micro_batch=3),
    "bns": BNS(ClosedForm(), iterations=4, micro_batch=3),
    "gs": GS(ClosedForm(FlowSchedule(), "analytic"), iterations=4, micro_batch=3),
    "dyweight": DyWeight(ClosedForm(), iterations=4, micro_batch=3),
    "olss": OLSS(),
    "tors": TORS(),
    "sharp_euler": SharpEuler(),
    "entropic": Entropic(),
}
PROFILES = {"tors", "sharp_euler", "entropic"}
# Their times are no nodes of the grid, and equal only to rounding.
TO_ROUNDING = PROFILES | {"ld3", "bns", "gs", "dyweight", "oss_fit_polished"}
GUIDED = {
    "oss_orders": OSS("free", None, True, 3),
    "oss_ave_orders": OSSAve("analytic", None, True, "median", 3),
    "oss_shared_orders": OSSShared("pinned", Band(4, 3, 1), True, "mean"),
    "oss_fit": OSSFit("analytic", None, True, "log_mean", 2, 1e-6),
    "oss_best": OSSBest("analytic", Band(4, 3, 1), False, "mean", baselines={"fm": ClosedForm()}),
    "oss_fit_polished": OSSFit("analytic", None, False, polish=2),
    "oss_fit_band": OSSFit("pinned", Band(4, 3, 1), False, "mean", 3, 1e-6),
}


def problem_of(rank: int, world: int, samples: int, guided: bool) -> Problem:
    """Return one rank's part of a problem with classes."""
    model = GaussianMixture.from_asset(
        "mixture_digits.safetensors", guidance=Guidance(), micro_batch=64
    ).double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(samples, 1, 8, 8, dtype=torch.float64, generator=generator)
    rows = torch.arange(samples)[rank::world]
    labels = rows % 3
    return Problem(
        model.velocity(labels, Guidance(2.0) if guided else Guidance()),
        noise[rows],
        FlowSchedule(shift=2.0).nodes(12),
        DPMSolverPP(2, lower_order_final=True) if guided else Euler(),
        XtMSE(),
        collective=DistributedCollective(),
        samples=rows,
        group=labels,
        num_groups=10,
    )


def described(plan) -> dict:
    """Return a schedule's numbers as JSON has them."""
    fitted = isinstance(plan.steps, FittedSteps)
    return {
        "times": plan.times.tolist(),
        "samples": plan.samples,
        "orders": None if plan.orders is None else plan.orders.tolist(),
        "weights": plan.steps.weights.tolist() if fitted else None,
    }


def plan_all(rank: int, world: int, samples: int, folder: str) -> None:
    """Write every strategy's schedules, planned as one rank of `world`, to a file."""
    torch.set_num_threads(1)
    if world > 1:
        rendezvous = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)

    problem = problem_of(rank, world, samples, guided=False)
    guided = problem_of(rank, world, samples, guided=True)
    by_image = replace(problem, distance=X0MSE())
    plans = {name: strategy.plan(problem, [3, 5]) for name, strategy in STRATEGIES.items()}
    plans |= {name: strategy.plan(guided, [3, 5]) for name, strategy in GUIDED.items()}
    plans["x0_mse"] = OSSShared("pinned", Band(4, 1), False, "mean").plan(by_image, [3])

    result = {}
    for name, budgets in plans.items():
        for k, plan in budgets.items():
            result[f"{name} {k}"] = described(plan)
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(result))
    if world > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The schedules of one process that has all samples."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(plan_all, 1, 1, 14, str(folder))
    return json.loads((folder / "rank0.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_agree_with_one_process(alone, tmp_path, world):
    """14 samples on 4 ranks: 4, 4, 3 and 3."""
    run_ranks(plan_all, world, world, 14, str(tmp_path))
    for rank in range(world):
        plans = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert plans.keys() == alone.keys()
        for name, plan in plans.items():
            assert_same_plan(name, plan, alone[name])


def assert_same_plan(name: str, plan: dict, expected: dict) -> None:
    """Assert equal numbers: weights to rounding, and times where they are no nodes."""
    if expected["weights"] is not None:
        weights = torch.tensor(plan["weights"], dtype=torch.float64)
        expected_weights = torch.tensor(expected["weights"], dtype=torch.float64)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-8, atol=1e-8)
    times = torch.tensor(plan["times"])
    atol = 1e-8 if name.split()[0] in TO_ROUNDING else 0
    torch.testing.assert_close(times, torch.tensor(expected["times"]), rtol=0, atol=atol, msg=name)
    for key in ("samples", "orders"):
        assert plan[key] == expected[key], name
