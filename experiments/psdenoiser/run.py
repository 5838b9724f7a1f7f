"""A published scientific model at 5, 10 and 20 calls: 21cmPSDenoiser against its own 200-step run.

python -m experiments.psdenoiser.run --conditions test_ps.npz
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import psdenoiser
import torch
from torch import Tensor

from experiments.common import OUTPUTS, keep, measure, png, table
from oss_exp.data.conditions import ConditionedNoiseData
from oss_exp.evaluation.comparison import Result
from oss_exp.evaluation.psnr import Interval
from oss_exp.models.families.psdenoiser import PSDenoiser
from oss_exp.noise import VPPath, VPSchedule
from oss_exp.schedule import Analytic, StepSchedule
from oss_exp.solvers import Euler, sample

SOLVERS, BUDGETS = {"euler": "DDIM", "dpm_solver_pp": "DPM-Solver++ 2M"}, (5, 10, 20)
DECADES = float(
    psdenoiser.denoiser_csts.mean_scale[0]
)  # of power between 0 and 1 of a decoded spectrum
VP = {"beta_min": 0.1, "beta_max": 20.0}
SCHEDULES = OUTPUTS / "psdenoiser/euler/schedules"
SPECTRA, SAMPLES = 4, 16  # whose posterior is sampled, how often
COLORS = {
    "vp": "0.4",
    "edm": "tab:olive",
    "dm": "tab:green",
    "oss_ave": "tab:orange",
    "oss_shared": "tab:red",
}
COLORS |= {"oss_fit": "tab:blue"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument(
        "--conditions", required=True, help="docs/tutorials/test_ps.npz of 21cmpsdenoiser's sdist"
    )
    file = Path(arguments.parse_args().conditions).expanduser().resolve()
    results = {}
    for solver in SOLVERS:
        results[solver] = measure(
            f"psdenoiser/{solver}",
            "experiment=psdenoiser",
            f"solver={solver}",
            f"data.conditions={file}",
        )
        keep(__file__, f"{solver}.md", errors(results[solver]))
    keep(__file__, "times.md", times())
    keep(__file__, "figure.png", figure(results))
    for suffix in (".json", ".mean.json", ".mean.safetensors"):
        keep(__file__, f"oss_fit_10{suffix}", (SCHEDULES / f"oss_fit_10{suffix}").read_bytes())
    keep(__file__, "posterior.md", posterior(file))


def rmse(result: Result) -> np.ndarray:
    """(n,) in 0.001 dex: of log10 power over the bins of each spectrum, from its PSNR."""
    return 1000 * DECADES * 10 ** (-np.array(list(result.values.values())) / 20)


def errors(results: list[Result]) -> str:
    rows = []
    for name in dict.fromkeys(result.strategy for result in results):
        found = {result.num_steps: result for result in results if result.strategy == name}
        cells = [
            f"{Interval.of(rmse(found[k]))} ({np.sqrt(np.mean(rmse(found[k]) ** 2)):.1f})"
            for k in BUDGETS
        ]
        planning = found[BUDGETS[0]].planning
        calls, seconds = planning["network_calls_per_sample"], planning["seconds"]
        cost = f"{calls:.0f} calls, {seconds:.0f} s" if calls else "-"
        rows.append([f"`{name}`", found[BUDGETS[0]].start, *cells, cost])
    rows.sort(key=lambda row: -float(row[3].split()[0]))
    header = ["strategy", "start", *(f"{k} calls" for k in BUDGETS), "planning"]
    count = results[0].psnr.n
    return table(header, rows) + (
        f"\nRMSE of log10 power to the 200-step run, 0.001 dex (0.23 %): mean over {count} held-out spectra, ± 95 % "
        "interval, and in brackets the root of the mean square over all. Calls and seconds: of a sample, and of the "
        "whole search, for the three budgets together.\n"
    )


def schedule(solver: str, name: str, num_steps: int) -> StepSchedule:
    return StepSchedule.load(OUTPUTS / f"psdenoiser/{solver}/schedules/{name}_{num_steps}.json")


def native(steps: StepSchedule) -> list[float]:
    """The times at which the network is called, in its own clock."""
    return VPPath(**VP).native(steps.times[:-1]).tolist()


def times() -> str:
    rows = []
    for (solver, label), name, k in product(
        SOLVERS.items(), ("oss_shared", "oss_shared_pinned", "oss_fit"), BUDGETS
    ):
        listed = ", ".join(f"{t:.4f}" for t in native(schedule(solver, name, k)))
        rows.append([label, f"`{name}`", str(k), listed])
    return table(
        [
            "solver",
            "strategy",
            "calls",
            "times t of the calls, in the network's clock from 1 to 0.001",
        ],
        rows,
    )


def figure(results: dict[str, list[Result]]) -> bytes:
    drawing, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.4), layout="constrained", width_ratios=(1, 1.3)
    )
    for (solver, style), (name, color) in product(
        zip(SOLVERS, ("-", ":"), strict=True), COLORS.items()
    ):
        found = sorted(
            (r for r in results[solver] if r.strategy == name), key=lambda r: r.num_steps
        )
        means = [Interval.of(rmse(r)) for r in found]
        bars = [i.high - i.mean for i in means]
        label = name if solver == "euler" else None
        left.errorbar(
            BUDGETS,
            [i.mean for i in means],
            bars,
            ls=style,
            color=color,
            marker="o",
            ms=4,
            label=label,
        )
    left.set(
        xscale="log",
        yscale="log",
        xlabel="network calls",
        ylabel="RMSE to the 200-step run, 0.001 dex",
    )
    left.set_xticks(BUDGETS, BUDGETS)
    left.set_yticks(ticks := (1, 2, 5, 10, 20), ticks)
    left.minorticks_off()
    left.set_title("DDIM (lines), DPM-Solver++ 2M (dotted)", fontsize=10)
    left.grid(alpha=0.3, which="both")
    left.legend(fontsize=8)
    for row, (name, color) in enumerate(COLORS.items()):
        steps = schedule("euler", name, 10)
        right.plot(native(steps), [row] * 10, "o-", color=color, ms=5, lw=1)
        if isinstance(steps.start, Analytic):
            right.plot([1, native(steps)[0]], [row, row], "--", color=color, lw=1)
            right.plot([1], [row], "o", color=color, ms=5, mfc="white")
    right.set_yticks(range(len(COLORS)), COLORS)
    right.set(xlabel="time t of the network's clock", xlim=(1.02, -0.02))
    right.set_title("the 10 calls, DDIM (open: left without a call)", fontsize=10)
    right.grid(alpha=0.3, axis="x")
    return png(drawing)


# --------------------------------------------------------------------------------------------------------------
# What the package reports: median and standard deviation over samples
# --------------------------------------------------------------------------------------------------------------


def posterior(file: Path) -> str:
    """Few-step samplers and the package's own against 200 steps, on several samples of a few held-out spectra."""
    model = PSDenoiser.from_package(
        **VP, time_min=1e-3, time_scale=999.0, micro_batch=64, checkpoint=None
    )
    count = SPECTRA * SAMPLES
    data = ConditionedNoiseData(
        event_shape=model.event_shape,
        num_classes=None,
        conditions=str(file),
        key="deltasq_realisations",
        seed=1,
        search_samples=1,
        eval_samples=count,
        per_sample=1,
        batch_size=count,
    )
    batch = next(iter(data.test_dataloader()))
    noise, spectra = batch["noise"], batch["condition"][:SPECTRA]
    velocity = model.velocity(spectra.repeat_interleave(SAMPLES, dim=0))
    grid = VPSchedule(**VP, time_min=1e-3).nodes(200)
    teacher = StepSchedule(grid)

    def run(steps: StepSchedule) -> Tensor:
        return sample(Euler(), velocity, steps.start_time * noise, steps)

    reference, rows = run(teacher), []
    for name, k in product(("vp", "oss_shared", "oss_fit"), BUDGETS):
        rows.append([f"`{name}`", str(k), *compare(run(schedule("euler", name, k)), reference)])
    own, calls = package_samples(model, spectra, noise)
    rows.append(["the package's RK45", f"{calls:.0f}", *compare(own, reference)])
    header = [
        "sampler",
        "calls",
        "RMSE, 0.001 dex",
        "shift of the median, in standard deviations",
        "width",
    ]
    return table(header, rows) + (
        f"\n{SAMPLES} samples of {SPECTRA} held-out spectra, from the same noises, against 200 DDIM steps. Width: the "
        "samples' standard deviation in a bin, relative to the 200-step run's; shift: root mean square over the bins.\n"
    )


def compare(samples: Tensor, reference: Tensor) -> list[str]:
    """(SPECTRA * SAMPLES, 1, H, W) each."""
    error = 1000 * DECADES / 2 * (samples - reference).square().mean((1, 2, 3)).sqrt().mean()
    ours, theirs = (x.unflatten(0, (SPECTRA, SAMPLES)) for x in (samples, reference))
    spread = theirs.std(1)
    shift = ((ours.median(1).values - theirs.median(1).values) / spread).square().mean().sqrt()
    return [f"{error:.2f}", f"{shift:.3f}", f"{(ours.std(1) / spread).mean():.3f}"]


def package_samples(model: PSDenoiser, spectra: Tensor, noise: Tensor) -> tuple[Tensor, float]:
    """By the adaptive sampler of `psdenoiser.Denoiser`, with its own settings; and its mean number of network calls."""
    sampler = psdenoiser.GetODESampler(
        psdenoiser.VPSDE(**VP),
        (SAMPLES, *model.event_shape),
        device="cpu",
        denoise=True,
        rtol=1e-5,
        atol=1e-5,
    )
    parts = [
        sampler.ode_sampler(model.network, z=z, x_cdn=scaled, return_nfe=True)
        for z, scaled in zip(noise.split(SAMPLES), model.noisy.scaled(spectra), strict=True)
    ]
    return torch.cat([x0 for x0, _ in parts]), sum(calls for _, calls in parts) / len(parts)


if __name__ == "__main__":
    main()
