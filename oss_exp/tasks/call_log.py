"""Resume killed work from a log of its network calls.

A search is deterministic, so nothing of a strategy's state needs saving. The search starts again,
and its calls are answered from the log until the log ends. So are those of `task=statistics`.
"""

from __future__ import annotations

import contextlib
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from oss_exp.files import LIMIT
from oss_exp.velocity import BoundVelocity, network_has_to_run

# Checksums of a call's input and answer, and the size in bytes of the answer, which follows.
HEAD = struct.Struct("<IIQ")


class Calls:
    """The log of one rank's network calls: a file per piece of work, a record per call.

    A record that is cut short, damaged, or of another input is dropped with all that follow.

    Args:
        folder: The folder of the logs.
        rank: The rank, which is in their names.
    """

    def __init__(self, folder: Path, rank: int):
        self.folder = folder
        self.rank = rank
        self.file: BinaryIO | None = None
        self.replays = False

    @contextlib.contextmanager
    def of(self, work: str, expected: int = 0) -> Iterator[None]:
        """Answer calls from the log of a piece of work, and log new ones, within this context.

        Args:
            work: Name of the piece of work.
            expected: Expected size of its log, in bytes.

        Raises:
            OSError: If the disk is too small.
        """
        path = self._path(work)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        free = shutil.disk_usage(self.folder).free + path.stat().st_size
        if expected > free:
            raise self._no_room(
                f"they come to about {expected / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
            )

        self.file = path.open("r+b")
        self.replays = True
        try:
            yield
        finally:
            # An error of unwritten data was raised by `_append` already.
            with contextlib.suppress(OSError):
                self.file.close()
            self.file = None

    def forget(self) -> None:
        """Delete the log, when all results are on disk."""
        for path in self.folder.glob(f"*.{self.rank}.calls"):
            path.unlink()
        with contextlib.suppress(OSError):  # another rank's files are still there
            self.folder.rmdir()

    def recorded(self, velocity: BoundVelocity) -> BoundVelocity:
        """Return a velocity that answers through the log.

        Calls that gradients go through are not logged, and none within `network_running`.
        """

        def fn(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            needs_gradient = torch.is_grad_enabled() and (x.requires_grad or t.requires_grad)
            if self.file is None or needs_gradient or network_has_to_run():
                return velocity.fn(x, t, condition)
            return self.answer(velocity.fn, x, t, condition, most_values=x.numel())

        return replace(velocity, fn=fn)

    def answer(
        self,
        function: Callable[..., Tensor],
        x: Tensor,
        *others: Tensor | None,
        most_values: int,
    ) -> Tensor:
        """Return function(x, *others) from the log, or call and log it.

        Args:
            function: What answers.
            x: Its first argument, on whose device the answer is.
            others: Its other arguments.
            most_values: Numbers of an answer at most; a larger record is not read.
        """
        checksum = _checksum(x, *others)
        most_bytes = 8 * most_values + LIMIT  # float64 at most, and a header
        answer = self._next(checksum, most_bytes) if self.replays else None
        if answer is None:
            answer = function(x, *others)
            self._append(checksum, answer)
        return answer.to(x.device)

    def _path(self, work: str) -> Path:
        return self.folder / f"{work}.{self.rank}.calls"

    def _next(self, checksum: int, most_bytes: int) -> Tensor | None:
        """Return the next record's answer; if it is not one to this input, end the log there."""
        start = self.file.tell()
        head = self.file.read(HEAD.size)
        if len(head) == HEAD.size:
            input_checksum, answer_checksum, size = HEAD.unpack(head)
            is_ours = input_checksum == checksum and size <= most_bytes
            data = self.file.read(size) if is_ours else None
            if data is not None and len(data) == size and crc32(data) == answer_checksum:
                return safetensors.torch.load(data)["answer"]

        self.file.seek(start)
        self.file.truncate()
        self.replays = False
        return None

    def _append(self, checksum: int, answer: Tensor) -> None:
        data = safetensors.torch.save({"answer": answer.detach().cpu().contiguous()})
        try:
            self.file.write(HEAD.pack(checksum, crc32(data), len(data)) + data)
            self.file.flush()
        except OSError as error:
            raise self._no_room(error.strerror) from error

    def _no_room(self, reason: str) -> OSError:
        return OSError(
            f"cannot keep the network's answers in {self.folder}: {reason}; free space, or, for a "
            "search, set keep_calls=false (a killed search then starts again)"
        )


def _checksum(*tensors: Tensor | None) -> int:
    checksum = 0
    for tensor in tensors:
        if tensor is not None:
            data = np.ascontiguousarray(tensor.detach().cpu().numpy()).data
            checksum = crc32(data, checksum)
    return checksum
