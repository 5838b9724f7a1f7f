"""The speed of the search, against plain Algorithm 1.

python -m experiments.search_speed.run [--repeats 5] [--threads 1]

Same machine, same run, each contestant in a process of its own. For K = 10 steps on a 100-step grid
of the Fashion mixture with 64 samples (other ones in each repeat), the table has

- the wall time of the plain script of the same repeat over that of the search (median, range),
- the share of time outside the network,
- network calls per sample, the teacher's included,
- peak memory above that of the process after one call of the network,
- held-out PSNR (mean over repeats; with a band also the difference to the search without).

Below it stands how many schedules are equal to the plain script's.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.common import command_line
from oss_exp.distances import XtMSE
from oss_exp.evaluation.psnr import psnr
from oss_exp.files import write_atomically
from oss_exp.models.families.mixture import GaussianMixture
from oss_exp.models.guidance import Guidance
from oss_exp.noise import FlowSchedule
from oss_exp.schedule import Free, StepSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.stepsize import OSS, Band, OSSAve, OSSShared, Problem

N = 100  # teacher steps
K = 10  # student steps
SAMPLES = 64
HELD_OUT = 256
BAND = Band(stride=8, width=1)
STRATEGIES = {
    "oss": OSS("free", None, False, 8),
    "oss, band": OSS("free", BAND, False, 8),
    "oss_ave": OSSAve("free", None, False, "median", 8),
    "oss_ave, band": OSSAve("free", BAND, False, "median", 8),
    "oss_shared, analytic": OSSShared("analytic", None, False, "log_mean"),
    "oss_shared, analytic, band": OSSShared("analytic", BAND, False, "log_mean"),
}
CONTESTANTS = ["plain", *STRATEGIES]
COLUMNS = (
    "times faster (lowest-highest)",
    "outside the network",
    "calls a sample",
    "of N(K+1)",
    "peak memory",
)


def noises(first_seed: int, count: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return noises (count, *shape), each from a seed of its own."""
    rows = []
    for i in range(count):
        generator = torch.Generator().manual_seed(first_seed + i)
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows)


def measure(name: str, threads: int, seed: int) -> dict:
    """Run one contestant in this process."""
    torch.set_num_threads(threads)
    model = GaussianMixture.from_asset(
        "mixture_fashion.safetensors", guidance=Guidance(), micro_batch=1024
    )
    noise = noises(1000 * seed, SAMPLES, model.event_shape)
    grid = FlowSchedule(shift=1.0).nodes(N)

    # Count the network's rows and seconds.
    inner = model.velocity(None)
    network = {"rows": 0, "seconds": 0.0}

    def timed(x, t, condition):
        start = time.perf_counter()
        v = inner.fn(x, t, condition)
        network["seconds"] += time.perf_counter() - start
        network["rows"] += len(x)
        return v

    # Warm up, which also allocates the network's own memory.
    velocity = replace(inner, fn=timed)
    velocity(noise[:8].repeat(128, 1, 1, 1), torch.full((1024,), 0.5))
    network.update(rows=0, seconds=0.0)
    memory_before = peak_memory()

    # Search.
    start = time.perf_counter()
    if name == "plain":
        schedule = plain_schedule(velocity, noise, grid)
    else:
        problem = Problem(velocity, noise, grid, Euler(), XtMSE())
        schedule = STRATEGIES[name].plan(problem, [K])[K]
    seconds = time.perf_counter() - start

    return {
        "seconds": seconds,
        "outside": 1 - network["seconds"] / seconds,
        "calls": network["rows"] / SAMPLES,
        "peak": peak_memory() - memory_before,
        "times": schedule.times.tolist(),
        "psnr": held_out_psnr(model, schedule, grid),
    }


def plain_schedule(velocity, noise: torch.Tensor, grid: torch.Tensor) -> StepSchedule:
    """Return the schedule that the plain script finds."""
    from plain import search

    paths = torch.tensor(search(velocity, noise, grid, K))
    nodes = torch.nn.functional.pad(paths, (0, 1), value=N)
    return StepSchedule(grid[nodes], Free(), samples=tuple(range(SAMPLES)))


def held_out_psnr(
    model: GaussianMixture, schedule: StepSchedule, grid: torch.Tensor
) -> float | None:
    """Return the PSNR to the teacher on held-out noises; None for a schedule per search sample."""
    if schedule.per_sample:
        return None
    velocity = model.velocity(None)
    noise = noises(1_000_000, HELD_OUT, model.event_shape)
    teacher = model.decode(sample(Euler(), velocity, noise, StepSchedule(grid)))
    student = model.decode(sample(Euler(), velocity, noise, schedule))
    return float(psnr(student, teacher).mean())


def peak_memory() -> int:
    """Return the most physical memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    # One measurement, as JSON.
    parser.add_argument("--only", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.threads, options.seed)))
        return

    results = measure_all(options.repeats, options.threads)
    show(results, options.repeats)
    path = write_atomically(Path(__file__).with_name("result.json"), json.dumps(results) + "\n")
    print(f"all measurements: {path}")


def measure_all(repeats: int, threads: int) -> dict[str, list[dict]]:
    """Measure all contestants in turn, each in a process of its own."""
    results: dict[str, list[dict]] = {name: [] for name in CONTESTANTS}
    order = [(seed, name) for seed in range(repeats) for name in CONTESTANTS]
    for seed, name in track(order, "measuring", console=Console(stderr=True)):
        command = [sys.executable, __file__, "--only", name]
        command += ["--threads", str(threads), "--seed", str(seed)]
        process = subprocess.run(command, check=True, capture_output=True, text=True)
        results[name].append(json.loads(process.stdout))
    return results


def show(results: dict[str, list[dict]], repeats: int) -> None:
    """Print the table, and how many schedules equal the plain script's."""
    plain = results["plain"]
    table = Table(title=f"search of {K} steps on {N} nodes, {SAMPLES} samples, {repeats} repeats")
    table.add_column("", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("held-out PSNR", justify="right")

    # Rows.
    for name, runs in results.items():
        ratios = []
        for reference, run in zip(plain, runs, strict=True):
            ratios.append(reference["seconds"] / run["seconds"])
        calls = mean(runs, "calls")
        outside = statistics.median(run["outside"] for run in runs)
        peak = statistics.median(run["peak"] for run in runs)
        table.add_row(
            name,
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
            f"{outside:.0%}",
            f"{calls:.0f}",
            f"{calls / (N * (K + 1)):.2f}",
            f"{peak / 2**20:.0f} MiB",
            quality(runs, results.get(name.removesuffix(", band"))),
        )
    Console(width=140).print(table)

    # Equal schedules.
    equal = total = 0
    for reference, run in zip(plain, results["oss"], strict=True):
        for times, other_times in zip(reference["times"], run["times"], strict=True):
            equal += times == other_times
            total += 1
    seconds = statistics.median(run["seconds"] for run in plain)
    print(f"plain: {seconds:.2f} s; oss without band gives {equal} of {total} of its schedules")


def mean(runs: list[dict], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def quality(runs: list[dict], full: list[dict] | None) -> str:
    """Return the mean PSNR, and for a banded search its difference to the full one."""
    if runs[0]["psnr"] is None:
        return "-"
    text = f"{mean(runs, 'psnr'):.2f} dB"
    if full is not None and full is not runs:
        text += f", {mean(runs, 'psnr') - mean(full, 'psnr'):+.2f}"
    return text


if __name__ == "__main__":
    main()
