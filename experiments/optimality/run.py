"""The distance of searched paths to the best, on grids small enough to try every path.

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

from experiments.common import command_line, keep, png, table
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

Gaps = dict[StartKind, dict[str, list[float]]]  # by start and path, dB below the best path


def main() -> None:
    command_line(__doc__).parse_args()
    torch.set_grad_enabled(False)
    gaps: Gaps = {start: {"recursion": [], "refined": []} for start in STARTS}

    # Every setting.
    rows = []
    settings = list(product(MIXTURES, SCHEDULES, SIZES))
    for mixture, schedule, (nodes, k) in track(settings, "settings"):
        problem = problem_of(mixture, SCHEDULES[schedule], nodes)
        row = [mixture, schedule, str(nodes), str(k)]
        for start in STARTS:
            for name, gap in gaps_of(problem, k, start).items():
                gaps[start][name].append(gap)
                row.append(f"{gap:.3f}")
        rows.append(row)

    # Tables and picture.
    header = ["mixture", "noise schedule", "N", "K"]
    for start in STARTS:
        header += [f"{start}, recursion", f"{start}, refined"]
    note = "\ndB of PSNR below the best of all paths, Euler's steps.\n"
    keep(__file__, "settings.md", table(header, rows) + note)
    keep(__file__, "summary.md", summary(gaps))
    keep(__file__, "gaps.png", picture(gaps))


def gaps_of(problem: Problem, k: int, start: StartKind) -> dict[str, float]:
    """Return how far the recursion's path and the refined one are below the best, in dB."""
    best = min(errors(problem, k, start))
    path = OSSShared(start, None, False, "log_mean").paths(problem, [k], OBJECTIVE)[k]
    paths = {"recursion": path, "refined": refine(problem, path, start, OBJECTIVE)}

    gaps = {}
    for name, path in paths.items():
        *_, error = SolverStudent(problem, start, OBJECTIVE).run(path)
        gaps[name] = (float(error) - best) / COUNT * 10 / np.log(10)
    return gaps


def problem_of(mixture: str, schedule: NoiseSchedule, nodes: int) -> Problem:
    """Return a problem with a teacher of `nodes` Euler steps.

    It is in float64, so that equal paths have equal errors.
    """
    model = GaussianMixture.from_asset(
        f"{mixture}.safetensors", guidance=Guidance(), micro_batch=4096
    ).double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(COUNT, *model.event_shape, generator=generator, dtype=torch.float64)
    grid = schedule.nodes(nodes)
    return Problem(model.velocity(None), noise * grid[0], grid, Euler())


def errors(problem: Problem, k: int, start: StartKind) -> Iterator[float]:
    """Yield the objective of every path of k calls.

    The call at a node is made once for all paths that share the nodes before it.
    """
    end = problem.num_nodes
    count = len(problem.noise)

    # The error of a path whose calls are all made.
    def final_error(state: State) -> float:
        final = problem.solver.advance(problem.velocity, state, problem.grid[-1].expand(count))
        return float(OBJECTIVE(problem.cost(final.x, torch.tensor([end])), problem.collective))

    # The errors of all paths that begin alike.
    def continued(state: State, node: int, calls: int) -> Iterator[float]:
        if calls == k:
            yield final_error(state)
            return
        for next_node in range(node + 1, end - (k - calls) + 1):
            t_next = problem.grid[next_node].expand(count)
            moved = problem.solver.advance(problem.velocity, state, t_next)
            observed = problem.solver.observe(problem.velocity, moved)
            yield from continued(observed, next_node, calls + 1)

    for first in range(1 if start == "pinned" else end - k + 1):
        state = start_states(problem, torch.tensor([[first]]), start)
        yield from continued(problem.solver.observe(problem.velocity, state), first, 1)


def summary(gaps: Gaps) -> str:
    rows = []
    for start, paths in gaps.items():
        for name, values in paths.items():
            gap = np.array(values)
            shares = [f"{np.mean(gap < limit):.0%}" for limit in (1e-6, 0.1)]
            numbers = [f"{np.median(gap):.3f}", f"{gap.mean():.3f}", f"{gap.max():.2f}"]
            rows.append([start, name, *shares, *numbers])
    header = ["start", "path", "optimal", "within 0.1 dB", "median, dB", "mean, dB", "worst, dB"]
    return table(header, rows) + f"\n{len(gaps['free']['refined'])} settings each.\n"


def picture(gaps: Gaps) -> bytes:
    """Draw the sorted gaps of every start."""
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
