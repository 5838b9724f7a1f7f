"""The suspended calls of one pipeline, one for every group of samples evaluated together."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from oss_exp.models.pipeline.arguments import (
    PER_SAMPLE,
    call_parameters,
    condition_argument,
    for_samples,
    strength_of,
)
from oss_exp.models.pipeline.convention import NetworkConvention
from oss_exp.models.pipeline.loop import Loop

MAX_SUSPENDED = 64  # calls; one schedule for each of 32 samples needs 32


class SuspendedCalls:
    """The calls of a pipeline that are suspended, by their samples, the latest one last.

    Args:
        pipe: The pipeline.
        convention: How its network was trained.
        prompts: What samples number.
        call: All other arguments of a call.
        apart: Keep the conditional and unconditional outputs of a step apart.

    Attributes:
        begin_at_image: The latest call began at an image; False before the first call.
    """

    def __init__(
        self,
        pipe: Any,
        convention: NetworkConvention,
        prompts: Sequence[Any],
        call: Mapping[str, Any],
        apart: bool,
    ):
        self.pipe = pipe
        self.convention = convention
        self.prompts = prompts
        self.call = call
        self.apart = apart
        self.kind = type(pipe).__name__
        self.strength = float(strength_of(type(pipe), call))

        # Arguments that every call has.
        parameters = call_parameters(type(pipe))
        self.condition_argument = condition_argument(parameters)
        self.takes_generator = "generator" in parameters

        # Calls so far.
        self.loops: dict[tuple[int, ...], Loop] = {}
        self.begin_at_image = False
        self._have_no_memory = False  # not known yet

    def __len__(self) -> int:
        return len(self.loops)

    def begin(self, samples: Sequence[int], **call: Any) -> Loop:
        """Begin a call of these samples, and suspend it at its network's first output.

        The caller owns the call, and has to release it.
        """
        # Arguments.
        arguments = {self.condition_argument: [self.prompts[i] for i in samples]}
        for name, value in self.call.items():
            per_sample = name in PER_SAMPLE
            count = len(self.prompts)
            arguments[name] = for_samples(value, samples, count) if per_sample else value
        if self.takes_generator:
            arguments["generator"] = _generators(arguments.get("generator"), samples)
        arguments |= call

        # The first step.
        loop = Loop(self.pipe, self.convention, arguments, self.apart)
        try:
            loop.begin(len(samples))
            self.begin_at_image = loop.start_image is not None
            if loop.start_image is None and self.strength != 1:
                raise ValueError(
                    f"strength={self.strength} of {self.kind} starts inside of the schedule, and "
                    "it is not its scheduler that puts noise on the image; "
                    "search with strength=1.0"
                )
        except BaseException:
            loop.release()
            raise
        return loop

    def resume(self, samples: tuple[int, ...]) -> Loop:
        """Return the suspended call of these samples, and make it the latest; begin it if needed.

        The oldest call ends if there are many.

        Raises:
            ValueError: If the call is suspended in another thread that is alive.
        """
        # A call ends with its thread.
        loop = self.loops.get(samples)
        if loop is not None and loop.thread is not threading.current_thread():
            if loop.thread.is_alive():
                raise ValueError(
                    f"a call of {self.kind} is suspended in another thread, {loop.thread.name}, "
                    "and can go on only there; use the model in that thread, "
                    "or call its release() there first"
                )
            loop = None

        loop = loop or self.begin(samples)
        self.loops.pop(samples, None)
        self.loops[samples] = loop

        # One test for all calls.
        if not self._have_no_memory:
            loop.require_no_memory()
            self._have_no_memory = True

        while len(self.loops) > MAX_SUSPENDED:
            self.loops.pop(next(iter(self.loops))).release()
        return loop

    def latest_of_size(self, count: int) -> tuple[int, ...]:
        """Return the samples of the latest call of `count` samples, else the first samples."""
        for samples in reversed(self.loops):
            if len(samples) == count:
                return samples
        return tuple(i % len(self.prompts) for i in range(count))

    def release(self) -> None:
        """End all calls, and forget them."""
        for loop in self.loops.values():
            loop.release()
        self.loops.clear()


def group_rows(
    times: Sequence[float], samples: Sequence[int]
) -> list[tuple[tuple[int, ...], list[int]]]:
    """Group rows into calls: of one time, each sample at most once, in the samples' order.

    Returns:
        The samples and the rows of every call.
    """
    # Rows of the same time and sample go to different calls.
    count: Counter[tuple[float, int]] = Counter()
    calls: dict[tuple[float, int], list[int]] = {}
    for row, (time, sample) in enumerate(zip(times, samples, strict=True)):
        calls.setdefault((time, count[time, sample]), []).append(row)
        count[time, sample] += 1

    groups = []
    for rows in calls.values():
        ordered = sorted(rows, key=samples.__getitem__)
        groups.append((tuple(samples[row] for row in ordered), ordered))
    return groups


def _generators(generator: Any, samples: Sequence[int]) -> Any:
    """Return generators for one call, so that a prompt draws the same numbers in every call."""
    if generator is None:
        return [torch.Generator().manual_seed(i) for i in samples]
    if isinstance(generator, list):
        return [item.clone_state() for item in generator]
    return generator.clone_state()
