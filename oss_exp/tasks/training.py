"""The training of networks, for the tasks that do it: steps with averaged weights, killed and resumed to the same bits.

Example i is a function of (seed, i) alone, so any number of ranks with the same global batch takes the same steps.
"""

from __future__ import annotations

import abc
import io
import math
import os
import platform
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import DictConfig
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Subset

from oss_exp.files import write_atomically
from oss_exp.tasks import border, preemption
from oss_exp.tasks.collective import DistributedCollective, GroupEnd, SharedFolder
from oss_exp.tasks.fitting import loss_bar, versions
from oss_exp.tasks.task import Amount, Count, Positive, Share, Task, Whole
from oss_exp.tasks.training_state import check_state, prune

Precision = Literal["16-mixed", "16-true", "bf16-mixed", "bf16-true", "32-true", "64-true"]


class Training(L.LightningModule, abc.ABC):
    """Steps of AdamW on `loss`, and an exponential average of the weights.

    After every `save_every` steps, and after the last, `on_save` is called and a checkpoint is written; to the trainer
    all steps are one epoch, so that a run that goes on may have other lengths. batch_size: of all ranks together.
    """

    def __init__(
        self,
        examples: Dataset,
        batch_size: int,
        max_steps: int,
        save_every: int,
        learning_rate: float,
        warmup_steps: int,
        ema_decay: float,
        num_workers: int,
        checkpoint: Path,
    ):
        super().__init__()
        self.checkpoint = checkpoint
        self.examples, self.batch_size, self.num_workers = examples, batch_size, num_workers
        self.max_steps, self.save_every = max_steps, save_every
        self.learning_rate, self.warmup_steps, self.ema_decay = (
            learning_rate,
            warmup_steps,
            ema_decay,
        )
        self.losses: list[float] = []  # of every step, the mean over ranks
        self.latest: list[Tensor] = []  # of the steps since the last checkpoint, this rank's
        self.seconds, self.started = 0.0, time.perf_counter()

    @abc.abstractmethod
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """() float32."""

    @abc.abstractmethod
    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """Those that are trained, and their averages."""

    def on_save(self) -> None:
        """Called on every rank before a checkpoint is written, when the losses are known."""

    @property
    def seen(self) -> int:
        """Steps taken."""
        return len(self.losses) + len(self.latest)

    def recent_loss(self) -> float:
        return float(np.mean(self.losses[-self.save_every :]))

    def train_dataloader(self) -> DataLoader:
        """This rank's part of the examples of the steps that are still to be taken."""
        first, last = (step * self.batch_size for step in (self.seen, self.max_steps))
        examples = Subset(
            self.examples, range(first + self.global_rank, last, self.trainer.world_size)
        )
        return DataLoader(
            examples, self.batch_size // self.trainer.world_size, num_workers=self.num_workers
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.latest.append(loss.detach())
        self.log_dict(
            {"loss": loss.detach(), "step": float(self.seen - 1)}
        )  # Lightning's own steps begin anew
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        decay = min(
            self.ema_decay, self.seen / (self.seen + 9)
        )  # young averages forget their start faster
        trained, averages = self.weights()
        get_ema_multi_avg_fn(decay)(averages, trained, self.seen)
        if self.seen % self.save_every == 0 or self.seen == self.max_steps:
            self._gather_losses()
            self.on_save()
            self._save_checkpoint()
        elif preemption.received() and self.trainer.world_size == 1:
            self._gather_losses()
            self._save_checkpoint()
        preemption.end_if_received()

    def _gather_losses(self) -> None:
        losses = torch.stack(self.latest)
        self.losses += (DistributedCollective().sum(losses) / self.trainer.world_size).tolist()
        self.latest = []
        self.seconds += time.perf_counter() - self.started
        if not math.isfinite(self.losses[-1]):
            raise ValueError(
                f"the loss is {self.losses[-1]} after {self.seen} steps; lower task.learning_rate"
            )

    def _save_checkpoint(self) -> None:
        self.trainer.save_checkpoint(self.checkpoint, weights_only=False)
        self.started = time.perf_counter()

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.weights()[0], lr=self.learning_rate)

        def rate(step: int) -> float:
            """Linear warm-up, then half a cosine to 0."""
            rising = min(1.0, (step + 1) / max(self.warmup_steps, 1))
            return rising * 0.5 * (1 + math.cos(math.pi * min(step / self.max_steps, 1)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def progress(self) -> dict[str, Any]:
        """What a checkpoint has to hold besides weights and the optimizer."""
        return {"losses": self.losses, "seconds": self.seconds}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["progress"] = self.progress()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take from a checkpoint what `TrainingState` names."""
        prune(checkpoint)
        self.losses, self.seconds = (
            checkpoint["progress"]["losses"],
            checkpoint["progress"]["seconds"],
        )


@dataclass(frozen=True, kw_only=True)
class TrainingTask(Task):
    """A task that trains a network.

    batch_size: of all ranks together; learning_rate: AdamW's, warm-up and then half a cosine to 0; save_every: steps
    between checkpoints.
    """

    max_steps: Count
    batch_size: Count = 64
    learning_rate: Positive
    warmup_steps: Whole
    gradient_clip: Amount | None = 1.0
    ema_decay: Share
    label_dropout: Share = 0.1
    seed: Whole = 0
    save_every: Count
    num_workers: Whole = 0

    def settings(self) -> dict[str, Any]:
        """Return what `Training` takes."""
        names = (
            "batch_size",
            "max_steps",
            "save_every",
            "learning_rate",
            "warmup_steps",
            "ema_decay",
            "num_workers",
        )
        return {name: getattr(self, name) for name in names}


def fit(
    cfg: DictConfig,
    task: TrainingTask,
    module: Training,
    logger: Logger | None,
    resume: Path | None,
    **more: Any,
) -> L.Trainer:
    """Train on cfg.trainer up to task.max_steps; resume: the checkpoint to go on from. more: for the trainer.

    A signal to end waits for the end of the step, whose state is kept; of several ranks, which would have to agree on
    a step, the last checkpoint is.
    """
    trainer: L.Trainer = border.build(
        cfg.trainer,
        "trainer",
        L.Trainer,
        default_root_dir=Path(cfg.paths.output_dir),
        logger=logger or False,
        enable_checkpointing=False,  # the module writes them
        enable_progress_bar=False,
        use_distributed_sampler=False,
        log_every_n_steps=min(50, task.save_every),
        max_epochs=1,
        gradient_clip_val=task.gradient_clip,
        callbacks=[Bar(), GroupEnd(), SharedFolder()],
        plugins=[WholeCheckpoints()],
        **more,
    )
    if task.batch_size % trainer.world_size:
        raise ValueError(
            f"task.batch_size={task.batch_size} cannot be split evenly over {trainer.world_size} ranks"
        )
    if resume is not None:
        state = check_state(
            resume, module.state_dict(), module.weights()[0], partial=not module.strict_loading
        )
        if (steps := len(state.progress.losses)) > task.max_steps:
            raise ValueError(
                f"checkpoint {resume} has taken {steps} steps, more than task.max_steps={task.max_steps}"
            )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Found .* in eval mode"
        )  # the average is; what is trained is not
        warnings.filterwarnings(
            "ignore", "Total length of .* across ranks is zero"
        )  # all steps were taken
        with preemption.unbroken() if trainer.world_size == 1 else nullcontext():
            trainer.fit(module, ckpt_path=resume, weights_only=True)
    return trainer


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints are whole or the old ones; Lightning's are copied from another folder, and may end half-way."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(path, buffer.getvalue())


class Bar(Callback):
    """Steps with the loss and the time left, over all epochs; on rank 0."""

    def on_train_start(self, trainer: L.Trainer, module: Training) -> None:
        self.progress, self.bar = loss_bar(
            module.max_steps, module.seen, disable=trainer.global_rank != 0
        )
        self.progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Training, outputs: Any, *_: Any
    ) -> None:
        if (
            module.seen % 10 == 0 or module.seen == module.max_steps
        ):  # reading a loss makes a GPU wait
            self.progress.update(self.bar, completed=module.seen, loss=float(outputs["loss"]))

    def teardown(self, trainer: L.Trainer, module: Training, stage: str) -> None:
        if hasattr(self, "progress"):
            self.progress.stop()


def shuffled(i: int, count: int, *seed: int) -> int:
    """Item i of an endless stream: one shuffle of 0 .. count - 1 after the other."""
    epoch, position = divmod(i, count)
    return int(_permutation(count, (*seed, epoch))[position])


@lru_cache(maxsize=2)
def _permutation(count: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


def origin() -> dict[str, Any]:
    """How these weights came to be: the command, the machine, the versions."""
    # A resumed run ends as one that was never stopped; the command that starts from nothing is the one to repeat.
    overrides = [
        each for each in HydraConfig.get().overrides.task if not each.startswith("task.resume=")
    ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "made_by": " ".join(["oss-exp", *overrides]),
        "hardware": gpu or f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": versions(),
    }
