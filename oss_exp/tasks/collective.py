"""How ranks agree, through torch.distributed."""

import atexit
import contextlib
import uuid
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from oss_exp.stepsize import Collective


class DistributedCollective(Collective):
    """Sums and gathers over the default process group; a single process without one is its own world."""

    def sum(self, tensor: Tensor) -> Tensor:
        if not _distributed():
            return tensor
        total = _reachable(tensor).clone()
        dist.all_reduce(total)
        return total.to(tensor.device)

    def gather(self, tensor: Tensor) -> Tensor:
        if not _distributed():
            return tensor
        home, tensor = tensor.device, _reachable(tensor)
        # Ranks may hold different numbers of rows: pad to the longest, then cut.
        lengths = [
            torch.zeros(1, dtype=torch.long, device=tensor.device)
            for _ in range(dist.get_world_size())
        ]
        dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
        longest = max(int(length) for length in lengths)
        padded = torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])])
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat(
            [part[: int(length)] for part, length in zip(parts, lengths, strict=True)]
        ).to(home)


class GroupEnd(L.Callback):
    """Ends the process group where its process ends, which Lightning does for NCCL alone.

    Threads of gloo that still run as the interpreter ends abort the process, in about one run of ten.
    """

    def setup(self, *_: Any, **__: Any) -> None:
        atexit.register(_end_group)


class SharedFolder(L.Callback):
    """Checks before any work that all ranks see the run folder of rank 0.

    Later every rank reads the schedules that rank 0 wrote. Without this check, a machine with a folder of its own would
    search for hours and then fail.
    """

    def setup(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        if not _distributed():
            return
        folder = Path(trainer.default_root_dir)
        marker = folder / trainer.strategy.broadcast(f".shared_{uuid.uuid4().hex}")
        if trainer.is_global_zero:
            marker.touch()
        trainer.strategy.barrier("the marker is written")

        # All ranks fail together: none is left waiting for the others.
        unseen = torch.tensor(int(not marker.exists()), device=trainer.strategy.root_device)
        count = int(DistributedCollective().sum(unseen))
        if trainer.is_global_zero:
            with contextlib.suppress(OSError):
                marker.unlink()
        if count:
            raise ValueError(
                f"{count} of {trainer.world_size} ranks do not see the run folder of rank 0, and this one's is "
                f"{folder.resolve()}; give hydra.run.dir=FOLDER, an absolute path that all machines share"
            )


def _end_group() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _reachable(tensor: Tensor) -> Tensor:
    """Where the group can take it: NCCL does not see host memory."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor
