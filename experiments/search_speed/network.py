"""The cost of a search beyond its network: its wall time over that of the same bare calls.

python -m experiments.search_speed.network [--repeats 3] [--threads 1] [--samples 8] [--device cpu]

The U-Net of Fashion-MNIST, 100 nodes, the strategies as shipped. The bare calls are those
of the network module alone: as many, in the same order and of the same sizes as the search made.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from hydra.utils import instantiate

from experiments.common import command_line, configuration, keep, table
from oss_exp.distances import XtMSE
from oss_exp.models.network import Network
from oss_exp.noise import FlowSchedule
from oss_exp.solvers import Euler, Solver
from oss_exp.solvers.dpm_solver_pp import DPMSolverPP
from oss_exp.stepsize import OSSAve, OSSFit, OSSShared, Problem, StepsizeStrategy

N = 100  # teacher steps
SHARED = OSSShared("analytic", None, True, "log_mean")
MULTISTEP = DPMSolverPP(3, True)
SEARCHES = {  # solver, strategy, student steps
    "`oss_ave`": (Euler(), OSSAve("free", None, False, "median", 8), [10]),
    "`oss_shared`": (Euler(), SHARED, [10]),
    "`oss_shared`, DPM-Solver++ of orders up to 3": (MULTISTEP, SHARED, [10]),
    "`oss_fit`, the same solver, K = 5, 10, 20": (MULTISTEP, OSSFit(), [5, 10, 20]),
    "`oss_fit`, not refined": (MULTISTEP, OSSFit(refine=False), [5, 10, 20]),
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    # Build the network.
    model = instantiate(configuration("model=unet_fashion").model).to(options.device)
    labels = torch.arange(options.samples, device=options.device) % 10

    # Measure.
    rows = []
    for name, (solver, strategy, num_steps) in SEARCHES.items():
        seconds = []
        ratios = []
        for seed in range(options.repeats):
            sizes, searched = search(model, labels, solver, strategy, num_steps, seed)
            seconds.append(searched)
            ratios.append(searched / bare_calls(model, labels, sizes))
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
        calls = sum(sizes) / options.samples
        rows.append([name, f"{calls:.0f}", f"{statistics.median(seconds):.1f} s", ratio])

    header = ["search", "rows a sample", "seconds", "search / bare network, median (range)"]
    keep(__file__, f"network_{options.device}.md", table(header, rows))


def search(
    model: Network,
    labels: torch.Tensor,
    solver: Solver,
    strategy: StepsizeStrategy,
    num_steps: Sequence[int],
    seed: int,
) -> tuple[list[int], float]:
    """Return the sizes of the network calls of a search, and its seconds."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), *model.event_shape, generator=generator).to(labels.device)
    grid = FlowSchedule(shift=1.0).nodes(N)
    problem = Problem(model.velocity(labels), noise, grid, solver, XtMSE())

    # Watch the network.
    forward = model.backbone.forward
    sizes = []

    def watched(x, clock, classes):
        sizes.append(len(x))
        return forward(x, clock, classes)

    model.backbone.forward = watched
    start = now(labels.device)
    strategy.plan(problem, num_steps)
    seconds = now(labels.device) - start
    model.backbone.forward = forward
    return sizes, seconds


@torch.no_grad()
def bare_calls(model: Network, labels: torch.Tensor, sizes: Sequence[int]) -> float:
    """Return the seconds of network calls of these sizes, one after the other."""
    largest = max(sizes)
    x = torch.randn(largest, *model.event_shape, device=labels.device)
    clock = torch.zeros(largest, device=labels.device)
    classes = labels[:1].expand(largest)

    start = now(labels.device)
    for size in sizes:
        model.backbone.forward(x[:size], clock[:size], classes[:size])
    return now(labels.device) - start


def now(device: torch.device) -> float:
    """Return the time in seconds, once the device has done its work."""
    if device.type != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
