"""What a network in bfloat16 costs: the schedules that a search finds with it, and the images it makes.

python -m experiments.network_precision.run

The U-Net of Fashion-MNIST in bfloat16 with float32 states, against itself in float32 throughout: DPM-Solver++ of orders
up to 2 and Euler, N = 100, 32 search noises, 128 held-out ones, classes in turn.
"""

from __future__ import annotations

import torch
from hydra.utils import instantiate
from torch import Tensor

from experiments.common import configuration, keep, table
from oss_exp.distances import XtMSE
from oss_exp.evaluation.psnr import Interval, psnr
from oss_exp.models.network import Network
from oss_exp.noise import FlowSchedule
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.stepsize import OSSShared, Problem
from oss_exp.stepsize.oss.band import Band

GRID = FlowSchedule(shift=1.0).nodes(100)
SOLVERS = {"Euler": Euler(), "DPM-Solver++ 2": DPMSolverPP(2, True)}
BUDGETS = (5, 10)
SEARCH, HELD_OUT = 32, 128


def main() -> None:
    torch.set_grad_enabled(False)
    exact, rounded = network("float32"), network("bfloat16")
    noise = torch.randn(
        SEARCH + HELD_OUT, *exact.event_shape, generator=torch.Generator().manual_seed(0)
    )
    classes = torch.arange(len(noise)) % 10
    strategy = OSSShared(
        start="analytic", band=Band(stride=8, width=1), refine=False, objective="log_mean"
    )
    rows = []
    for name, solver in SOLVERS.items():

        def images(model: Network, steps: StepSchedule, solver=solver) -> Tensor:
            held = slice(SEARCH, None)
            return model.decode(
                sample(
                    solver, model.velocity(classes[held]), noise[held], steps, group=classes[held]
                )
            )

        def search(model: Network, solver=solver) -> dict[int, StepSchedule]:
            velocity = model.velocity(classes[:SEARCH])
            problem = Problem(
                velocity,
                noise[:SEARCH],
                GRID,
                solver,
                XtMSE(),
                group=classes[:SEARCH],
                num_groups=model.num_classes,
            )
            return strategy.plan(problem, list(BUDGETS))

        teacher = StepSchedule(GRID)
        truth, other = images(exact, teacher), images(rounded, teacher)
        rows.append(
            [
                name,
                "100, the teacher",
                "-",
                "-",
                "-",
                str(Interval.of(psnr(other, truth).numpy())),
                "-",
            ]
        )
        found, found_rounded = search(exact), search(rounded)
        for k in BUDGETS:
            nodes = [
                torch.searchsorted(GRID.flip(0), plan[k].times.flip(0))
                for plan in (found, found_rounded)
            ]
            moved = (nodes[0] - nodes[1]).abs()
            rows.append(
                [
                    name,
                    str(k),
                    f"{int(moved.max())} ({float(moved.double().mean()):.1f})",
                    *(
                        str(Interval.of(psnr(images(model, steps[k]), truth).numpy()))
                        for model, steps in (
                            (exact, found),
                            (exact, found_rounded),
                            (rounded, found),
                        )
                    ),
                    str(Interval.of(psnr(images(rounded, found_rounded[k]), other).numpy())),
                ]
            )
    header = [
        "solver",
        "K",
        "nodes moved, largest (mean)",
        "float32 throughout",
        "searched in bfloat16, run in float32",
    ]
    header += ["searched in float32, run in bfloat16", "bfloat16 throughout, to its own teacher"]
    keep(__file__, "table.md", table(header, rows))


def network(dtype: str) -> Network:
    return instantiate(configuration("model=unet_fashion", f"model.dtype={dtype}").model)


if __name__ == "__main__":
    main()
