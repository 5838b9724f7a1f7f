"""The memory that a search needs at the sizes of FLUX (1024 x 1024) and Wan 2.1 (480p, 81 frames).

python -m experiments.memory.run

N = 100 Euler steps, K = 10. The network is a formula of the right shapes, so that only the search
is measured: in a process of its own, the peak of its memory less what the program holds before it
begins. "In its pipeline" is the same through the loop of a FluxPipeline or a WanPipeline whose
transformer is the formula.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from experiments.common import command_line, configuration, keep, table
from oss_exp.distances import XtMSE
from oss_exp.models.pipeline import Pipeline
from oss_exp.models.tiny import tiny
from oss_exp.noise import FlowSchedule
from oss_exp.solvers import Euler
from oss_exp.stepsize import Problem, StepsizeStrategy
from oss_exp.tasks import border
from oss_exp.velocity import BoundVelocity

SHAPES = {"FLUX 1024 x 1024": (4096, 64), "Wan 480p, 81 frames": (16, 21, 60, 104)}
SEARCHES = {
    "oss_ave, all edges": ["stepsize=oss_ave"],
    "oss_ave, band": ["stepsize=oss_ave", "stepsize.oss_ave.band={stride: 8, width: 1}"],
    "oss_shared, all edges": ["stepsize=oss_shared"],
    "oss_shared, band": ["stepsize=oss_shared", "stepsize.oss_shared.band={stride: 8, width: 1}"],
}
BANDED = [search for search in SEARCHES if "band" in search]
BARE = "bare"
PIPELINED = "in its pipeline"
PIPELINES = {  # with states of as many numbers
    "FLUX 1024 x 1024": ("FluxPipeline", {"height": 1024, "width": 2048}),
    "Wan 480p, 81 frames": (
        "WanPipeline",
        {"height": 960, "width": 1664, "num_frames": 81, "guidance_scale": 1.0},
    ),
}
CASES = [  # shape, search, samples, network
    *product(SHAPES, SEARCHES, [1], [BARE]),
    *product(SHAPES, BANDED, [4], [BARE]),
    *product(SHAPES, BANDED, [1], [PIPELINED]),
]
HEADER = [
    "states of",
    "network",
    "search",
    "B",
    "teacher's states, GiB",
    "peak, GiB",
    "ratio",
    "network calls",
    "seconds",
]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "--alone",
        nargs=4,
        metavar=("SHAPE", "SEARCH", "B", "NETWORK"),
        help="one search in this process",
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    # One search in this process.
    if options.alone:
        shape, search, count, network = options.alone
        make = pipelined if network == PIPELINED else bare
        velocity, noise = make(shape, int(count), options.device)
        print(json.dumps(measured(velocity, noise, SEARCHES[search], options.device)))
        return

    # All of them, each in a process of its own.
    rows = []
    for shape, search, count, network in CASES:
        peak, calls, seconds = measured_alone(shape, search, count, network, options.device)
        states = 101 * count * torch.Size(SHAPES[shape]).numel() * 4 / 2**30
        row = [shape, network, search, str(count), f"{states:.2f}", f"{peak:.2f}"]
        rows.append([*row, f"{peak / states:.1f}", str(calls), f"{seconds:.0f}"])
        print(*rows[-1], sep=" | ", flush=True)
    keep(__file__, "table.md", table(HEADER, rows))


def measured_alone(shape: str, search: str, count: int, network: str, device: str) -> list:
    """Return what `measured` does, from a process of its own."""
    command = [sys.executable, "-m", "experiments.memory.run", "--device", device]
    command += ["--alone", shape, search, str(count), network]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def bare(shape: str, count: int, device: str) -> tuple[BoundVelocity, Tensor]:
    """Return the formula, and noises for it."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, *SHAPES[shape], generator=generator).to(device)
    return BoundVelocity(lambda x, t, condition: gaussian(x, t), None, 4), noise


def pipelined(shape: str, count: int, device: str) -> tuple[BoundVelocity, Tensor]:
    """Return the formula in the place of a pipeline's transformer, and noises for it."""
    kind, size = PIPELINES[shape]
    pipe, call = tiny(kind, {})
    unit = 1 if kind == "FluxPipeline" else 1000  # of the transformer's time

    def forward(hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        return (gaussian(hidden_states, timestep / unit),)

    pipe.transformer.forward = forward
    model = Pipeline(pipe.to(device), [f"prompt {i}" for i in range(count)], **call | size)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, *model.event_shape, generator=generator).to(device)
    assert noise[0].numel() == torch.Size(SHAPES[shape]).numel(), model.event_shape
    return model.velocity(None), noise


def gaussian(x: Tensor, t: Tensor) -> Tensor:
    """Return the velocity of Gaussian data whose width depends on the last axis."""
    width = torch.linspace(0.1, 1.5, x.shape[-1], device=x.device)
    t = t.to(x).view(-1, *[1] * (x.ndim - 1))
    return x * ((t - width**2 * (1 - t)) / (t**2 + width**2 * (1 - t) ** 2))


@torch.no_grad()
def measured(
    velocity: BoundVelocity, noise: Tensor, settings: list[str], device: str
) -> tuple[float, int, float]:
    """Measure one search.

    Returns:
        Peak memory in GiB of host and device above that at the beginning, network calls per
        sample, and seconds.
    """
    ((name, config),) = configuration(*settings).stepsize.items()
    strategy = border.build(config, f"stepsize.{name}", StepsizeStrategy)

    # Count the calls.
    rows = 0

    def counted(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        nonlocal rows
        rows += len(x)
        return velocity.fn(x, t, condition)

    grid = FlowSchedule(3.0).nodes(100)
    problem = Problem(replace(velocity, fn=counted), noise, grid, Euler(), XtMSE())

    # Search.
    before = host_peak()
    start = time.perf_counter()
    strategy.plan(problem, [10])
    seconds = time.perf_counter() - start
    peak = host_peak() - before
    if device != "cpu":
        peak += torch.cuda.max_memory_allocated() / 2**30
    return peak, rows // len(noise), seconds


def host_peak() -> float:
    """Return the most host memory that this process has held so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
