"""The cost of a network in bfloat16: its searched schedules, and its images.

python -m experiments.network_precision.run

The U-Net of Fashion-MNIST in bfloat16 with float32 states, against itself in float32 throughout:
DPM-Solver++ of orders up to 2 and Euler, N = 100, 32 search noises, 128 held-out ones, classes in
turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hydra.utils import instantiate
from torch import Tensor

from experiments.common import command_line, configuration, keep, table
from oss_exp.distances import XtMSE
from oss_exp.evaluation.psnr import Interval, psnr
from oss_exp.models.network import Network
from oss_exp.noise import FlowSchedule
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, Solver, sample
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.stepsize import OSSShared, Problem
from oss_exp.stepsize.oss.band import Band

GRID = FlowSchedule(shift=1.0).nodes(100)
TEACHER = StepSchedule(GRID)
SOLVERS = {"Euler": Euler(), "DPM-Solver++ 2": DPMSolverPP(2, True)}
STRATEGY = OSSShared(
    start="analytic", band=Band(stride=8, width=1), refine=False, objective="log_mean"
)
BUDGETS = (5, 10)
SEARCH = 32
HELD_OUT = 128
HEADER = [
    "solver",
    "K",
    "nodes moved, largest (mean)",
    "float32 throughout",
    "searched in bfloat16, run in float32",
    "searched in float32, run in bfloat16",
    "bfloat16 throughout, to its own teacher",
]


@dataclass(frozen=True)
class Bench:
    """A solver with noises and classes, the first of them for the search."""

    solver: Solver
    noise: Tensor
    classes: Tensor

    def search(self, model: Network) -> dict[int, StepSchedule]:
        """Return the schedule of every budget."""
        classes = self.classes[:SEARCH]
        problem = Problem(
            model.velocity(classes),
            self.noise[:SEARCH],
            GRID,
            self.solver,
            XtMSE(),
            group=classes,
            num_groups=model.num_classes,
        )
        return STRATEGY.plan(problem, list(BUDGETS))

    def images(self, model: Network, steps: StepSchedule) -> Tensor:
        """Return the images of the held-out noises."""
        classes = self.classes[SEARCH:]
        velocity = model.velocity(classes)
        x0 = sample(self.solver, velocity, self.noise[SEARCH:], steps, group=classes)
        return model.decode(x0)


def main() -> None:
    command_line(__doc__).parse_args()
    torch.set_grad_enabled(False)
    exact = network("float32")
    rounded = network("bfloat16")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SEARCH + HELD_OUT, *exact.event_shape, generator=generator)
    classes = torch.arange(len(noise)) % 10

    rows = []
    for name, solver in SOLVERS.items():
        for cells in compare(Bench(solver, noise, classes), exact, rounded):
            rows.append([name, *cells])
    keep(__file__, "table.md", table(HEADER, rows))


def compare(bench: Bench, exact: Network, rounded: Network) -> list[list[str]]:
    """Return the cells of the teachers, and those of every budget."""
    # Teachers.
    reference = bench.images(exact, TEACHER)
    rounded_reference = bench.images(rounded, TEACHER)
    rows = [["100, the teacher", "-", "-", "-", interval(rounded_reference, reference), "-"]]

    # Students.
    schedules = bench.search(exact)
    rounded_schedules = bench.search(rounded)
    for k in BUDGETS:
        steps = schedules[k]
        rounded_steps = rounded_schedules[k]
        moved = (nodes(steps) - nodes(rounded_steps)).abs()
        cells = [str(k), f"{int(moved.max())} ({float(moved.double().mean()):.1f})"]
        cells.append(interval(bench.images(exact, steps), reference))
        cells.append(interval(bench.images(exact, rounded_steps), reference))
        cells.append(interval(bench.images(rounded, steps), reference))
        cells.append(interval(bench.images(rounded, rounded_steps), rounded_reference))
        rows.append(cells)
    return rows


def nodes(steps: StepSchedule) -> Tensor:
    """Return the numbers of a schedule's nodes, counted from the data."""
    return torch.searchsorted(GRID.flip(0), steps.times.flip(0))


def interval(images: Tensor, reference: Tensor) -> str:
    return str(Interval.of(psnr(images, reference).numpy()))


def network(dtype: str) -> Network:
    return instantiate(configuration("model=unet_fashion", f"model.dtype={dtype}").model)


if __name__ == "__main__":
    main()
