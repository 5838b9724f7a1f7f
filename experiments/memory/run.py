"""How much memory does a search need at the sizes of FLUX at 1024 x 1024 and of Wan 2.1 at 480p and 81 frames?

python -m experiments.memory.run

N = 100 Euler steps, K = 10. The network is a formula of the right shapes: what is measured is the search itself, each
in a process of its own: the peak of its memory, less what the program has before it begins.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from itertools import product

import torch
from hydra.utils import instantiate
from torch import Tensor

from experiments.common import configuration, keep, table
from oss_exp.distances import XtMSE
from oss_exp.noise import FlowSchedule
from oss_exp.solvers import Euler
from oss_exp.stepsize.problem import Problem
from oss_exp.velocity import BoundVelocity

SHAPES = {"FLUX 1024 x 1024": (4096, 64), "Wan 480p, 81 frames": (16, 21, 60, 104)}
SEARCHES = {
    "oss_ave, all edges": ["stepsize=oss_ave"],
    "oss_ave, band": ["stepsize=oss_ave", "stepsize.oss_ave.band={stride: 8, width: 1}"],
    "oss_shared, all edges": ["stepsize=oss_shared"],
    "oss_shared, band": ["stepsize=oss_shared", "stepsize.oss_shared.band={stride: 8, width: 1}"],
}
BANDED = [search for search in SEARCHES if "band" in search]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alone", nargs=3, metavar=("SHAPE", "SEARCH", "B"), help="one search in this process")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.alone:
        shape, search, count = options.alone
        print(json.dumps(searched(SHAPES[shape], SEARCHES[search], int(count), options.device)))
        return
    rows = []
    for shape, search, count in [*product(SHAPES, SEARCHES, [1]), *product(SHAPES, BANDED, [4])]:
        command = [sys.executable, "-m", "experiments.memory.run", "--alone", shape, search, str(count)]
        found = subprocess.run([*command, "--device", options.device], capture_output=True, text=True, check=True)
        peak, calls, seconds = json.loads(found.stdout.splitlines()[-1])
        states = 101 * count * torch.Size(SHAPES[shape]).numel() * 4 / 2**30
        row = [shape, search, str(count), f"{states:.2f}", f"{peak:.2f}", f"{peak / states:.1f}", str(calls)]
        rows.append([*row, f"{seconds:.0f}"])
        print(*rows[-1], sep=" | ", flush=True)
    header = ["states of", "search", "B", "teacher's states, GiB", "peak, GiB", "ratio", "network calls", "seconds"]
    keep(__file__, "table.md", table(header, rows))


@torch.no_grad()
def searched(shape: tuple[int, ...], settings: list[str], count: int, device: str) -> tuple[float, int, float]:
    """Peak memory in GiB of host and device above that at the beginning, calls a sample, seconds."""
    (strategy,) = (instantiate(each, _convert_="all") for each in configuration(*settings).stepsize.values())
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    width = torch.linspace(0.1, 1.5, shape[-1], device=device)  # of the data's Gaussian, by the last axis
    rows = 0

    def fn(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        nonlocal rows
        rows += len(x)
        t = t.to(x).view(-1, *[1] * (x.ndim - 1))
        return x * ((t - width**2 * (1 - t)) / (t**2 + width**2 * (1 - t) ** 2))

    problem = Problem(BoundVelocity(fn, None, 4), noise, FlowSchedule(3.0).nodes(100), Euler(), XtMSE())
    before, started = host(), time.perf_counter()
    strategy.plan(problem, [10])
    seconds = time.perf_counter() - started
    peak = host() - before
    if device != "cpu":
        peak += torch.cuda.max_memory_allocated() / 2**30
    return peak, rows // count, seconds


def host() -> float:
    """The most that this process has had so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
