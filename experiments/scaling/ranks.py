"""The calls, bytes, memory and waiting times of each rank of a search.

python -m experiments.scaling.ranks

1, 2 and 4 processes (gloo, one thread each) share 14 samples of the shipped Fashion mixture:
N = 100, K = 10.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import start_processes

from experiments.common import command_line, keep, table
from experiments.scaling.run import Size, resident
from oss_exp.models.families.mixture import GaussianMixture
from oss_exp.noise import FlowSchedule
from oss_exp.solvers import Euler
from oss_exp.stepsize import OSS, OSSAve, OSSFit, OSSShared, Problem
from oss_exp.tasks.collective import DistributedCollective
from oss_exp.velocity import BoundVelocity

WORLDS = (1, 2, 4)
SAMPLES = 14
NODES = 100
STEPS = 10
STRATEGIES = {
    "oss": OSS("pinned", None, False),
    "oss_ave": OSSAve("pinned", None, False),
    "oss_shared": OSSShared("pinned", None, False),
    "oss_fit": OSSFit("pinned", None, False),
}


class Counted(DistributedCollective):
    """A collective that counts calls, bytes, and the seconds of sending and waiting."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0
        self.largest = 0
        self.waiting = 0.0

    def sum(self, tensor: Tensor) -> Tensor:
        return self._counted(super().sum, tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        return self._counted(super().gather, tensor)

    def _counted(self, work: Any, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        self.calls += 1
        self.bytes += size
        self.largest = max(self.largest, size)
        started = time.perf_counter()
        result = work(tensor)
        self.waiting += time.perf_counter() - started
        return result


def plan(rank: int, world: int, name: str, folder: str) -> None:
    """Plan with a strategy as one rank of several; the figures and the times go to a file."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
        )

    # This rank's samples.
    model = GaussianMixture.from_asset()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SAMPLES, *model.event_shape, generator=generator)
    samples = torch.arange(SAMPLES)[rank::world]
    velocity = model.velocity(None)
    rows = 0

    def fn(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        nonlocal rows
        rows += len(x)
        return velocity.fn(x, t, condition)

    # The problem. One call of the network first: its memory is not the search's.
    counted = BoundVelocity(fn, velocity.condition, velocity.micro_batch)
    collective = Counted()
    grid = FlowSchedule().nodes(NODES)
    problem = Problem(
        counted, noise[samples], grid, Euler(), collective=collective, samples=samples
    )
    count = velocity.micro_batch
    velocity.fn(torch.zeros(count, *model.event_shape), torch.full((count,), 0.5), None)

    # The search.
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins here
    before = resident("VmRSS")
    started = time.perf_counter()
    steps = STRATEGIES[name].plan(problem, [STEPS])[STEPS]
    result = {
        "seconds": time.perf_counter() - started,
        "memory": resident("VmHWM") - before,
        "rows": rows,
        "times": steps.times.tolist(),
        **vars(collective),
    }

    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    if world > 1:
        dist.destroy_process_group()


def main() -> None:
    command_line(__doc__).parse_args()
    expected: dict[str, Any] = {}
    rows = []
    for world, name in itertools.product(WORLDS, STRATEGIES):
        # Run the ranks.
        with tempfile.TemporaryDirectory() as folder:
            start_processes(plan, (world, name, folder), nprocs=world, start_method="forkserver")
            files = [Path(folder) / f"{rank}.json" for rank in range(world)]
            ranks = [json.loads(file.read_text()) for file in files]
        expected.setdefault(name, ranks[0]["times"])
        assert all(rank["times"] == expected[name] for rank in ranks), (world, name)

        # What each sends, holds and waits for.
        most = math.ceil(SAMPLES / world)
        held = Size(NODES, STEPS, most, math.prod(GaussianMixture.from_asset().event_shape))
        formula = f"{held.memory:.0f}" if name == "oss_shared" else "-"
        memory = f"{max(rank['memory'] for rank in ranks):.0f}"
        waits = [100 * rank["waiting"] / rank["seconds"] for rank in ranks]
        waited = f"{min(waits):.0f} to {max(waits):.0f}"
        sent = [ranks[0]["bytes"] / 1e3, ranks[0]["largest"] / 1e3]
        row = [name, str(world), str(ranks[0]["calls"]), *(f"{size:.1f}" for size in sent)]

        # How evenly they work.
        calls = [rank["rows"] for rank in ranks]
        balance = [sum(calls) / (world * max(calls)), SAMPLES / (world * most)]
        rows.append([*row, memory, formula, waited, *(f"{share:.3f}" for share in balance)])

    header = ["strategy", "ranks", "collective calls", "KB a rank", "largest, KB", "MB at most"]
    header += ["formula, MB", "in them, %", "balance", "formula"]
    keep(__file__, "ranks.md", table(header, rows))


if __name__ == "__main__":
    main()
