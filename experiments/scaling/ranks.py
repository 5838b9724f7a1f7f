"""The calls, bytes and waiting times of each rank of a search.

python -m experiments.scaling.ranks

1, 2 and 4 processes (gloo, one thread each) share 14 samples of the shipped Fashion mixture:
N = 100, K = 10.
"""

from __future__ import annotations

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


def plan(rank: int, world: int, folder: str) -> None:
    """Plan every strategy as one rank of several; the figures and the times go to a file."""
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

    # Plan with every strategy.
    result = {}
    for name, strategy in STRATEGIES.items():
        rows = 0
        velocity = model.velocity(None)

        def fn(
            x: Tensor, t: Tensor, condition: Tensor | None, velocity: BoundVelocity = velocity
        ) -> Tensor:
            nonlocal rows
            rows += len(x)
            return velocity.fn(x, t, condition)

        # The problem.
        collective = Counted()
        grid = FlowSchedule().nodes(NODES)
        counted = BoundVelocity(fn, velocity.condition, velocity.micro_batch)
        problem = Problem(
            counted, noise[samples], grid, Euler(), collective=collective, samples=samples
        )

        # The search.
        started = time.perf_counter()
        steps = strategy.plan(problem, [STEPS])[STEPS]
        result[name] = {
            "seconds": time.perf_counter() - started,
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
    for world in WORLDS:
        # Run the ranks.
        with tempfile.TemporaryDirectory() as folder:
            start_processes(plan, (world, folder), nprocs=world, start_method="forkserver")
            files = [Path(folder) / f"{rank}.json" for rank in range(world)]
            results = [json.loads(file.read_text()) for file in files]

        # One row a strategy.
        for name in STRATEGIES:
            ranks = [result[name] for result in results]
            expected.setdefault(name, ranks[0]["times"])
            assert all(rank["times"] == expected[name] for rank in ranks), (world, name)
            calls = [rank["rows"] for rank in ranks]
            balance = sum(calls) / (world * max(calls))
            most = SAMPLES / (world * math.ceil(SAMPLES / world))
            waits = [100 * rank["waiting"] / rank["seconds"] for rank in ranks]
            waited = f"{min(waits):.0f} to {max(waits):.0f}"
            rows.append([name, str(world), *cells(ranks), waited, f"{balance:.3f}", f"{most:.3f}"])

    header = [
        "strategy",
        "ranks",
        "collective calls",
        "KB a rank",
        "largest, KB",
        "in them, %",
        "balance",
        "formula",
    ]
    keep(__file__, "ranks.md", table(header, rows))


def cells(ranks: list[dict[str, Any]]) -> list[str]:
    first = ranks[0]
    return [str(first["calls"]), f"{first['bytes'] / 1e3:.1f}", f"{first['largest'] / 1e3:.1f}"]


if __name__ == "__main__":
    main()
