"""Train networks: what `task=pretrain` and `task=finetune` share.

Weights are averaged, and a killed training resumes to the same bits. Example i is a function of
(seed, i) alone, so any number of ranks with the same global batch takes the same steps.
"""

from __future__ import annotations

import abc
import io
import math
import time
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

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
from oss_exp.tasks import preemption
from oss_exp.tasks.collective import DistributedCollective, build_trainer
from oss_exp.tasks.fitting import cpu, loss_bar, versions
from oss_exp.tasks.task import Amount, Count, Positive, Share, Task, Whole
from oss_exp.tasks.training_state import check_state, prune

# Without half weights, such as bf16-true: a step of their moving average rounds to nothing.
Precision = Literal["16-mixed", "bf16-mixed", "32-true", "64-true"]


class Training(L.LightningModule, abc.ABC):
    """Steps of an optimizer on `loss`, with an exponential average of the weights.

    After every `save_every` steps and after the last, `on_save` is called and a checkpoint is
    written. To the trainer all steps are one epoch, so a run that resumes may be longer.

    Args:
        examples: The training examples, an endless stream.
        batch_size: Examples of a step, over all ranks.
        max_steps: Number of steps.
        save_every: Steps between checkpoints.
        learning_rate: The highest learning rate.
        warmup_steps: Steps of the linear warm-up.
        ema_decay: Decay of the average.
        num_workers: Processes that load examples.
        checkpoint: Path of the checkpoint.
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
        self.examples = examples
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_steps = max_steps
        self.save_every = save_every
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.ema_decay = ema_decay

        # Progress.
        self.losses: list[float] = []  # of every step, the mean over ranks
        self.latest: list[Tensor] = []  # of the steps since the last checkpoint, this rank's
        self.seconds = 0.0
        self.started = time.perf_counter()

    @abc.abstractmethod
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch, () float32."""

    @abc.abstractmethod
    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the trained weights and their averages."""

    def optimizer(self) -> torch.optim.Optimizer:
        """Return a new optimizer of the trained weights."""
        return torch.optim.AdamW(self.weights()[0], lr=self.learning_rate)

    def on_save(self) -> None:
        """Run on every rank before a checkpoint is written, when the losses are gathered."""

    @property
    def steps_taken(self) -> int:
        """Number of steps taken."""
        return len(self.losses) + len(self.latest)

    def recent_loss(self) -> float:
        """Return the mean loss of the last `save_every` steps."""
        return float(np.mean(self.losses[-self.save_every :]))

    def train_dataloader(self) -> DataLoader:
        """Return this rank's part of the examples of the remaining steps."""
        first = self.steps_taken * self.batch_size
        end = self.max_steps * self.batch_size
        num_ranks = self.trainer.world_size
        examples = Subset(self.examples, range(first + self.global_rank, end, num_ranks))
        return DataLoader(examples, self.batch_size // num_ranks, num_workers=self.num_workers)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.latest.append(loss.detach())
        # Lightning's own steps begin anew when a run resumes.
        self.log_dict({"loss": loss.detach(), "step": float(self.steps_taken - 1)})
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Average; a young one forgets its start faster.
        decay = min(self.ema_decay, self.steps_taken / (self.steps_taken + 9))
        weights, averages = self.weights()
        get_ema_multi_avg_fn(decay)(averages, weights, self.steps_taken)

        # Checkpoint, also when a signal ends the run.
        is_last = self.steps_taken == self.max_steps
        if self.steps_taken % self.save_every == 0 or is_last:
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
                f"the loss is {self.losses[-1]} after {self.steps_taken} steps; lower "
                "task.learning_rate"
            )

    def _save_checkpoint(self) -> None:
        self.trainer.save_checkpoint(self.checkpoint, weights_only=False)
        self.started = time.perf_counter()

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer with a linear warm-up, then half a cosine to 0."""
        optimizer = self.optimizer()

        def rate(step: int) -> float:
            rising = min(1.0, (step + 1) / max(self.warmup_steps, 1))
            return rising * 0.5 * (1 + math.cos(math.pi * min(step / self.max_steps, 1)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def progress(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides the weights and the optimizer."""
        return {"losses": self.losses, "seconds": self.seconds}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["progress"] = self.progress()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take from a checkpoint the fields of `TrainingState`, and nothing else."""
        prune(checkpoint)
        self.losses = checkpoint["progress"]["losses"]
        self.seconds = checkpoint["progress"]["seconds"]


@dataclass(frozen=True, kw_only=True)
class TrainingTask(Task):
    """A task that trains a network.

    Attributes:
        max_steps: Number of steps.
        batch_size: Examples of a step, over all ranks.
        learning_rate: Highest learning rate: a warm-up, then half a cosine to 0.
        warmup_steps: Steps of the linear warm-up.
        gradient_clip: Largest norm of the gradient; None: any.
        ema_decay: Decay of the averaged weights.
        label_dropout: Share of examples without their class.
        seed: Seed of the initial weights and of the examples.
        save_every: Steps between checkpoints.
        num_workers: Processes that load examples.
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
        """Return the options that are arguments of `Training`."""
        return {
            "batch_size": self.batch_size,
            "max_steps": self.max_steps,
            "save_every": self.save_every,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "ema_decay": self.ema_decay,
            "num_workers": self.num_workers,
        }


def require_wide(trainer: L.Trainer, weights: Iterable[Tensor]) -> None:
    """Check that a training keeps weights of at least 32 bits.

    Args:
        trainer: The trainer.
        weights: The weights to train.

    Raises:
        ValueError: If the trainer makes them narrower, or they are.
    """
    reason = "half weights cannot be trained, because the steps of their average round to nothing"
    choices = get_args(Precision)
    if trainer.precision not in choices:
        raise ValueError(
            f"trainer.precision={trainer.precision}: {reason}; choose one of {', '.join(choices)}"
        )

    for weight in weights:
        if weight.dtype.itemsize < 4:
            dtype = str(weight.dtype).removeprefix("torch.")
            raise ValueError(
                f"model.dtype={dtype}: {reason}; set model.dtype=float32, and the precision of the "
                "training to bf16-mixed"
            )


def fit(
    cfg: DictConfig,
    task: TrainingTask,
    module: Training,
    logger: Logger | None,
    resume: Path | None,
    **trainer_options: Any,
) -> L.Trainer:
    """Train a module up to `task.max_steps` on the trainer of a configuration.

    A signal that ends the run waits for the end of the step, and its state is saved. Several
    ranks would have to agree on a step; for them the last checkpoint is what remains.

    Args:
        cfg: The composed configuration.
        task: The task.
        module: What is trained.
        logger: The logger, if any.
        resume: The checkpoint to resume from, if any.
        trainer_options: Further options of the trainer.

    Returns:
        The trainer.

    Raises:
        ValueError: If the weights are too narrow, the batch cannot be split over the ranks, or the
            checkpoint does not fit.
    """
    trainer = build_trainer(
        cfg,
        logger=logger or False,
        enable_checkpointing=False,  # the module writes them
        enable_progress_bar=False,
        use_distributed_sampler=False,
        log_every_n_steps=min(50, task.save_every),
        max_epochs=1,
        gradient_clip_val=task.gradient_clip,
        callbacks=[Bar()],
        plugins=[WholeCheckpoints()],
        **trainer_options,
    )

    require_wide(trainer, module.weights()[0])
    if task.batch_size % trainer.world_size:
        raise ValueError(
            f"task.batch_size={task.batch_size} cannot be split evenly over {trainer.world_size} "
            "ranks"
        )

    # The checkpoint must be of this network, and not longer.
    if resume is not None:
        is_partial = not module.strict_loading
        state = check_state(resume, module.state_dict(), module.optimizer(), is_partial)
        if (steps := len(state.progress.losses)) > task.max_steps:
            raise ValueError(
                f"checkpoint {resume} has taken {steps} steps, more than "
                f"task.max_steps={task.max_steps}"
            )

    # Two warnings do not apply: the averaged network alone is in eval mode, and a finished
    # training has no examples.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found .* in eval mode")
        warnings.filterwarnings("ignore", "Total length of .* across ranks is zero")
        with preemption.unbroken() if trainer.world_size == 1 else nullcontext():
            trainer.fit(module, ckpt_path=resume, weights_only=True)
    return trainer


class WholeCheckpoints(TorchCheckpointIO):
    """A plugin that writes a checkpoint whole or not at all.

    Lightning copies its checkpoints from another folder, and a copy may end half-way.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(path, buffer.getvalue())


class Bar(Callback):
    """A progress bar of all steps with the loss and the remaining time, on rank 0."""

    def on_train_start(self, trainer: L.Trainer, module: Training) -> None:
        is_hidden = trainer.global_rank != 0
        self.progress, self.bar = loss_bar(module.max_steps, module.steps_taken, disable=is_hidden)
        self.progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Training, outputs: Any, *_: Any
    ) -> None:
        # Seldom, because a GPU waits when a loss is read.
        steps = module.steps_taken
        if steps % 10 == 0 or steps == module.max_steps:
            self.progress.update(self.bar, completed=steps, loss=float(outputs["loss"]))

    def teardown(self, trainer: L.Trainer, module: Training, stage: str) -> None:
        if hasattr(self, "progress"):
            self.progress.stop()


def shuffled(i: int, count: int, *seed: int) -> int:
    """Return item i of an endless stream: shuffles of 0 .. count - 1, one after the other."""
    epoch, position = divmod(i, count)
    return int(_permutation(count, (*seed, epoch))[position])


@lru_cache(maxsize=2)
def _permutation(count: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


def origin() -> dict[str, Any]:
    """Return how weights were made: the command, the hardware and the versions.

    The command is the one that starts from nothing, because a resumed run gives the same weights.
    """
    overrides = []
    for override in HydraConfig.get().overrides.task:
        if not override.startswith("task.resume="):
            overrides.append(override)
    return {
        "made_by": " ".join(["oss-exp", *overrides]),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu(),
        "versions": versions(),
    }
