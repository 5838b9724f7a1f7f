"""Train a denoiser: `model` from its initial weights, on `images` (pictures, or latents).

Training example i is a function of (seed, i) alone: image, noise, time and whether its label is dropped. So a run that
was killed resumes exactly, and any number of ranks with the same global batch takes the same steps.
"""

from __future__ import annotations

import abc
import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.utils import make_grid

from oss_exp.data.captioned import CaptionedImages, CaptionedLatents
from oss_exp.data.folder import ImageFolder
from oss_exp.escaping import PlainConsole
from oss_exp.evaluation.pictures import as_bytes, encoded, frames_of
from oss_exp.files import save_asset, write_atomically
from oss_exp.models.guidance import NO_CLASS
from oss_exp.models.network import UNTRAINED, Network
from oss_exp.noise import FlowSchedule
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler
from oss_exp.tasks import border
from oss_exp.tasks.compatibility import require_same
from oss_exp.tasks.run import takes_prompts
from oss_exp.tasks.task import Count, Positive, Share, Whole
from oss_exp.tasks.training import Training, TrainingTask, fit, origin, shuffled

SHOWN = 8  # samples of each class in a grid
GRID_STEPS = 50  # Euler's, for each of them
FREE = (
    "resume",
    "init_from",
    "max_steps",
    "save_every",
    "num_workers",
    "compile",
    "output",
)  # of a run that goes on


# --------------------------------------------------------------------------------------------------------------
# Examples
# --------------------------------------------------------------------------------------------------------------


class Times(abc.ABC):
    """The times that training examples have."""

    @abc.abstractmethod
    def __call__(self, u: Tensor) -> Tensor:
        """u uniform in (0, 1), float64, any shape -> t."""


@dataclass(frozen=True)
class UniformTimes(Times):
    """t uniform in [0, 1]."""

    def __call__(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class LogitNormalTimes(Times):
    """logit t = ln sigma is normal: EDM's training noise (arXiv 2206.00364, table 1) and SD3's (2403.03206) alike."""

    mean: float = -0.7
    std: Positive = 1.4

    def __call__(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


class Examples(Dataset):
    """An endless stream: item i, of the i-th image of one shuffle after the other, is {x0, noise, t, label, shared}.

    shared: a number in (0, 1), the same for all items of a step, which are batch_size.
    """

    def __init__(self, images: Any, seed: int, label_dropout: float, times: Times, batch_size: int):
        self.images, self.seed, self.label_dropout, self.times = images, seed, label_dropout, times
        self.batch_size = batch_size

    def __getitem__(self, i: int) -> dict[str, Tensor | int]:
        x0, label = self.images[shuffled(i, len(self.images), self.seed, 0)]
        draw = np.random.default_rng((self.seed, 1, i))
        noise = torch.from_numpy(draw.standard_normal(x0.shape, dtype=np.float32))
        t = self.times(torch.tensor(draw.uniform(1e-12, 1), dtype=torch.float64))
        dropped = draw.random() < self.label_dropout
        shared = np.random.default_rng((self.seed, 2, i // self.batch_size)).random()
        return {
            "x0": x0,
            "noise": noise,
            "t": t,
            "label": NO_CLASS if dropped else int(label),
            "shared": shared,
        }


# --------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------


class PretrainModule(Training):
    """Regresses a network's output on what its parameterization asks for; `model` holds the average of its weights.

    With every checkpoint a grid of samples and the weights are saved. about: the provenance that is known before.
    """

    def __init__(
        self,
        model: Network,
        examples: Examples,
        compile: bool,
        output: Path,
        folder: Path,
        about: Mapping[str, Any],
        **training: Any,
    ):
        super().__init__(examples, **training)
        self.model, self.network = model, copy.deepcopy(model.backbone).requires_grad_(True).train()
        if compile:
            self.network.compile()
        self.output, self.folder, self.about = output, folder, about

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model.loss(self.network, batch)

    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.network.parameters()), list(self.model.backbone.parameters())

    def on_fit_start(self) -> None:
        if (
            self.seen == self.max_steps
        ):  # all were taken in another folder, which alone has the results
            self.on_save()

    def on_save(self) -> None:
        self._save(self._grid())

    @torch.no_grad()
    def _grid(self) -> np.ndarray:
        """(H, W, 3) bytes: a row of samples, or of a video's frames, for some conditions each, from the same noises."""
        shape, known = self.model.event_shape, self.model.num_conditions
        rows = min(max(known, 1), 10)
        noise = torch.randn(
            1 if len(shape) == 4 else SHOWN, *shape, generator=torch.Generator().manual_seed(0)
        )
        chosen = (
            torch.linspace(0, known - 1, rows, device=self.device)
            .round()
            .long()
            .repeat_interleave(len(noise))
        )
        times = FlowSchedule(1.0).nodes(GRID_STEPS)
        steps = StepSchedule(times)
        noise = noise.to(self.device, self.dtype).repeat(rows, *[1] * len(shape))
        pictures = frames_of(self.model.generate(Euler(), steps, noise, chosen if known else None))
        grid = make_grid(pictures, nrow=len(pictures) // rows)[:3]
        return as_bytes(grid[None])[0].cpu().numpy()

    @rank_zero_only
    def _save(self, grid: np.ndarray) -> None:
        picture = write_atomically(
            self.folder / "samples" / f"step_{self.seen:06d}.png", encoded(grid)
        )
        if isinstance(self.logger, WandbLogger):
            self.logger.log_image("samples", [str(picture)])
        write_atomically(
            self.folder / "training.json", json.dumps({**self.about, "losses": self.losses}) + "\n"
        )
        weights = self.model.backbone.state_dict()
        weights = {
            key: value.half() if value.is_floating_point() else value
            for key, value in weights.items()
        }
        training = {
            "steps": self.seen,
            "of": self.max_steps,
            "loss": self.recent_loss(),
            "seconds": self.seconds,
        }
        save_asset(self.output, weights, {**self.about, "training": training})


@dataclass(frozen=True, kw_only=True)
class Pretrain(TrainingTask):
    """Write the averaged weights to `output` (.safetensors and .json), checkpoints and grids to the run folder.

    label_dropout: share of examples without their class, for guidance; compile: torch.compile, a minute at the start,
    then faster; resume: run folder or checkpoint to go on from, None: where this folder's own run was ended; init_from:
    weights to begin with, as for model.checkpoint.
    """

    max_steps: Count = 16000
    learning_rate: Positive = 1.0e-3
    warmup_steps: Whole = 500
    ema_decay: Share = 0.999
    times: Times = field(default_factory=LogitNormalTimes)
    save_every: Count = 1000
    compile: bool = False
    resume: str | None = None
    init_from: str | None = None
    output: str

    def __call__(self, cfg: DictConfig) -> Logger | None:
        kind, folder = border.class_of(cfg.model, "model"), Path(cfg.paths.output_dir)
        if not (isinstance(kind, type) and issubclass(kind, Network)):
            raise ValueError(
                f"task=pretrain trains networks; {cfg.model._target_} has no weights to train"
            )
        if self.resume is not None and self.init_from is not None:
            raise ValueError(
                "task.resume goes on with weights of its own; leave out task.init_from"
            )
        last = folder / "checkpoints" / "last.ckpt"
        resume = last if last.is_file() else None
        if self.resume is not None:
            resume = _checkpoint(self.resume)
        elif resume is not None:
            require_same(cfg, folder, *FREE)
        torch.manual_seed(self.seed)  # the initial weights, the same on every rank
        images = load_images(cfg.images)
        model = _initial(cfg, images, self.init_from or UNTRAINED)
        require_fitting(images, model)
        examples = Examples(images, self.seed, self.label_dropout, self.times, self.batch_size)
        rank_zero_only(write_atomically)(
            folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True)
        )
        module = PretrainModule(
            model,
            examples,
            **self.settings(),
            compile=self.compile,
            output=Path(self.output),
            folder=folder,
            about=_about(cfg, model, images),
            checkpoint=last,
        )
        logger = border.build(cfg.logger, "logger", Logger | None)
        trainer = fit(cfg, self, module, logger, resume)
        if trainer.is_global_zero:
            PlainConsole().print(
                f"{self.output}: {module.seen} steps, loss {module.recent_loss():.4g}",
                soft_wrap=True,
            )
        return logger


def load_images(images: DictConfig) -> Dataset:
    """Return the items (image, label) of a configuration of conf/images."""
    items = border.build(images, "images")
    return TensorDataset(*items) if isinstance(items, tuple) else items


def require_fitting(images: Dataset, model: Network) -> None:
    """ValueError where images have another shape than the model's, more classes, or none where it takes some."""
    if (found := tuple(images[0][0].shape)) != model.image_shape:
        raise ValueError(
            f"images has items of shape {found}, model={model.name} takes {model.image_shape}"
        )
    if model.num_classes is None or not isinstance(images, ImageFolder | TensorDataset):
        return
    labels = (
        images.tensors[1]
        if isinstance(images, TensorDataset)
        else [label for _, label in images.samples]
    )
    classes = int(torch.as_tensor(labels).max()) + 1
    if classes > model.num_classes:
        raise ValueError(
            f"images has {classes} classes, model={model.name} has {model.num_classes}; set its num_classes to at "
            f"least {classes}, or choose other images"
        )
    if not classes:
        raise ValueError(
            f"images has no classes, model={model.name} has {model.num_classes}; set its num_classes to null, or give "
            "images in a folder for each class"
        )


def _initial(cfg: DictConfig, images: Dataset, checkpoint: str) -> Network:
    """The model with its first weights, of the prompts that the images have for captions where they have such."""
    captions = getattr(images, "captions", None)
    if takes_prompts(cfg.model) != (captions is not None):
        wants, has = ("captions", "classes")[:: 1 if captions is None else -1]
        raise ValueError(
            f"model={cfg.model.name} needs images with {wants}, these have {has}; choose other images"
        )
    more = {} if captions is None else {"prompts": captions}
    return border.build(cfg.model, "model", Network, checkpoint=checkpoint, **more)


def _checkpoint(resume: str) -> Path:
    """A checkpoint file, or the run folder that has it."""
    path = Path(resume)
    path = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"task.resume: no checkpoint {path}; give the run folder of an earlier task=pretrain"
        )
    return path


def _about(cfg: DictConfig, model: Network, images: Dataset) -> dict[str, Any]:
    return {
        "name": model.name,
        "seed": cfg.task.seed,
        "init_from": cfg.task.init_from
        and {"file": Path(cfg.task.init_from).name, "sha256": model.fingerprint},
        "parameters": sum(p.numel() for p in model.backbone.parameters()),
        "data": {"images": len(images), "sha256": _fingerprint(images)},
        **origin(),
    }


def _fingerprint(images: Dataset) -> str:
    """SHA-256 of tensors; of a folder, of its files' names and sizes."""
    if isinstance(images, CaptionedImages | CaptionedLatents):
        return images.fingerprint
    digest = hashlib.sha256()
    if isinstance(images, TensorDataset):
        for tensor in images.tensors:
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
    else:
        for path, label in images.samples:
            digest.update(f"{Path(path).name} {Path(path).stat().st_size} {label}\n".encode())
    return digest.hexdigest()
