"""What searches that fail leave behind: errors at random points of 1,000 searches in a pipeline.

python -m experiments.pipeline_release.run [--searches 1000]

A FluxPipeline with small random parts. A third of the searches fail by an error in a random call of the network, a
third by one in a random call of the pipeline's `callback_on_step_end`, and a third by Ctrl-C after a random time,
wherever the program is then. After each: the pipeline's own scheduler, progress bar and hooks. In steps: suspended
calls that are alive, and the memory of the process. In the end the pipeline itself makes the same images as before.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet

import oss_exp
from experiments.common import keep, table
from experiments.pipeline_overhead.run import NETWORKS, PROMPTS, pipeline
from oss_exp.models.pipeline import Pipeline

CALLS = 14  # of the network in a search, and of the callback
SECONDS = 0.3  # that a search takes
CALL = {"height": 32, "width": 32, "max_sequence_length": 16}


class Fault(Exception):
    """What is thrown."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--searches", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, interrupt)

    pipe, draw = pipeline(**NETWORKS["tiny"]), random.Random(0)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # T5 has a dropout
    before, images = state(pipe), run(pipe)
    ways = {"network": in_the_network, "callback": in_the_callback, "Ctrl-C": by_interrupt}
    counts: dict[str, Counter[str]] = {way: Counter() for way in ways}
    memory = []
    for number in range(options.searches):
        way = draw.choice([*ways])
        counts[way]["searches"] += 1
        try:
            ways[way](pipe, draw)
        except (Fault, KeyboardInterrupt) as error:
            counts[way]["raised"] += 1
            del error
        signal.setitimer(signal.ITIMER_REAL, 0)
        after = state(pipe)
        for what, value in after.items():
            if value != before[what]:
                counts[way][f"other {what}"] += 1
        if number % max(options.searches // 10, 1) == 0 or number == options.searches - 1:
            memory.append((number + 1, resident(), suspended()))
            print(memory[-1], flush=True)
    same = torch.equal(run(pipe), images)

    left = [f"other {what}" for what in before]
    rows = [
        [way, *(str(count[key]) for key in ("searches", "raised", *left))]
        for way, count in counts.items()
    ]
    text = table(["fault in", "searches", "raised", *left], rows) + "\n"
    text += table(
        ["after searches", "MiB", "suspended calls"],
        [[str(n), f"{m:.0f}", str(s)] for n, m, s in memory],
    )
    text += f"\nThe pipeline makes {'the same' if same else 'OTHER'} images as before.\n"
    keep(__file__, "table.md", text)


def search(pipe: Any, **call: Any) -> None:
    model = Pipeline(pipe, PROMPTS, **CALL, **call)
    oss_exp.search(
        model, num_steps=2, num_teacher_steps=6, strategy=oss_exp.OSSShared("pinned", refine=False)
    )


def in_the_network(pipe: Any, draw: random.Random) -> None:
    with hooked(pipe, after(draw.randrange(1, CALLS))):
        search(pipe)


def in_the_callback(pipe: Any, draw: random.Random) -> None:
    fault = after(draw.randrange(1, CALLS))

    def callback(own: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        fault()
        return tensors

    search(pipe, callback_on_step_end=callback)


def by_interrupt(pipe: Any, draw: random.Random) -> None:
    signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.001, SECONDS))
    search(pipe)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def after(calls: int) -> Callable[..., None]:
    """A function that raises when it is called so often."""

    def fault(*_: Any) -> None:
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise Fault

    return fault


@contextmanager
def hooked(pipe: Any, fault: Callable[..., None]) -> Iterator[None]:
    hook = pipe.transformer.transformer_blocks[0].register_forward_hook(fault)
    try:
        yield
    finally:
        hook.remove()


def run(pipe: Any) -> torch.Tensor:
    draws = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    return pipe(PROMPTS, num_inference_steps=2, output_type="pt", generator=draws, **CALL).images


def state(pipe: Any) -> dict[str, Any]:
    """What a search must leave as it was."""
    hooks = sum(len(module._forward_hooks) for module in pipe.transformer.modules())
    return {
        "scheduler": id(pipe.scheduler),
        "progress bar": pipe._progress_bar_config,
        "hooks": hooks,
    }


def suspended() -> int:
    gc.collect()
    calls = [
        each for each in gc.get_objects() if isinstance(each, greenlet) and each is not getcurrent()
    ]
    return sum(not call.dead for call in calls)


def resident() -> float:
    """MiB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
