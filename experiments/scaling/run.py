"""The growth of the calls, the memory and the time of a search with its sizes.

python -m experiments.scaling.run [--draw]

The sizes are N, K, B, the numbers in a sample and the order. oss_shared with a pinned start; the
network is a formula, so that time and memory are those of the search. Each search is a forked
process: seconds of a core, and the peak of its memory less what it began with. Results in
measured.json are not measured again; --draw writes only their figure and table.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from scipy.optimize import nnls

from experiments.common import command_line, keep, png, table
from oss_exp.noise import FlowSchedule
from oss_exp.solvers.adams_bashforth import AdamsBashforth
from oss_exp.stepsize import OSSShared, Problem
from oss_exp.stepsize.oss.edges import SCORE_FEATURES, SCORE_GROUP
from oss_exp.velocity import BoundVelocity, standard_normal_velocity

FIXED = 9.0  # MB that the smallest search takes
RESULTS = Path(__file__).with_name("measured.json")
QUANTITIES = {
    "calls": "network rows a sample",
    "memory": "memory, MB",
    "seconds": "seconds of a core",
}


@dataclass(frozen=True)
class Size:
    """The sizes of a search.

    Attributes:
        nodes: Teacher steps N.
        steps: Network calls K.
        samples: Samples B.
        event: Numbers in a sample.
        order: Largest order of a step.
    """

    nodes: int = 200
    steps: int = 5
    samples: int = 4
    event: int = 2048
    order: int = 1

    @property
    def layers(self) -> list[int]:
        """Return the number of nodes that each call of a student can be at."""
        return [1, *[self.nodes - self.steps + 1] * (self.steps - 1)]

    @property
    def calls(self) -> int:
        """Return the calls of teacher and search, whose first call is the same."""
        return self.nodes + sum(self.layers) - 1

    @property
    def memory(self) -> float:
        """Return the memory in MB.

        It holds the program, the teacher's states, those of layers, float64 copies, and tables of
        edges. While students move to the next layer there are their old states and outputs, those
        of their parents, and three temporary ones. Inner products have copies of at most
        SCORE_GROUP samples and SCORE_FEATURES numbers.
        """
        width, history = self.layers[-1], min(self.order, self.steps)
        states = 4 * self.samples * self.event * (self.nodes + 1 + width * (2 * (1 + history) + 3))
        slices = 8 * min(self.samples, SCORE_GROUP) * min(self.event, SCORE_FEATURES)
        copies = slices * max(width + self.nodes, width * (1 + history))
        tables = 6 * 8 * self.samples * width * self.nodes
        return FIXED + (states + copies + tables) / 1e6

    @property
    def work(self) -> list[float]:
        """Return the terms of the time, whose unit costs are fitted once to all searches.

        The terms are inner products of students with the teacher's states, half of which they can
        reach; numbers of states that are moved; entries of the tables of edges; and steps of the
        teacher and rounds of the search.
        """
        pairs = sum(width * self.nodes / 2 for width in self.layers) * self.samples
        entries = pairs * sum((order + 1) * (order + 2) / 2 for order in range(1, self.order + 1))
        moved = self.calls * self.samples * self.event * (1 + self.order)
        return [pairs * self.event, moved, entries, self.nodes + self.steps]


AXES: dict[str, tuple[str, Size, Sequence[int]]] = {
    "nodes": ("N", Size(), (50, 100, 200, 400, 700, 1000)),
    "steps": ("K", Size(nodes=200), (2, 5, 10, 20, 35, 50)),
    "samples": ("B", Size(nodes=50, event=512), (1, 4, 16, 64, 256, 512)),
    "event": (
        "numbers a sample",
        Size(nodes=16, steps=4, samples=1),
        (10**3, 10**4, 10**5, 10**6, 10**7),
    ),
    "order": ("order", Size(nodes=100, steps=8), (1, 2, 3, 4)),
}


def search(size: Size) -> dict[str, float]:
    """Return the calls, MB and seconds of a search of this size."""
    rows = 0

    def fn(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        nonlocal rows
        rows += len(x)
        return standard_normal_velocity(x, t)

    noise = torch.randn(size.samples, size.event, generator=torch.Generator().manual_seed(0))
    grid = FlowSchedule().nodes(size.nodes)
    problem = Problem(BoundVelocity(fn, micro_batch=64), noise, grid, AdamsBashforth(size.order))
    before = resident("VmRSS")
    started = time.process_time()
    OSSShared("pinned", None, False).plan(problem, [size.steps])
    seconds = time.process_time() - started
    return {"calls": rows / size.samples, "memory": resident("VmHWM") - before, "seconds": seconds}


def resident(name: str) -> float:
    """Return the MB of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(name))
    return int(line.split()[1]) / 1e3


def apart(size: Size) -> dict[str, float]:
    """Search in a forked process, whose memory begins small."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        os.write(writing, json.dumps(search(size)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise MemoryError(f"a search of {size} was ended")
    return json.loads(text)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of log y over log x, over the upper half of x.

    In the lower half fixed costs dominate.
    """
    logs = np.log([x, y])
    start = (len(x) - 1) // 2
    return float(np.polyfit(logs[0][start:], logs[1][start:], 1)[0])


def unit_costs(sizes: Sequence[Size], seconds: Sequence[float]) -> np.ndarray:
    """Fit the seconds of one unit of each term, by least squares of relative errors."""
    work = np.array([size.work for size in sizes]) / np.array(seconds)[:, None]
    return nnls(work, np.ones(len(work)))[0]


def draw(results: dict[str, list[dict[str, float]]]) -> None:
    """Write the figure, and a table of measured exponents and those of the formulas."""
    # Unit costs of the formula for time.
    sizes: dict[str, list[Size]] = {}
    for name, (_, base, values) in AXES.items():
        measured_values = values[: len(results[name])]
        sizes[name] = [replace(base, **{name: value}) for value in measured_values]
    all_sizes = list(itertools.chain.from_iterable(sizes.values()))
    all_results = itertools.chain.from_iterable(results[name] for name in sizes)
    costs = unit_costs(all_sizes, [result["seconds"] for result in all_results])

    # One panel for each axis and quantity.
    figure, panels = plt.subplots(3, len(AXES), figsize=(17, 9), layout="constrained")
    rows = []
    for column, (name, (label, _, values)) in enumerate(AXES.items()):
        expected = {
            "calls": [float(size.calls) for size in sizes[name]],
            "memory": [size.memory for size in sizes[name]],
            "seconds": [float(np.dot(size.work, costs)) for size in sizes[name]],
        }
        for row, (quantity, unit) in enumerate(QUANTITIES.items()):
            measured = [result[quantity] for result in results[name]]
            axis: Axes = panels[row, column]
            axis.plot(values, expected[quantity], color="0.7", lw=5, label="formula")
            axis.plot(values, measured, "o-", color="tab:blue", label="measured")
            axis.set(xscale="log", yscale="log", xlabel=label, ylabel=unit if column == 0 else "")
            label_ticks(axis, values)

            # Exponents.
            slopes = [exponent(values, measured), exponent(values, expected[quantity])]
            axis.set_title(f"exponent {slopes[0]:.2f}, formula {slopes[1]:.2f}", fontsize=10)
            axis.grid(alpha=0.3)
            rows.append([label, quantity, *(f"{slope:.2f}" for slope in slopes)])
            rows[-1].append(f"{abs(slopes[0] - slopes[1]):.2f}")
    panels[0, 0].legend()

    terms = ("inner product of a number", "number moved", "entry of a table", "step")
    print({term: f"{cost:.2e} s" for term, cost in zip(terms, costs, strict=True)})
    keep(__file__, "figure.png", png(figure))
    keep(__file__, "exponents.md", table(["grows", "what", "exponent", "formula", "apart"], rows))


def label_ticks(axis: Axes, values: Sequence[float]) -> None:
    """Label both logarithmic axes of a panel, in x at these values."""
    labels = [f"{value:g}" if value < 10**4 else f"{value:.0e}" for value in values]
    axis.set_xticks(values, labels)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.tick_params(labelsize=8)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--draw", action="store_true")

    # Earlier results.
    results: dict[str, list[dict[str, float]]] = {}
    if RESULTS.is_file():
        results = json.loads(RESULTS.read_text())

    # Missing ones.
    if not parser.parse_args().draw:
        torch.set_num_threads(1)
        search(Size(nodes=20))  # what the first search alone makes
        for name, (_, base, values) in AXES.items():
            for value in values[len(results.setdefault(name, [])) :]:
                size = replace(base, **{name: value})
                result = apart(size)
                assert math.isclose(result["calls"], size.calls), (
                    size,
                    result["calls"],
                    size.calls,
                )
                results[name].append(result)
                print(size, result, flush=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")

    draw(results)


if __name__ == "__main__":
    main()
