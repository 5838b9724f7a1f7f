"""The ranks of a run: their trainer, what they agree on, and sums and gathers over them."""

import atexit
import contextlib
import re
import uuid
import warnings
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from oss_exp.stepsize import Collective
from oss_exp.tasks import border

T = TypeVar("T")


def build_trainer(cfg: DictConfig, **options: Any) -> L.Trainer:
    """Return the trainer of a run, whose ranks write into one folder and end their group.

    Args:
        cfg: The composed configuration.
        options: Further options of the trainer.

    Raises:
        ValueError: If this machine has not what `trainer` asks for.
    """
    folder = Path(cfg.paths.output_dir)
    try:
        trainer: L.Trainer = border.build(
            cfg.trainer, "trainer", L.Trainer, default_root_dir=folder, **options
        )
    except ValueError as error:
        if re.search("accelerator|backend|device", str(error)) is None:
            raise
        raise ValueError(
            f"{error}; choose one that this machine has, such as trainer=cpu"
        ) from error

    # Lightning sets `callbacks` later than its annotation says.
    trainer.callbacks += [GroupEnd(), SharedFolder()]  # pyright: ignore[reportAttributeAccessIssue]
    return trainer


def require_noises(trainer: L.Trainer, count: int, option: str) -> None:
    """Check that every rank of a trainer gets at least one noise.

    Args:
        trainer: The trainer.
        count: Number of noises.
        option: The option that sets it.

    Raises:
        ValueError: If some rank gets none. All ranks raise it, and none waits for the others.
    """
    if count < trainer.world_size:
        raise ValueError(
            f"every rank needs a noise, and {trainer.world_size} ranks share {count}; raise "
            f"{option}, or use fewer devices"
        )


def for_every_rank(batches: Sequence[T], trainer: L.Trainer) -> list[T]:
    """Return batches of work whose results are files, repeated where they are fewer than the ranks.

    Lightning ends a rank that has none. One that repeats a batch writes the same file again, and
    would only wait otherwise.
    """
    count = max(len(batches), trainer.world_size) if batches else 0
    return list(islice(cycle(batches), count))


def agreed(trainer: L.Trainer, look: Callable[[], T]) -> T:
    """Return what rank 0 sees on disk, on every rank.

    Another job may write the same files meanwhile. Ranks that see different ones would do different
    work, and wait for each other for ever.

    Args:
        trainer: The trainer of the ranks.
        look: Returns what there is; called on rank 0 only.
    """
    is_spawned = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
    if trainer.world_size == 1 or is_spawned:  # the ranks begin later, as copies of this process
        return look()

    # The group begins with the first loop.
    if not _distributed():
        nothing = DataLoader(TensorDataset(torch.zeros(0)))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Total length of .* across ranks is zero")
            trainer.predict(Nothing(), nothing, return_predictions=False)
    seen = [look()] if trainer.is_global_zero else []
    return trainer.strategy.broadcast(seen)[0]


class DistributedCollective(Collective):
    """Sums and gathers over the default process group; without one, over one process."""

    def sum(self, tensor: Tensor) -> Tensor:
        if not _distributed():
            return tensor
        total = _reachable(tensor).clone()
        dist.all_reduce(total)
        return total.to(tensor.device)

    def gather(self, tensor: Tensor) -> Tensor:
        if not _distributed():
            return tensor
        device = tensor.device
        tensor = _reachable(tensor)

        # Lengths, which may differ between ranks.
        num_ranks = dist.get_world_size()
        length = torch.tensor([len(tensor)], device=tensor.device)
        lengths = [torch.zeros_like(length) for _ in range(num_ranks)]
        dist.all_gather(lengths, length)

        # Rows, padded to the longest and cut again.
        longest = max(int(length) for length in lengths)
        padding = tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])
        padded = torch.cat([tensor, padding])
        parts = [torch.empty_like(padded) for _ in range(num_ranks)]
        dist.all_gather(parts, padded)
        rows = [part[: int(length)] for part, length in zip(parts, lengths, strict=True)]
        return torch.cat(rows).to(device)


class Nothing(L.LightningModule):
    """A Lightning loop without work, which leaves behind the process group of the ranks."""

    def predict_step(self, *_: Any) -> None:
        """Do nothing."""


class GroupEnd(L.Callback):
    """A callback that ends the process group at the end of its process.

    Lightning does so for NCCL alone. Threads of gloo that run while the interpreter ends abort
    the process, about once in ten runs.
    """

    def setup(self, *_: Any, **__: Any) -> None:
        atexit.register(_end_group)


class SharedFolder(L.Callback):
    """Checks before any work that all ranks see the run folder of rank 0.

    Later every rank reads the schedules that rank 0 wrote. Without this check, a machine with
    another folder would search for hours and then fail.
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
                f"{count} of {trainer.world_size} ranks do not see the run folder of rank 0, "
                f"and this one's is {folder.resolve()}; "
                "give hydra.run.dir=FOLDER, an absolute path that all machines share"
            )


def _end_group() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _reachable(tensor: Tensor) -> Tensor:
    """Move a tensor to where the group can take it: NCCL does not see host memory."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor
