"""A search that was killed goes on: its network calls are kept on disk, and the same program runs again over them.

A search is deterministic, so nothing of what a strategy is doing needs saving. It starts again, and every call that was
made before is answered from the file, until the file ends.
"""

from __future__ import annotations

import contextlib
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from oss_exp.files import LIMIT
from oss_exp.velocity import BoundVelocity

HEAD = struct.Struct(
    "<IIQ"
)  # checksums of the question and of the answer, and the bytes of the answer, which follow


class Calls:
    """One rank's network calls, a file for each piece of work, a record a call in the order of asking.

    A record that was cut short, is damaged, or answers another question is dropped with all that follow.
    """

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder, rank
        self.file: BinaryIO | None = None
        self.replays = False

    @contextlib.contextmanager
    def of(self, work: str, expected: int = 0) -> Iterator[None]:
        """Answer and keep the calls that are made within; OSError where the disk has not the bytes expected of them."""
        path = self._path(work)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if expected > (free := shutil.disk_usage(self.folder).free + path.stat().st_size):
            raise self._no_room(
                f"they come to about {expected / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
            )
        self.file, self.replays = path.open("r+b"), True
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # what is left of a call that `_keep` has told of
                self.file.close()
            self.file = None

    def forget(self) -> None:
        """All results are on disk; the calls are not needed any more."""
        for path in self.folder.glob(f"*.{self.rank}.calls"):
            path.unlink()
        with contextlib.suppress(OSError):  # another rank's are still there
            self.folder.rmdir()

    def kept(self, velocity: BoundVelocity) -> BoundVelocity:
        """The same, through these files. Calls that gradients go through are not kept."""

        def fn(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            if self.file is None or (
                torch.is_grad_enabled() and (x.requires_grad or t.requires_grad)
            ):
                return velocity.fn(x, t, condition)
            asked = _checksum(x, t, condition)
            most = (
                8 * x.numel() + LIMIT
            )  # bytes: the answer is of the shape of x, in float64 at most, after its header
            found = self._next(asked, most) if self.replays else None
            if found is None:
                found = velocity.fn(x, t, condition)
                self._keep(asked, found)
            return found.to(x.device)

        return replace(velocity, fn=fn)

    def _path(self, work: str) -> Path:
        return self.folder / f"{work}.{self.rank}.calls"

    def _next(self, asked: int, most: int) -> Tensor | None:
        """The next record's answer; None, and the file ends there, where it is not one of `most` bytes to this."""
        start = self.file.tell()
        head = self.file.read(HEAD.size)
        if len(head) == HEAD.size:
            question, answer, size = HEAD.unpack(head)
            data = self.file.read(size) if question == asked and size <= most else None
            if data is not None and len(data) == size and crc32(data) == answer:
                return safetensors.torch.load(data)["answer"]
        self.file.seek(start)
        self.file.truncate()
        self.replays = False
        return None

    def _keep(self, asked: int, answer: Tensor) -> None:
        data = safetensors.torch.save({"answer": answer.detach().cpu().contiguous()})
        try:
            self.file.write(HEAD.pack(asked, crc32(data), len(data)) + data)
            self.file.flush()
        except OSError as error:
            raise self._no_room(error.strerror) from error

    def _no_room(self, reason: str) -> OSError:
        return OSError(
            f"cannot keep the network calls of a search in {self.folder}: {reason}; free space, or set "
            "keep_calls=false, with which a killed search starts again"
        )


def _checksum(*tensors: Tensor | None) -> int:
    found = 0
    for tensor in tensors:
        if tensor is not None:
            found = crc32(np.ascontiguousarray(tensor.detach().cpu().numpy()).data, found)
    return found
