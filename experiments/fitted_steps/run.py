"""Fitted steps: what they gain on networks, and their options.

python -m experiments.fitted_steps.run                       # networks and mixture: an hour
python -m experiments.fitted_steps.run unet_fashion mixture  # some of them
"""

from __future__ import annotations

import torch
from rich.progress import track
from torch import Tensor

from experiments.common import OUTPUTS, command_line, keep, measure, table
from oss_exp.calibration import amplitude
from oss_exp.distances import XtMSE
from oss_exp.evaluation.psnr import Interval, psnr
from oss_exp.models.families.mixture import GaussianMixture
from oss_exp.models.guidance import Guidance
from oss_exp.noise import FlowSchedule
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import sample, trajectory
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.stepsize import Band, OSSFit, OSSShared, Problem, StepsizeStrategy

HELD_OUT = 384
BUDGETS = (5, 10)
NETWORKS = ("unet_fashion", "dit_fashion")
SETTINGS = [  # of the comparison on networks
    "solver=dpm_solver_pp",
    "solver.order=3",
    "num_steps=[5,10,20]",
    "data.search_samples=32",
    "data.eval_samples=256",
    "stepsize=[edm,fm,logsnr,quadratic,gits,oss_shared,oss_fit]",
    "stepsize.oss_shared.band={_target_: oss_exp.Band, stride: 8, width: 1, shifts: 0}",
]
SOLVER = DPMSolverPP(2, lower_order_final=True)
GRID = FlowSchedule(1.0).nodes(100)
SEARCHED = OSSShared("analytic", None, True, "log_mean")


def fit(history=None, ridge=1e-6, start="analytic", refine=True) -> OSSFit:
    return OSSFit(start, Band(), refine, "log_mean", history, ridge)


class Bench:
    """The mixture with held-out noises, and what its teacher makes of them."""

    def __init__(self) -> None:
        self.model = GaussianMixture.from_asset(
            "mixture_fashion.safetensors", guidance=Guidance(), micro_batch=4096
        )
        self.velocity = self.model.velocity(None)
        self.held_out_noise = self.noise(10**6, HELD_OUT)
        self.held_out_x0 = self._teacher(self.held_out_noise)

    def noise(self, seed: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, *self.model.event_shape, generator=generator)

    def plan(self, strategy: StepsizeStrategy, noise: Tensor) -> dict[int, StepSchedule]:
        """Search a schedule for every budget on these noises."""
        problem = Problem(self.velocity, noise, GRID, SOLVER, XtMSE())
        return strategy.plan(problem, list(BUDGETS))

    def psnr(self, steps: StepSchedule, noise: Tensor, x0: Tensor | None = None) -> Tensor:
        """Return the PSNR of every sample to the teacher, whose end states may be passed."""
        x0 = self._teacher(noise) if x0 is None else x0
        images = self.model.decode(sample(SOLVER, self.velocity, noise, steps))
        return psnr(images, self.model.decode(x0))

    def held_out(self, steps: StepSchedule) -> Tensor:
        """Return the PSNR of every held-out sample."""
        return self.psnr(steps, self.held_out_noise, self.held_out_x0)

    def quantiles(self, steps: StepSchedule | None = None) -> str:
        """Return the 5 and 95 % quantiles of x0, of the teacher's without steps."""
        x0 = self.held_out_x0
        if steps is not None:
            x0 = sample(SOLVER, self.velocity, self.held_out_noise, steps)
        low, high = amplitude(x0, per_channel=False)
        return f"{float(low.mean()):.3f} .. {float(high.mean()):.3f}"

    def _teacher(self, noise: Tensor) -> Tensor:
        return trajectory(SOLVER, self.velocity, noise, GRID)[-1]


def main() -> None:
    parser = command_line(__doc__)
    every = [*NETWORKS, "mixture"]
    parser.add_argument("parts", nargs="*", default=every, metavar="part", help=" | ".join(every))
    parts = parser.parse_args().parts
    for name in NETWORKS:
        if name in parts:
            measure(f"fitted_steps/{name}", f"model={name}", *SETTINGS)
            keep(__file__, f"{name}.md", (OUTPUTS / f"fitted_steps/{name}/table.md").read_text())
    if "mixture" in parts:
        mixture()


def mixture() -> None:
    bench = Bench()
    keep(__file__, "choices.md", choices(bench))


# --------------------------------------------------------------------------------------------------
# Options
# --------------------------------------------------------------------------------------------------


def choices(bench: Bench) -> str:
    """Compare history, ridge, start and refinement with 64 search samples."""
    strategies = {"oss_shared (Algorithm 2)": SEARCHED}
    for history in (1, 2, 3, 5):
        strategies[f"oss_fit, history {history}"] = fit(history=history)
    for ridge in (1e-7, 1e-4, 1e-2):
        strategies[f"oss_fit, ridge {ridge:g}"] = fit(ridge=ridge)
    for start in ("free", "pinned"):
        strategies[f"oss_fit, {start} start"] = fit(start=start)
    strategies["oss_fit, not refined"] = fit(refine=False)

    # PSNR and amplitude of each.
    noise = bench.noise(0, 64)
    rows = []
    for name, strategy in track(strategies.items(), "choices"):
        row = [name]
        for steps in bench.plan(strategy, noise).values():
            row += [str(Interval.of(bench.held_out(steps).numpy())), bench.quantiles(steps)]
        rows.append(row)
    rows.append(["(teacher)", "", bench.quantiles(), "", bench.quantiles()])

    header = ["64 search samples"]
    for k in BUDGETS:
        header += [f"K={k}: PSNR, dB", "5 .. 95 % of x0"]
    return table(header, rows)


if __name__ == "__main__":
    main()
