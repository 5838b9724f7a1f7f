"""Fitted steps: what they gain on networks, how many search samples they need, what history and ridge do.

python -m experiments.fitted_steps.run                       # networks: half an hour of a core; the mixture: as much
python -m experiments.fitted_steps.run unet_fashion mixture  # some of them
"""

from __future__ import annotations

import itertools
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.progress import track

from experiments.common import OUTPUTS, keep, measure, png, table
from oss_exp.calibration import amplitude
from oss_exp.distances import XtMSE
from oss_exp.evaluation.psnr import Interval, psnr
from oss_exp.models.families.mixture import GaussianMixture
from oss_exp.models.guidance import Guidance
from oss_exp.noise import FlowSchedule
from oss_exp.solvers import sample, trajectory
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.stepsize import Band, OSSFit, OSSShared, Problem

SAMPLES, HELD_OUT, BUDGETS, SEEDS = (4, 8, 16, 64), 384, (5, 10), 3
NETWORKS = ("unet_fashion", "dit_fashion")
NETWORK = ["solver=dpm_solver_pp", "solver.order=3", "num_steps=[5,10,20]"]
NETWORK += [
    "data.search_samples=32",
    "data.eval_samples=256",
    "stepsize=[edm,fm,logsnr,quadratic,gits,oss_shared,oss_fit]",
]
NETWORK += ["stepsize.oss_shared.band={_target_: oss_exp.Band, stride: 8, width: 1, shifts: 0}"]
SOLVER, GRID = DPMSolverPP(2, lower_order_final=True), FlowSchedule(1.0).nodes(100)


def fit(history=None, ridge=1e-6, start="analytic", refine=True) -> OSSFit:
    return OSSFit(start, Band(), refine, "log_mean", history, ridge)


ORDINARY = OSSShared("analytic", None, True, "log_mean")


class Bench:
    """Noises of one seed, with the teacher's answers on the held-out ones."""

    def __init__(self) -> None:
        self.model = GaussianMixture.from_asset(
            "mixture_fashion.safetensors", guidance=Guidance(), micro_batch=4096
        )
        self.velocity = self.model.velocity(None)
        self.other = self.noise(10**6, HELD_OUT)
        self.truth = self._teacher(self.other)

    def noise(self, seed: int, count: int) -> torch.Tensor:
        return torch.randn(
            count, *self.model.event_shape, generator=torch.Generator().manual_seed(seed)
        )

    def plans(self, strategy, count: int, seed: int):
        noise = self.noise(seed, count)
        return noise, strategy.plan(
            Problem(self.velocity, noise, GRID, SOLVER, XtMSE()), list(BUDGETS)
        )

    def psnr(self, steps, noise: torch.Tensor, truth: torch.Tensor | None = None) -> torch.Tensor:
        truth = self._teacher(noise) if truth is None else truth
        images = self.model.decode(sample(SOLVER, self.velocity, noise, steps))
        return psnr(images, self.model.decode(truth))

    def held_out(self, steps) -> torch.Tensor:
        return self.psnr(steps, self.other, self.truth)

    def quantiles(self, steps=None) -> list[float]:
        x0 = self.truth if steps is None else sample(SOLVER, self.velocity, self.other, steps)
        return [float(q.mean()) for q in amplitude(x0, per_channel=False)]

    def _teacher(self, noise: torch.Tensor) -> torch.Tensor:
        return trajectory(SOLVER, self.velocity, noise, GRID)[-1]


def main() -> None:
    given = sys.argv[1:] or [*NETWORKS, "mixture"]
    for name in NETWORKS:
        if name in given:
            measure(f"fitted_steps/{name}", f"model={name}", *NETWORK)
            keep(__file__, f"{name}.md", (OUTPUTS / f"fitted_steps/{name}/table.md").read_text())
    if "mixture" in given:
        mixture()


def mixture() -> None:
    bench = Bench()
    curve = overfitting(bench)
    keep(__file__, "overfitting.md", _curve_table(curve))
    keep(__file__, "overfitting.png", _curve_figure(curve))
    keep(__file__, "choices.md", choices(bench))


def overfitting(bench: Bench) -> dict[tuple[str, int, int], tuple[list[float], list[float]]]:
    """{(strategy, samples, K): (train PSNR of each seed, held-out PSNR of each seed)}."""
    curve = {}
    kinds = {"oss_fit": fit(), "oss_shared": ORDINARY}
    for (name, strategy), count in track(
        list(itertools.product(kinds.items(), SAMPLES)), "overfitting"
    ):
        for seed in range(SEEDS):
            noise, plans = bench.plans(strategy, count, seed)
            for k, steps in plans.items():
                train, other = curve.setdefault((name, count, k), ([], []))
                train.append(float(bench.psnr(steps, noise).mean()))
                other.append(float(bench.held_out(steps).mean()))
    return curve


def _curve_table(curve) -> str:
    rows = []
    for count in SAMPLES:
        cells = [str(count)]
        for name, k in itertools.product(("oss_shared", "oss_fit"), BUDGETS):
            train, other = (sum(values) / len(values) for values in curve[name, count, k])
            cells.append(f"{train:.2f} / {other:.2f}")
        rows.append(cells)
    header = [
        "search samples",
        *(f"{n}, K={k}: train / held-out" for n in ("oss_shared", "oss_fit") for k in BUDGETS),
    ]
    return (
        table(header, rows)
        + f"\nPSNR in dB, mean over {SEEDS} search sets; {HELD_OUT} held-out noises.\n"
    )


def _curve_figure(curve) -> bytes:
    figure, axes = plt.subplots(1, len(BUDGETS), figsize=(9, 3.8), layout="constrained")
    for axis, k in zip(axes, BUDGETS, strict=True):
        for name, color in (("oss_fit", "tab:blue"), ("oss_shared", "tab:red")):
            for part, style in ((0, "--"), (1, "-")):
                label = f"{name}, {'held-out' if part else 'its own search samples'}"
                mean = [sum(curve[name, n, k][part]) / SEEDS for n in SAMPLES]
                axis.plot(SAMPLES, mean, style, color=color, marker="o", ms=4, label=label)
                axis.fill_between(
                    SAMPLES,
                    [min(curve[name, n, k][part]) for n in SAMPLES],
                    [max(curve[name, n, k][part]) for n in SAMPLES],
                    color=color,
                    alpha=0.12,
                    lw=0,
                )
        axis.set(title=f"K = {k}", xscale="log", xlabel="search samples")
        axis.set_xticks(SAMPLES, SAMPLES)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("PSNR, dB (band: the search sets)")
    axes[0].legend(fontsize=8)
    return png(figure)


def choices(bench: Bench) -> str:
    """History, ridge, start and refinement with 64 search samples, and the amplitudes of what comes out."""
    kinds = {"oss_shared (Algorithm 2)": ORDINARY}
    kinds |= {f"oss_fit, history {h}": fit(history=h) for h in (1, 2, 3, 5)}
    kinds |= {f"oss_fit, ridge {ridge:g}": fit(ridge=ridge) for ridge in (1e-7, 1e-4, 1e-2)}
    kinds |= {f"oss_fit, {start} start": fit(start=start) for start in ("free", "pinned")}
    kinds["oss_fit, not refined"] = fit(refine=False)
    rows = []
    for name, strategy in track(kinds.items(), "choices"):
        cells = [name]
        for steps in bench.plans(strategy, 64, 0)[1].values():
            cells += [
                str(Interval.of(bench.held_out(steps).numpy())),
                "{:.3f} .. {:.3f}".format(*bench.quantiles(steps)),
            ]
        rows.append(cells)
    truth = "{:.3f} .. {:.3f}".format(*bench.quantiles())
    rows.append(["(teacher)", "", truth, "", truth])
    header = [
        "64 search samples",
        *(text for k in BUDGETS for text in (f"K={k}: PSNR, dB", "5 .. 95 % of x0")),
    ]
    return table(header, rows)


if __name__ == "__main__":
    main()
