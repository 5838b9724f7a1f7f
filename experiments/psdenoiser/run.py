"""A published scientific model with 5, 10 and 20 calls: 21cmPSDenoiser against its 200-step run.

python -m experiments.psdenoiser.run --conditions test_ps.npz
"""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from experiments.common import OUTPUTS, command_line, keep, measure, png, table
from oss_exp.data.conditions import ConditionedNoiseData
from oss_exp.evaluation.comparison import Result
from oss_exp.evaluation.psnr import Interval
from oss_exp.models.families.psdenoiser import PSDenoiser
from oss_exp.noise import VPPath, VPSchedule
from oss_exp.schedule import Analytic, StepSchedule
from oss_exp.solvers import Euler, sample

SOLVERS = {"euler": "DDIM", "dpm_solver_pp": "DPM-Solver++ 2M"}
BUDGETS = (5, 10, 20)
QUANTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 100)  # per cent of the spectra
QUANTIFIED = ("vp", "oss_shared", "oss_fit", "oss_fit_mean", "oss_fit_log_mean")
VP = {"beta_min": 0.1, "beta_max": 20.0}
SCHEDULES = OUTPUTS / "psdenoiser/euler/schedules"
SPECTRA = 4  # whose posterior is sampled
SAMPLES = 16  # of each of them
COLORS = {
    "vp": "0.4",
    "edm": "tab:olive",
    "dm": "tab:green",
    "oss_ave": "tab:orange",
    "oss_shared": "tab:red",
    "oss_fit": "tab:blue",
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "--conditions", required=True, help="docs/tutorials/test_ps.npz of 21cmpsdenoiser's sdist"
    )
    file = Path(parser.parse_args().conditions).expanduser().resolve()

    # Measure every strategy with both solvers.
    results = {}
    for solver in SOLVERS:
        settings = ["experiment=psdenoiser", f"solver={solver}", f"data.conditions={file}"]
        results[solver] = measure(f"psdenoiser/{solver}", *settings)
        keep(__file__, f"{solver}.md", errors(results[solver]))
    keep(__file__, "quantiles.md", quantiles(results))

    # Times, picture, schedule, posterior.
    keep(__file__, "times.md", times())
    keep(__file__, "figure.png", figure(results))
    for suffix in (".json", ".mean.json", ".mean.safetensors"):
        keep(__file__, f"oss_fit_10{suffix}", (SCHEDULES / f"oss_fit_10{suffix}").read_bytes())
    keep(__file__, "posterior.md", posterior(file))


@cache
def decades() -> float:
    """Return the decades of power between 0 and 1 of a decoded spectrum."""
    import psdenoiser  # in functions alone: --help needs no package

    return float(psdenoiser.denoiser_csts.mean_scale[0])


def rmse(result: Result) -> np.ndarray:
    """Return the error of every spectrum's log10 power over its bins, from its PSNR.

    Returns:
        (n,) in 0.001 dex.
    """
    return 1000 * decades() * 10 ** (-np.array(list(result.values.values())) / 20)


def errors(results: list[Result]) -> str:
    """Return a table of all strategies, worst first by the error with ten calls."""
    by_key = {(result.strategy, result.num_steps): result for result in results}

    # One row a strategy.
    rows = []
    for name in dict.fromkeys(result.strategy for result in results):
        first = by_key[name, BUDGETS[0]]
        row = [f"`{name}`", first.start]
        for k in BUDGETS:
            error = rmse(by_key[name, k])
            row.append(f"{Interval.of(error)} ({np.sqrt(np.mean(error**2)):.1f})")
        calls = first.planning["network_calls_per_sample"]
        row.append(f"{calls:.0f} calls, {first.planning['seconds']:.0f} s" if calls else "-")
        rows.append(row)
    rows.sort(key=lambda row: -float(row[3].split()[0]))

    header = ["strategy", "start", *(f"{k} calls" for k in BUDGETS), "planning"]
    return table(header, rows) + (
        "\nRMSE of log10 power to the 200-step run, 0.001 dex (0.23 %): mean over "
        f"{results[0].psnr.n} held-out spectra, ± 95 % interval, and in brackets the root of the "
        "mean square over all. Calls and seconds: of a sample, and of the whole search, for the "
        "three budgets together.\n"
    )


def quantiles(results: dict[str, list[Result]]) -> str:
    """Return a table of the errors' quantiles, and of how many are above even times'."""
    rows = []
    for solver, label in SOLVERS.items():
        by_key = {(result.strategy, result.num_steps): result for result in results[solver]}
        for k, name in product(BUDGETS, QUANTIFIED):
            error = rmse(by_key[name, k])
            worse = error > rmse(by_key["vp", k])  # paired: the same spectrum and noise
            row = [label, str(k), f"`{name}`"]
            row += [f"{value:.1f}" for value in np.percentile(error, QUANTILES)]
            rows.append([*row, f"{worse.mean():.0%}"])

    header = ["solver", "calls", "strategy"]
    header += [f"{q} %" for q in QUANTILES]
    return table([*header, "worse than `vp`"], rows) + (
        "\nQuantiles over the held-out spectra of the RMSE of log10 power to the 200-step run, "
        "0.001 dex; last, the spectra whose error is above that of even times (`vp`) with the same "
        "solver and calls.\n"
    )


def schedule(solver: str, name: str, num_steps: int) -> StepSchedule:
    return StepSchedule.load(OUTPUTS / f"psdenoiser/{solver}/schedules/{name}_{num_steps}.json")


def native(steps: StepSchedule) -> list[float]:
    """Return the times of the network calls, in the network's own clock."""
    return VPPath(**VP).native(steps.times[:-1]).tolist()


def times() -> str:
    """Return a table of the searched times."""
    rows = []
    names = ("oss_shared", "oss_shared_pinned", "oss_fit")
    for (solver, label), name, k in product(SOLVERS.items(), names, BUDGETS):
        native_times = native(schedule(solver, name, k))
        listed = ", ".join(f"{t:.4f}" for t in native_times)
        rows.append([label, f"`{name}`", str(k), listed])
    clock = "times t of the calls, in the network's clock from 1 to 0.001"
    return table(["solver", "strategy", "calls", clock], rows)


def figure(results: dict[str, list[Result]]) -> bytes:
    """Draw the errors of both solvers, and the times of ten calls."""
    drawing, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.4), layout="constrained", width_ratios=(1, 1.3)
    )
    draw_errors(left, results)
    draw_times(right)
    return png(drawing)


def draw_errors(axis: plt.Axes, results: dict[str, list[Result]]) -> None:
    for solver, style in zip(SOLVERS, ("-", ":"), strict=True):
        by_key = {(result.strategy, result.num_steps): result for result in results[solver]}
        for name, color in COLORS.items():
            intervals = [Interval.of(rmse(by_key[name, k])) for k in BUDGETS]
            means = [interval.mean for interval in intervals]
            bars = [interval.high - interval.mean for interval in intervals]
            label = name if solver == "euler" else None
            axis.errorbar(
                BUDGETS, means, bars, ls=style, color=color, marker="o", ms=4, label=label
            )

    # Axes.
    axis.set(xscale="log", yscale="log", xlabel="network calls")
    axis.set_ylabel("RMSE to the 200-step run, 0.001 dex")
    axis.set_xticks(BUDGETS, BUDGETS)
    ticks = (1, 2, 5, 10, 20)
    axis.set_yticks(ticks, ticks)
    axis.minorticks_off()
    axis.set_title("DDIM (lines), DPM-Solver++ 2M (dotted)", fontsize=10)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def draw_times(axis: plt.Axes) -> None:
    for row, (name, color) in enumerate(COLORS.items()):
        steps = schedule("euler", name, 10)
        axis.plot(native(steps), [row] * 10, "o-", color=color, ms=5, lw=1)
        if isinstance(steps.start, Analytic):
            axis.plot([1, native(steps)[0]], [row, row], "--", color=color, lw=1)
            axis.plot([1], [row], "o", color=color, ms=5, mfc="white")
    axis.set_yticks(range(len(COLORS)), COLORS)
    axis.set(xlabel="time t of the network's clock", xlim=(1.02, -0.02))
    axis.set_title("the 10 calls, DDIM (open: left without a call)", fontsize=10)
    axis.grid(alpha=0.3, axis="x")


# --------------------------------------------------------------------------------------------------
# What the package reports: median and standard deviation over samples
# --------------------------------------------------------------------------------------------------


def posterior(file: Path) -> str:
    """Compare samplers with 200 steps, on several samples of a few held-out spectra."""
    model = PSDenoiser.from_package(
        **VP, time_min=1e-3, time_scale=999.0, micro_batch=64, checkpoint=None
    )
    noise, spectra = held_out(model, file)
    velocity = model.velocity(spectra.repeat_interleave(SAMPLES, dim=0))
    teacher = StepSchedule(VPSchedule(**VP, time_min=1e-3).nodes(200))

    def run(steps: StepSchedule) -> Tensor:
        return sample(Euler(), velocity, steps.start_time * noise, steps)

    # Few steps.
    reference = run(teacher)
    rows = []
    for name, k in product(("vp", "oss_shared", "oss_fit"), BUDGETS):
        samples = run(schedule("euler", name, k))
        rows.append([f"`{name}`", str(k), *compare(samples, reference)])

    # The package's own sampler.
    samples, calls = package_samples(model, spectra, noise)
    rows.append(["the package's RK45", f"{calls:.0f}", *compare(samples, reference)])

    shift = "shift of the median, in standard deviations"
    header = ["sampler", "calls", "RMSE, 0.001 dex", shift, "width", "width, spectrum by spectrum"]
    return table(header, rows) + (
        f"\n{SAMPLES} samples of {SPECTRA} held-out spectra, from the same noises, against 200 "
        "DDIM steps. Width: the samples' standard deviation in a bin, relative to the 200-step "
        "run's; shift: root mean square over the bins.\n"
    )


def held_out(model: PSDenoiser, file: Path) -> tuple[Tensor, Tensor]:
    """Return noises (SPECTRA * SAMPLES, 1, H, W), and spectra (SPECTRA, ...) that no search saw."""
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
    return batch["noise"], batch["condition"][:SPECTRA]


def compare(samples: Tensor, reference: Tensor) -> list[str]:
    """Return RMSE, shift of the median and widths of samples (SPECTRA * SAMPLES, 1, H, W)."""
    error = 1000 * decades() / 2 * (samples - reference).square().mean((1, 2, 3)).sqrt().mean()
    ours = samples.unflatten(0, (SPECTRA, SAMPLES))
    theirs = reference.unflatten(0, (SPECTRA, SAMPLES))
    spread = theirs.std(1)
    shift = ((ours.median(1).values - theirs.median(1).values) / spread).square().mean().sqrt()
    widths = (ours.std(1) / spread).flatten(1).mean(1)
    return [
        f"{error:.2f}",
        f"{shift:.3f}",
        f"{widths.mean():.3f}",
        ", ".join(f"{width:.2f}" for width in widths),
    ]


def package_samples(model: PSDenoiser, spectra: Tensor, noise: Tensor) -> tuple[Tensor, float]:
    """Sample with the adaptive sampler of `psdenoiser.Denoiser`, with its own settings.

    Returns:
        Samples (SPECTRA * SAMPLES, 1, H, W), and the mean number of network calls.
    """
    import psdenoiser

    sampler = psdenoiser.GetODESampler(
        psdenoiser.VPSDE(**VP),
        (SAMPLES, *model.event_shape),
        device="cpu",
        denoise=True,
        rtol=1e-5,
        atol=1e-5,
    )
    samples = []
    calls = []
    for z, scaled in zip(noise.split(SAMPLES), model.noisy.scaled(spectra), strict=True):
        x0, count = sampler.ode_sampler(model.network, z=z, x_cdn=scaled, return_nfe=True)
        samples.append(x0)
        calls.append(count)
    return torch.cat(samples), sum(calls) / len(calls)


if __name__ == "__main__":
    main()
