"""How much memory does a search need at the sizes of FLUX at 1024 x 1024 and of Wan 2.1 at 480p and 81 frames?

python -m experiments.memory.run

N = 100 Euler steps, K = 10. The network is a formula of the right shapes: what is measured is the search itself, each
in a process of its own: the peak of its memory, less what the program has before it begins. "In its pipeline": the same
through the loop of a FluxPipeline or a WanPipeline whose transformer is the formula.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from experiments.common import configuration, keep, table
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
BARE, PIPELINED = "bare", "in its pipeline"
BANDED = [search for search in SEARCHES if "band" in search]
PIPELINES = {  # states of as many numbers
    "FLUX 1024 x 1024": ("FluxPipeline", {"height": 1024, "width": 2048}),
    "Wan 480p, 81 frames": (
        "WanPipeline",
        {"height": 960, "width": 1664, "num_frames": 81, "guidance_scale": 1.0},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--alone",
        nargs=4,
        metavar=("SHAPE", "SEARCH", "B", "HOW"),
        help="one search in this process",
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.alone:
        shape, search, count, how = options.alone
        make = pipelined if how == PIPELINED else bare
        print(
            json.dumps(
                searched(*make(shape, int(count), options.device), SEARCHES[search], options.device)
            )
        )
        return
    rows = []
    every = [*product(SHAPES, SEARCHES, [1], [BARE]), *product(SHAPES, BANDED, [4], [BARE])]
    for shape, search, count, how in [*every, *product(SHAPES, BANDED, [1], [PIPELINED])]:
        command = [
            sys.executable,
            "-m",
            "experiments.memory.run",
            "--alone",
            shape,
            search,
            str(count),
            how,
        ]
        found = subprocess.run(
            [*command, "--device", options.device], capture_output=True, text=True, check=True
        )
        peak, calls, seconds = json.loads(found.stdout.splitlines()[-1])
        states = 101 * count * torch.Size(SHAPES[shape]).numel() * 4 / 2**30
        row = [
            shape,
            how,
            search,
            str(count),
            f"{states:.2f}",
            f"{peak:.2f}",
            f"{peak / states:.1f}",
            str(calls),
        ]
        rows.append([*row, f"{seconds:.0f}"])
        print(*rows[-1], sep=" | ", flush=True)
    header = [
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
    keep(__file__, "table.md", table(header, rows))


def bare(shape: str, count: int, device: str) -> tuple[BoundVelocity, Tensor]:
    """The formula, and noises for it."""
    noise = torch.randn(count, *SHAPES[shape], generator=torch.Generator().manual_seed(0)).to(
        device
    )
    return BoundVelocity(lambda x, t, condition: gaussian(x, t), None, 4), noise


def pipelined(shape: str, count: int, device: str) -> tuple[BoundVelocity, Tensor]:
    """The formula in the place of a pipeline's transformer, behind its loop."""
    kind, size = PIPELINES[shape]
    pipe, call = tiny(kind, {})
    pipe.transformer.forward = lambda hidden_states, timestep, **_: (
        gaussian(hidden_states, timestep / (1 if kind == "FluxPipeline" else 1000)),
    )
    model = Pipeline(pipe.to(device), [f"prompt {i}" for i in range(count)], **call | size)
    noise = torch.randn(count, *model.event_shape, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    assert noise[0].numel() == torch.Size(SHAPES[shape]).numel(), model.event_shape
    return model.velocity(None), noise


def gaussian(x: Tensor, t: Tensor) -> Tensor:
    """The velocity of Gaussian data whose width goes by the last axis."""
    width = torch.linspace(0.1, 1.5, x.shape[-1], device=x.device)
    t = t.to(x).view(-1, *[1] * (x.ndim - 1))
    return x * ((t - width**2 * (1 - t)) / (t**2 + width**2 * (1 - t) ** 2))


@torch.no_grad()
def searched(
    velocity: BoundVelocity, noise: Tensor, settings: list[str], device: str
) -> tuple[float, int, float]:
    """Peak memory in GiB of host and device above that at the beginning, calls a sample, seconds."""
    (strategy,) = (
        border.build(each, "stepsize", StepsizeStrategy)
        for each in configuration(*settings).stepsize.values()
    )
    rows = 0

    def fn(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        nonlocal rows
        rows += len(x)
        return velocity.fn(x, t, condition)

    problem = Problem(
        replace(velocity, fn=fn), noise, FlowSchedule(3.0).nodes(100), Euler(), XtMSE()
    )
    before, started = host(), time.perf_counter()
    strategy.plan(problem, [10])
    seconds = time.perf_counter() - started
    peak = host() - before
    if device != "cpu":
        peak += torch.cuda.max_memory_allocated() / 2**30
    return peak, rows // len(noise), seconds


def host() -> float:
    """The most that this process has had so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
