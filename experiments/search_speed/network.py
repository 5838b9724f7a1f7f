"""What a search costs beyond its network: its wall time over that of the same bare forward passes, one by one.

python -m experiments.search_speed.network [--repeats 3] [--threads 1] [--samples 8] [--device cpu]

The U-Net of Fashion-MNIST, 100 nodes, K = 10, the strategies as shipped. The bare passes are calls of the network
module alone, as many, in the same order and of the same sizes as the search made.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from hydra.utils import instantiate

from experiments.common import configuration, keep, table
from oss_exp.distances import XtMSE
from oss_exp.noise import FlowSchedule
from oss_exp.solvers import Euler
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.stepsize import OSSAve, OSSShared, Problem

N, K = 100, 10
SEARCHES = {
    "oss_ave": (Euler(), OSSAve("free", None, False, "median", 8)),
    "oss_shared": (Euler(), OSSShared("analytic", None, True, "log_mean")),
    "oss_shared, DPM-Solver++ of orders up to 3": (
        DPMSolverPP(3, True),
        OSSShared("analytic", None, True, "log_mean"),
    ),
    "oss_fit": (Euler(), None),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = instantiate(configuration("model=unet_fashion").model).to(options.device)
    fit = instantiate(configuration("stepsize=oss_fit").stepsize.oss_fit, _convert_="all")
    grid, labels = (
        FlowSchedule(shift=1.0).nodes(N),
        torch.arange(options.samples, device=options.device) % 10,
    )
    inner, sizes = model.backbone.forward, []

    def watched(x, clock, classes):
        sizes.append(len(x))
        return inner(x, clock, classes)

    def clock() -> float:
        if options.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    rows = []
    for name, (solver, strategy) in SEARCHES.items():
        ratios, seconds = [], []
        for seed in range(options.repeats):
            noise = torch.randn(
                options.samples, *model.event_shape, generator=torch.Generator().manual_seed(seed)
            )
            noise = noise.to(options.device)
            problem = Problem(model.velocity(labels), noise, grid, solver, XtMSE())
            model.backbone.forward = watched
            sizes.clear()
            started = clock()
            (strategy or fit).plan(problem, [K])
            searched = clock() - started
            model.backbone.forward = inner
            rest = [torch.randn(max(sizes), *model.event_shape, device=options.device)]
            rest += [torch.zeros(max(sizes), device=options.device), labels[:1].expand(max(sizes))]
            with torch.no_grad():
                started = clock()
                for size in sizes:
                    inner(*(tensor[:size] for tensor in rest))
                bare = clock() - started
            ratios.append(searched / bare)
            seconds.append(searched)
        calls = sum(sizes) / options.samples
        rows.append(
            [
                name,
                f"{calls:.0f}",
                f"{statistics.median(seconds):.1f} s",
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})",
            ]
        )
    header = ["search", "rows a sample", "seconds", "search / bare network, median (range)"]
    keep(__file__, f"network_{options.device}.md", table(header, rows))


if __name__ == "__main__":
    main()
