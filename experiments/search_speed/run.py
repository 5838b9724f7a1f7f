"""How fast is the search, against plain Algorithm 1? Same machine, same run, each contestant in its own process.

python experiments/search_speed/run.py [--repeats 5] [--threads 1]

Prints, for K = 10 steps on a 100-step grid of the Fashion mixture with 64 samples (other ones in each repeat): wall
time as a ratio to the plain script of the same repeat (median, lowest, highest), the share of time outside the network,
network calls a sample with the teacher's, peak memory above what the loaded model already held, held-out PSNR (mean
over repeats; with a band also the difference to the search without), and how many schedules are the plain script's.
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

from oss_exp.distances import XtMSE
from oss_exp.evaluation.psnr import psnr
from oss_exp.files import write_atomically
from oss_exp.models.families.mixture import GaussianMixture
from oss_exp.models.guidance import Guidance
from oss_exp.noise import FlowSchedule
from oss_exp.schedule import Free, StepSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.stepsize import OSS, Band, OSSAve, OSSShared, Problem

N, K, SAMPLES, HELD_OUT = 100, 10, 64, 256
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


def noises(first: int, count: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(first + i))
            for i in range(count)
        ]
    )


def measure(name: str, threads: int, seed: int) -> dict:
    """Run one contestant in this process."""
    torch.set_num_threads(threads)
    model = GaussianMixture.from_asset(
        "mixture_fashion.safetensors", guidance=Guidance(), micro_batch=1024
    )
    noise, grid = noises(1000 * seed, SAMPLES, model.event_shape), FlowSchedule(shift=1.0).nodes(N)
    inner = model.velocity(None)
    network = {"rows": 0, "seconds": 0.0}

    def fn(x, t, condition):
        started = time.perf_counter()
        v = inner.fn(x, t, condition)
        network["seconds"] += time.perf_counter() - started
        network["rows"] += len(x)
        return v

    velocity = replace(inner, fn=fn)
    velocity(
        noise[:8].repeat(128, 1, 1, 1), torch.full((1024,), 0.5)
    )  # warm-up, and the network's own memory
    network.update(rows=0, seconds=0.0)
    held = resident()

    started = time.perf_counter()
    if name == "plain":
        from plain import search

        paths = torch.tensor(search(velocity, noise, grid, K))
        nodes = torch.nn.functional.pad(paths, (0, 1), value=N)
        plan = StepSchedule(grid[nodes], Free(), samples=tuple(range(SAMPLES)))
    else:
        plan = STRATEGIES[name].plan(Problem(velocity, noise, grid, Euler(), XtMSE()), [K])[K]
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held
    return {
        "seconds": seconds,
        "outside": 1 - network["seconds"] / seconds,
        "calls": network["rows"] / SAMPLES,
        "peak": peak,
        "times": plan.times.tolist(),
        "psnr": held_out_psnr(model, plan, grid),
    }


def held_out_psnr(model: GaussianMixture, plan: StepSchedule, grid: torch.Tensor) -> float | None:
    """Against the teacher on other noises; None for schedules that belong to the search samples."""
    if plan.per_sample:
        return None
    velocity, noise = model.velocity(None), noises(1_000_000, HELD_OUT, model.event_shape)
    teacher, student = (
        model.decode(sample(Euler(), velocity, noise, steps))
        for steps in (StepSchedule(grid), plan)
    )
    return float(psnr(student, teacher).mean())


def resident() -> int:
    """Bytes of physical memory this process has ever held: the mark above which a search's own memory counts."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--only", choices=CONTESTANTS, help=argparse.SUPPRESS
    )  # one measurement, as JSON
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.threads, options.seed)))
        return

    results: dict[str, list[dict]] = {name: [] for name in CONTESTANTS}
    order = [(seed, name) for seed in range(options.repeats) for name in CONTESTANTS]
    for seed, name in track(order, "measuring", console=Console(stderr=True)):
        command = [
            sys.executable,
            __file__,
            "--only",
            name,
            "--threads",
            str(options.threads),
            "--seed",
            str(seed),
        ]
        results[name].append(
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        )

    plain = results["plain"]
    table = Table(
        title=f"search of {K} steps on {N} nodes, {SAMPLES} samples, {options.repeats} repeats"
    )
    for column in (
        "",
        "times faster (lowest-highest)",
        "outside the network",
        "calls a sample",
        "of N(K+1)",
        "peak memory",
    ):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    table.add_column("held-out PSNR", justify="right")
    for name, runs in results.items():
        ratios = sorted(p["seconds"] / r["seconds"] for p, r in zip(plain, runs, strict=True))
        calls, quality = statistics.mean(r["calls"] for r in runs), "-"
        if runs[0]["psnr"] is not None:
            quality = f"{statistics.mean(r['psnr'] for r in runs):.2f} dB"
            full = results.get(name.removesuffix(", band"))
            if full is not runs:
                quality += f", {statistics.mean(r['psnr'] - f['psnr'] for r, f in zip(runs, full, strict=True)):+.2f}"
        table.add_row(
            name,
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})",
            f"{statistics.median(r['outside'] for r in runs):.0%}",
            f"{calls:.0f}",
            f"{calls / (N * (K + 1)):.2f}",
            f"{statistics.median(r['peak'] for r in runs) / 2**20:.0f} MiB",
            quality,
        )
    Console(width=140).print(table)
    pairs = [
        pair
        for p, r in zip(plain, results["oss"], strict=True)
        for pair in zip(p["times"], r["times"], strict=True)
    ]
    same = sum(a == b for a, b in pairs)
    seconds = statistics.median(r["seconds"] for r in plain)
    print(f"plain: {seconds:.2f} s; oss without band gives {same} of {len(pairs)} of its schedules")
    path = write_atomically(Path(__file__).with_name("result.json"), json.dumps(results) + "\n")
    print(f"all measurements: {path}")


if __name__ == "__main__":
    main()
