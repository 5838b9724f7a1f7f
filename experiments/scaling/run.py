"""How do the calls, the memory and the time of a search grow with N, K, B, the event's size and the order?

python -m experiments.scaling.run [--draw]

oss_shared, pinned start, the network a formula: time and memory are the search's own. Each search is a forked process:
seconds of a core, and the peak of its memory less what it began with. What measured.json has is not measured again;
--draw: only the figure and the table of it.
"""

from __future__ import annotations

import argparse
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

from experiments.common import keep, png, table
from oss_exp.noise import FlowSchedule
from oss_exp.solvers.adams_bashforth import AdamsBashforth
from oss_exp.stepsize import OSSShared, Problem
from oss_exp.velocity import BoundVelocity, standard_normal_velocity

RESULTS = Path(__file__).with_name("measured.json")
QUANTITIES = {
    "calls": "network rows a sample",
    "memory": "memory, MB",
    "seconds": "seconds of a core",
}


@dataclass(frozen=True)
class Size:
    """Of a search: N teacher steps, K calls, B samples, E numbers in a sample, steps of up to this order."""

    nodes: int = 200
    steps: int = 5
    samples: int = 4
    event: int = 2048
    order: int = 1

    @property
    def layers(self) -> list[int]:
        """Nodes that a student may stand on before each of its calls."""
        return [1, *[self.nodes - self.steps + 1] * (self.steps - 1)]

    @property
    def calls(self) -> int:
        """Teacher and search; the first call of both is the same one."""
        return self.nodes + sum(self.layers) - 1

    @property
    def memory(self) -> float:
        """MB: the teacher's states, a layer's states with their history, made anew for the next layer, and tables."""
        width, history = self.layers[-1], min(self.order, self.steps)
        states = 4 * self.samples * self.event * (self.nodes + 1 + 2 * width * (1 + history))
        products = 8 * self.samples * width * self.nodes * 2 * (1 + history)
        return (states + products) / 1e6

    @property
    def operations(self) -> float:
        """Multiplications of the inner products with the teacher's states, half of which a student can reach."""
        return sum(width * self.nodes / 2 * self.samples * self.event for width in self.layers)


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
    """Calls, MB and seconds of a search of this size."""
    rows = 0

    def fn(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        nonlocal rows
        rows += len(x)
        return standard_normal_velocity(x, t)

    noise = torch.randn(size.samples, size.event, generator=torch.Generator().manual_seed(0))
    grid = FlowSchedule().nodes(size.nodes)
    problem = Problem(BoundVelocity(fn, micro_batch=64), noise, grid, AdamsBashforth(size.order))
    before, started = resident("VmRSS"), time.process_time()
    OSSShared("pinned", None, False).plan(problem, [size.steps])
    seconds = time.process_time() - started
    return {"calls": rows / size.samples, "memory": resident("VmHWM") - before, "seconds": seconds}


def resident(name: str) -> float:
    """MB of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(name))
    return int(line.split()[1]) / 1e3


def apart(size: Size) -> dict[str, float]:
    """The same in a forked process, whose memory begins small."""
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
    """The slope of y over x, both in logarithms, over the upper half of x: below, fixed costs are most of it."""
    logs = np.log([x, y])
    start = (len(x) - 1) // 2
    return float(np.polyfit(logs[0][start:], logs[1][start:], 1)[0])


def theory(size: Size) -> dict[str, float]:
    return {"calls": size.calls, "memory": size.memory, "seconds": size.operations}


def draw(results: dict[str, list[dict[str, float]]]) -> None:
    """The figure, and the table of exponents beside those of the formulas at the same sizes."""
    figure, panels = plt.subplots(3, len(AXES), figsize=(17, 9), layout="constrained")
    rows = []
    for column, (name, (label, base, values)) in enumerate(AXES.items()):
        values = values[: len(results[name])]
        sizes = [replace(base, **{name: value}) for value in values]
        for row, (quantity, unit) in enumerate(QUANTITIES.items()):
            measured = [result[quantity] for result in results[name]]
            expected = [theory(size)[quantity] for size in sizes]
            axis: Axes = panels[row, column]
            scale = measured[-1] / expected[-1] if quantity == "seconds" else 1.0
            axis.plot(
                values, [scale * each for each in expected], color="0.6", lw=4, label="formula"
            )
            axis.plot(values, measured, "o-", color="tab:blue", label="measured")
            axis.set(xscale="log", yscale="log", xlabel=label, ylabel=unit if column == 0 else "")
            slopes = [exponent(values, each) for each in (measured, expected)]
            axis.set_title(f"exponent {slopes[0]:.2f}, formula {slopes[1]:.2f}", fontsize=10)
            axis.grid(alpha=0.3)
            near = abs(slopes[0] - slopes[1]) <= 0.15
            rows.append(
                [
                    label,
                    quantity,
                    *(f"{slope:.2f}" for slope in slopes),
                    "" if near else "see below",
                ]
            )
    panels[0, 0].legend()
    keep(__file__, "figure.png", png(figure))
    keep(__file__, "exponents.md", table(["grows", "what", "measured", "formula", ""], rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draw", action="store_true")
    results: dict[str, list[dict[str, float]]] = {}
    if RESULTS.is_file():
        results = json.loads(RESULTS.read_text())
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
