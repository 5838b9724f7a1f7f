"""The state that failed searches leave: errors at random points of 1,000 searches in a pipeline.

python -m experiments.pipeline_release.run [--searches 1000]

A FluxPipeline with small random parts. A third of the searches fail by an error in a random call
of the network, a third by one in a random call of the pipeline's `callback_on_step_end`, and a
third by Ctrl-C after a random time, wherever the program is then. After each search the pipeline's
own scheduler, progress bar and hooks are checked; from time to time the suspended calls that are
alive and the memory of the process; and in the end that the pipeline makes the same images.
"""

from __future__ import annotations

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
from experiments.common import command_line, keep, table
from experiments.pipeline_overhead.run import NETWORKS, PROMPTS, pipeline
from oss_exp.models.pipeline import Pipeline

CALLS = 14  # of the network in a search, and of the callback
SECONDS = 0.3  # that a search takes
CALL = {"height": 32, "width": 32, "max_sequence_length": 16}


class Fault(Exception):
    """The error that is raised in a search."""


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--searches", type=int, default=1000)
    count = parser.parse_args().searches
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, interrupt)

    # The pipeline before any search.
    pipe = pipeline(**NETWORKS["tiny"])
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # T5 has a dropout
    before = state(pipe)
    images = run(pipe)

    # Searches.
    draw = random.Random(0)
    counts: dict[str, Counter[str]] = {fault: Counter() for fault in SEARCHES}
    memory = []
    for number in range(count):
        fault = draw.choice([*SEARCHES])
        counts[fault].update(attempt(SEARCHES[fault], pipe, draw, before))
        if number % max(count // 10, 1) == 0 or number == count - 1:
            memory.append((number + 1, resident(), suspended()))
            print(memory[-1], flush=True)

    is_same = torch.equal(run(pipe), images)
    keep(__file__, "table.md", report(counts, memory, [*before], is_same))


def attempt(
    search_with_fault: Callable[[Any, random.Random], None],
    pipe: Any,
    draw: random.Random,
    before: dict[str, Any],
) -> Counter[str]:
    """Make a search that should fail, and count what is not as before."""
    counts = Counter(["searches"])
    try:
        search_with_fault(pipe, draw)
    except (Fault, KeyboardInterrupt) as error:
        counts["raised"] += 1
        del error
    signal.setitimer(signal.ITIMER_REAL, 0)
    for name, value in state(pipe).items():
        if value != before[name]:
            counts[f"other {name}"] += 1
    return counts


def report(
    counts: dict[str, Counter[str]],
    memory: list[tuple[int, float, int]],
    parts: list[str],
    is_same: bool,
) -> str:
    columns = ["searches", "raised", *(f"other {part}" for part in parts)]
    rows = []
    for fault, counter in counts.items():
        rows.append([fault, *(str(counter[column]) for column in columns)])
    text = table(["fault in", *columns], rows) + "\n"

    rows = []
    for number, mebibytes, calls in memory:
        rows.append([str(number), f"{mebibytes:.0f}", str(calls)])
    text += table(["after searches", "MiB", "suspended calls"], rows)
    return text + f"\nThe pipeline makes {'the same' if is_same else 'OTHER'} images as before.\n"


def search(pipe: Any, **call: Any) -> None:
    model = Pipeline(pipe, PROMPTS, **CALL, **call)
    strategy = oss_exp.OSSShared("pinned", refine=False)
    oss_exp.search(model, num_steps=2, num_teacher_steps=6, strategy=strategy)


def search_with_network_fault(pipe: Any, draw: random.Random) -> None:
    with hooked(pipe, fault_after(draw.randrange(1, CALLS))):
        search(pipe)


def search_with_callback_fault(pipe: Any, draw: random.Random) -> None:
    fault = fault_after(draw.randrange(1, CALLS))

    def callback(_: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        fault()
        return tensors

    search(pipe, callback_on_step_end=callback)


def search_with_interrupt(pipe: Any, draw: random.Random) -> None:
    signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.001, SECONDS))
    search(pipe)


SEARCHES = {
    "network": search_with_network_fault,
    "callback": search_with_callback_fault,
    "Ctrl-C": search_with_interrupt,
}


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def fault_after(calls: int) -> Callable[..., None]:
    """Return a function that raises at its n-th call."""

    def fault(*_: Any) -> None:
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise Fault

    return fault


@contextmanager
def hooked(pipe: Any, fault: Callable[..., None]) -> Iterator[None]:
    """Call `fault` after every call of the network, within this context."""
    hook = pipe.transformer.transformer_blocks[0].register_forward_hook(fault)
    try:
        yield
    finally:
        hook.remove()


def run(pipe: Any) -> torch.Tensor:
    """Return the pipeline's own images."""
    draws = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    return pipe(PROMPTS, num_inference_steps=2, output_type="pt", generator=draws, **CALL).images


def state(pipe: Any) -> dict[str, Any]:
    """Return what a search must leave as it was."""
    return {
        "scheduler": id(pipe.scheduler),
        "progress bar": pipe._progress_bar_config,
        "hooks": sum(len(module._forward_hooks) for module in pipe.transformer.modules()),
    }


def suspended() -> int:
    """Return the number of suspended calls that are alive."""
    gc.collect()
    count = 0
    for value in gc.get_objects():
        if isinstance(value, greenlet) and value is not getcurrent():
            count += not value.dead
    return count


def resident() -> float:
    """Return the memory of this process, in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
