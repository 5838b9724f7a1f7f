"""How near the searches come to the best of all paths, on grids that are small enough to try every one.

python -m experiments.optimality.run    # ten minutes of a core
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.progress import track

from experiments.common import keep, png, table
from oss_exp.models.families.mixture import GaussianMixture
from oss_exp.models.guidance import Guidance
from oss_exp.noise import (
    DDIMSchedule,
    EDMSchedule,
    FlowSchedule,
    LogSNRSchedule,
    NoiseSchedule,
    QuadraticSchedule,
)
from oss_exp.noise.heuristics import CosineSchedule
from oss_exp.schedule import StartKind
from oss_exp.solvers import Euler
from oss_exp.solvers.base import State
from oss_exp.stepsize import OSSShared, Problem
from oss_exp.stepsize.oss.objectives import Shared
from oss_exp.stepsize.oss.recursion import start_states
from oss_exp.stepsize.oss.refine import SolverStudent, refine

SCHEDULES: dict[str, NoiseSchedule] = {
    "fm": FlowSchedule(),
    "fm, shift 3": FlowSchedule(3.0),
    "ddim": DDIMSchedule(),
    "edm": EDMSchedule(),
    "logsnr": LogSNRSchedule(),
    "quadratic": QuadraticSchedule(),
    "cosine": CosineSchedule(),
}
MIXTURES = ("mixture_digits", "mixture_fashion")
SIZES = ((10, 2), (12, 3), (14, 3), (14, 4), (16, 5))
STARTS: tuple[StartKind, ...] = ("pinned", "free", "analytic")
COUNT = 16  # search samples
OBJECTIVE = Shared("log_mean")


def main() -> None:
    torch.set_grad_enabled(False)
    gaps: dict[StartKind, dict[str, list[float]]] = {
        start: {"recursion": [], "refined": []} for start in STARTS
    }
    rows = []
    settings = list(product(MIXTURES, SCHEDULES, SIZES))
    for mixture, schedule, (nodes, k) in track(settings, "settings"):
        problem = problem_of(mixture, SCHEDULES[schedule], nodes)
        cells = [mixture, schedule, str(nodes), str(k)]
        for start in STARTS:
            best = min(errors(problem, k, start))
            path = OSSShared(start, None, False, "log_mean").paths(problem, [k], OBJECTIVE)[k]
            for name, found in (
                ("recursion", path),
                ("refined", refine(problem, path, start, OBJECTIVE)),
            ):
                *_, error = SolverStudent(problem, start, OBJECTIVE).run(found)
                gaps[start][name].append((float(error) - best) / COUNT * 10 / np.log(10))
                cells.append(f"{gaps[start][name][-1]:.3f}")
        rows.append(cells)
    header = [
        "mixture",
        "noise schedule",
        "N",
        "K",
        *(f"{s}, {n}" for s in STARTS for n in ("recursion", "refined")),
    ]
    keep(
        __file__,
        "settings.md",
        table(header, rows) + "\ndB of PSNR below the best of all paths, Euler's steps.\n",
    )
    keep(__file__, "summary.md", summary(gaps))
    keep(__file__, "gaps.png", picture(gaps))


def problem_of(mixture: str, schedule: NoiseSchedule, nodes: int) -> Problem:
    """Noises of a teacher of so many Euler steps; float64, so that equal paths have equal errors."""
    model = GaussianMixture.from_asset(
        f"{mixture}.safetensors", guidance=Guidance(), micro_batch=4096
    ).double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(COUNT, *model.event_shape, generator=generator, dtype=torch.float64)
    grid = schedule.nodes(nodes)
    return Problem(model.velocity(None), noise * grid[0], grid, Euler())


def errors(problem: Problem, k: int, start: StartKind) -> Iterator[float]:
    """The objective of every path of k calls; a node's call is made once for all paths that share what comes before."""
    end, count = problem.num_nodes, len(problem.noise)

    def closed(state: State) -> float:
        final = problem.solver.advance(problem.velocity, state, problem.grid[-1].expand(count))
        return float(OBJECTIVE(problem.cost(final.x, torch.tensor([end])), problem.collective))

    def onwards(state: State, node: int, calls: int) -> Iterator[float]:
        if calls == k:
            yield closed(state)
            return
        for after in range(node + 1, end - (k - calls) + 1):
            moved = problem.solver.advance(
                problem.velocity, state, problem.grid[after].expand(count)
            )
            yield from onwards(problem.solver.observe(problem.velocity, moved), after, calls + 1)

    for first in range(1 if start == "pinned" else end - k + 1):
        state = start_states(problem, torch.tensor([[first]]), start)
        yield from onwards(problem.solver.observe(problem.velocity, state), first, 1)


def summary(gaps: dict[StartKind, dict[str, list[float]]]) -> str:
    rows = []
    for start, found in gaps.items():
        for name, values in found.items():
            gap = np.array(values)
            shares = [f"{np.mean(gap < limit):.0%}" for limit in (1e-6, 0.1)]
            rows.append(
                [
                    start,
                    name,
                    *shares,
                    f"{np.median(gap):.3f}",
                    f"{gap.mean():.3f}",
                    f"{gap.max():.2f}",
                ]
            )
    header = ["start", "path", "optimal", "within 0.1 dB", "median, dB", "mean, dB", "worst, dB"]
    return table(header, rows) + f"\n{len(gaps['free']['refined'])} settings each.\n"


def picture(gaps: dict[StartKind, dict[str, list[float]]]) -> bytes:
    """Sorted gaps of every start."""
    figure, axes = plt.subplots(
        1, len(STARTS), figsize=(12, 3.6), layout="constrained", sharey=True
    )
    for axis, start in zip(axes, STARTS, strict=True):
        for name, color in (("recursion", "tab:red"), ("refined", "tab:blue")):
            values = np.sort(gaps[start][name])
            axis.plot(np.arange(len(values)) / len(values), values, color=color, label=name)
        axis.set(title=f"{start} start", xlabel="share of the settings")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("dB below the best of all paths")
    axes[0].legend()
    return png(figure)


if __name__ == "__main__":
    main()
