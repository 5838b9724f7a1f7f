"""Train a denoiser: `model` from its initial weights, on the images or latents of `data`.

Training example i is a function of (seed, i) alone: image, noise, time and whether its label is dropped. So a run that
was killed resumes exactly, and any number of ranks with the same global batch takes the same steps.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import call, get_object, instantiate
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.utils import make_grid

from oss_exp.evaluation.pictures import as_bytes, encoded, frames_of
from oss_exp.files import save_asset, write_atomically
from oss_exp.models.guidance import NO_CLASS
from oss_exp.models.network import UNTRAINED, Network
from oss_exp.noise import FlowSchedule
from oss_exp.solvers import Euler
from oss_exp.steps import StepSchedule
from oss_exp.tasks.captioned import CaptionedImages
from oss_exp.tasks.collective import DistributedCollective
from oss_exp.tasks.fitting import loss_bar, versions

SHOWN = 8  # samples of each class in a grid
GRID_STEPS = 50  # Euler's, for each of them


def pretrain(cfg: DictConfig) -> Logger | None:
    """Write the averaged weights to task.output (.safetensors and .json), checkpoints and grids to the run folder."""
    folder, task = Path(cfg.paths.output_dir), cfg.task
    for name in ("max_steps", "save_every", "batch_size"):
        if not isinstance(task[name], int) or task[name] < 1:
            raise ValueError(f"task.{name} must be a whole number of at least 1, got {task[name]!r}")
    torch.manual_seed(task.seed)  # the initial weights, the same on every rank
    images = call(cfg.data)
    images = TensorDataset(*images) if isinstance(images, tuple) else images
    model = _untrained(cfg, images)
    if (found := tuple(images[0][0].shape)) != model.image_shape:
        raise ValueError(f"data has items of shape {found}, model={model.name} takes {model.image_shape}")
    examples = Examples(images, task.seed, task.label_dropout, instantiate(task.times), task.batch_size)
    logger = instantiate(cfg.logger)
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        default_root_dir=folder,
        logger=logger or False,
        enable_checkpointing=True,
        enable_progress_bar=False,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        log_every_n_steps=min(50, task.save_every),
        max_epochs=math.ceil(task.max_steps / task.save_every),
        gradient_clip_val=task.gradient_clip,
        callbacks=[Bar(), ModelCheckpoint(folder / "checkpoints", "last", enable_version_counter=False)],
    )
    if task.batch_size % trainer.world_size:
        raise ValueError(f"task.batch_size={task.batch_size} cannot be split evenly over {trainer.world_size} ranks")
    rank_zero_only(write_atomically)(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    module = PretrainModule(
        model,
        examples,
        batch_size=task.batch_size,
        max_steps=task.max_steps,
        save_every=task.save_every,
        learning_rate=task.learning_rate,
        warmup_steps=task.warmup_steps,
        ema_decay=task.ema_decay,
        num_workers=task.num_workers,
        compile=task.compile,
        output=Path(task.output),
        folder=folder,
        about=_about(cfg, model, images),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found .* in eval mode")  # the average is; what is trained is not
        trainer.fit(module, ckpt_path=_checkpoint(task.resume))
    if trainer.is_global_zero:
        Console().print(f"{task.output}: {module.seen} steps, loss {module.recent_loss():.4f}", soft_wrap=True)
    return logger


# --------------------------------------------------------------------------------------------------------------
# Examples
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UniformTimes:
    """t uniform in [0, 1]."""

    def __call__(self, u: Tensor) -> Tensor:
        """u uniform in (0, 1), float64, any shape -> t."""
        return u


@dataclass(frozen=True)
class LogitNormalTimes:
    """logit t = ln sigma is normal: EDM's training noise (arXiv 2206.00364, table 1) and SD3's (2403.03206) alike."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"task.times.std must be positive, got {self.std!r}")

    def __call__(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


class Examples(Dataset):
    """An endless stream: item i, of the i-th image of one shuffle after the other, is {x0, noise, t, label, shared}.

    shared: a number in (0, 1), the same for all items of a step, which are batch_size.
    """

    def __init__(
        self, images: Any, seed: int, label_dropout: float, times: UniformTimes | LogitNormalTimes, batch_size: int
    ):
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"task.label_dropout must lie between 0 and 1, got {label_dropout!r}")
        self.images, self.seed, self.label_dropout, self.times = images, seed, label_dropout, times
        self.batch_size = batch_size
        self.order: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=int))

    def __getitem__(self, i: int) -> dict[str, Tensor | int]:
        epoch, position = divmod(i, len(self.images))
        if self.order[0] != epoch:
            self.order = (epoch, np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.images)))
        x0, label = self.images[int(self.order[1][position])]
        draw = np.random.default_rng((self.seed, 1, i))
        noise = torch.from_numpy(draw.standard_normal(x0.shape, dtype=np.float32))
        t = self.times(torch.tensor(draw.uniform(1e-12, 1), dtype=torch.float64))
        dropped = draw.random() < self.label_dropout
        shared = np.random.default_rng((self.seed, 2, i // self.batch_size)).random()
        return {"x0": x0, "noise": noise, "t": t, "label": NO_CLASS if dropped else int(label), "shared": shared}


# --------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------


class PretrainModule(L.LightningModule):
    """Regresses a network's output on what its parameterization asks for; `model` holds the average of its weights.

    An epoch of the trainer is `save_every` steps, after which the losses, a grid of samples and the weights are saved.
    batch_size: of all ranks together. about: the provenance that is known before.
    """

    def __init__(
        self,
        model: Network,
        examples: Examples,
        batch_size: int,
        max_steps: int,
        save_every: int,
        learning_rate: float,
        warmup_steps: int,
        ema_decay: float,
        num_workers: int,
        compile: bool,
        output: Path,
        folder: Path,
        about: Mapping[str, Any],
    ):
        super().__init__()
        self.model, self.network = model, copy.deepcopy(model.backbone).requires_grad_(True).train()
        if compile:
            self.network.compile()
        self.examples, self.batch_size, self.num_workers = examples, batch_size, num_workers
        self.max_steps, self.save_every = max_steps, save_every
        self.learning_rate, self.warmup_steps, self.ema_decay = learning_rate, warmup_steps, ema_decay
        self.output, self.folder, self.about = output, folder, about
        self.losses: list[float] = []  # of every step, the mean over ranks
        self.latest: list[Tensor] = []  # of this epoch's steps, this rank's
        self.seconds, self.started = 0.0, time.perf_counter()

    @property
    def seen(self) -> int:
        """Steps taken."""
        return len(self.losses) + len(self.latest)

    def recent_loss(self) -> float:
        return float(np.mean(self.losses[-self.save_every :]))

    def train_dataloader(self) -> DataLoader:
        """This rank's part of the examples of this epoch's steps."""
        steps = len(self.losses), min(len(self.losses) + self.save_every, self.max_steps)
        first, last = (step * self.batch_size for step in steps)
        examples = Subset(self.examples, range(first + self.global_rank, last, self.trainer.world_size))
        return DataLoader(examples, self.batch_size // self.trainer.world_size, num_workers=self.num_workers)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model.loss(self.network, batch)
        self.latest.append(loss.detach())
        self.log("loss", loss.detach())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        decay = min(self.ema_decay, self.seen / (self.seen + 9))  # young averages forget their start faster
        average = get_ema_multi_avg_fn(decay)
        average(list(self.model.backbone.parameters()), list(self.network.parameters()), self.seen)

    def on_train_epoch_end(self) -> None:
        losses = torch.stack(self.latest)
        self.losses += (DistributedCollective().sum(losses) / self.trainer.world_size).tolist()
        self.latest = []
        if not math.isfinite(self.losses[-1]):
            raise ValueError(f"the loss is {self.losses[-1]} after {self.seen} steps; lower task.learning_rate")
        grid = self._grid()
        self.seconds += time.perf_counter() - self.started
        self.started = time.perf_counter()
        self._save(grid)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.learning_rate)

        def rate(step: int) -> float:
            """Linear warm-up, then half a cosine to 0."""
            rising = min(1.0, (step + 1) / max(self.warmup_steps, 1))
            return rising * 0.5 * (1 + math.cos(math.pi * min(step / self.max_steps, 1)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["progress"] = {"losses": self.losses, "seconds": self.seconds}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.losses, self.seconds = checkpoint["progress"]["losses"], checkpoint["progress"]["seconds"]

    @torch.no_grad()
    def _grid(self) -> np.ndarray:
        """(H, W, 3) bytes: a row of samples, or of a video's frames, for some conditions each, from the same noises."""
        shape, known = self.model.event_shape, self.model.num_conditions
        rows = min(max(known, 1), 10)
        noise = torch.randn(1 if len(shape) == 4 else SHOWN, *shape, generator=torch.Generator().manual_seed(0))
        chosen = torch.linspace(0, known - 1, rows, device=self.device).round().long().repeat_interleave(len(noise))
        times = FlowSchedule(1.0).nodes(GRID_STEPS)
        steps = StepSchedule(times, "pinned", float(times[0]))
        noise = noise.to(self.device, self.dtype).repeat(rows, *[1] * len(shape))
        pictures = frames_of(self.model.generate(Euler(), steps, noise, chosen if known else None))
        grid = make_grid(pictures, nrow=len(pictures) // rows)[:3]
        return as_bytes(grid[None])[0].cpu().numpy()

    @rank_zero_only
    def _save(self, grid: np.ndarray) -> None:
        picture = write_atomically(self.folder / "samples" / f"step_{self.seen:06d}.png", encoded(grid))
        if isinstance(self.logger, WandbLogger):
            self.logger.log_image("samples", [str(picture)])
        write_atomically(self.folder / "training.json", json.dumps({**self.about, "losses": self.losses}) + "\n")
        weights = self.model.backbone.state_dict()
        weights = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
        training = {"steps": self.seen, "of": self.max_steps, "loss": self.recent_loss(), "seconds": self.seconds}
        save_asset(self.output, weights, {**self.about, "training": training})


class Bar(Callback):
    """Steps with the loss and the time left, over all epochs; on rank 0."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.progress, self.bar = loss_bar(module.max_steps, module.seen, disable=trainer.global_rank != 0)
        self.progress.start()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        if module.seen % 10 == 0 or module.seen == module.max_steps:  # reading a loss makes a GPU wait
            self.progress.update(self.bar, completed=module.seen, loss=float(outputs["loss"]))

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if hasattr(self, "progress"):
            self.progress.stop()


def _untrained(cfg: DictConfig, images: Dataset) -> Network:
    """The model, of the prompts that the images have for captions where they have such."""
    kind = get_object(cfg.model._target_)
    if not (isinstance(kind, type) and issubclass(kind, Network)):
        raise ValueError(f"task=pretrain trains networks; {cfg.model._target_} has no weights to train")
    captions = getattr(images, "captions", None)
    if ("prompts" in cfg.model) != (captions is not None):
        wants, has = ("captions", "classes")[:: 1 if captions is None else -1]
        raise ValueError(f"model={cfg.model.name} needs images with {wants} and data has {has}; choose another data")
    return instantiate(cfg.model, checkpoint=UNTRAINED, **({} if captions is None else {"prompts": captions}))


def _checkpoint(resume: str | None) -> str | None:
    """A checkpoint file, or the run folder that has it."""
    if resume is None:
        return None
    path = Path(resume).expanduser()
    path = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"task.resume: no checkpoint {path}; give the run folder of an earlier task=pretrain")
    return str(path)


def _about(cfg: DictConfig, model: Network, images: Dataset) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    # A resumed run ends as one that was never stopped; the command that starts from nothing is the one to repeat.
    overrides = [each for each in HydraConfig.get().overrides.task if not each.startswith("task.resume=")]
    return {
        "name": model.name,
        "made_by": " ".join(["oss-exp", *overrides]),
        "seed": cfg.task.seed,
        "parameters": sum(p.numel() for p in model.backbone.parameters()),
        "data": {"images": len(images), "sha256": _fingerprint(images)},
        "hardware": gpu or f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": versions(),
    }


def _fingerprint(images: Dataset) -> str:
    """SHA-256 of tensors; of a folder, of its files' names and sizes."""
    if isinstance(images, CaptionedImages):
        return images.fingerprint
    digest = hashlib.sha256()
    if isinstance(images, TensorDataset):
        for tensor in images.tensors:
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
    else:
        for path, label in images.samples:
            digest.update(f"{Path(path).name} {Path(path).stat().st_size} {label}\n".encode())
    return digest.hexdigest()
