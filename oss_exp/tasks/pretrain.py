"""Train the network of `model` from its initial weights on `images`, pictures or latents.

Training example i is a function of (seed, i) alone: its image, noise and time, and whether its
label is dropped. A run that was killed therefore resumes exactly, and any number of ranks with
the same global batch takes the same steps.
"""

from __future__ import annotations

import abc
import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
from oss_exp.models.decoders.image import Pixels
from oss_exp.models.guidance import NO_CLASS
from oss_exp.models.network import UNTRAINED, Network
from oss_exp.noise import FlowSchedule
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler
from oss_exp.tasks import border
from oss_exp.tasks.compatibility import require_same
from oss_exp.tasks.optimizers import MuonAndAdamW
from oss_exp.tasks.run import takes_prompts
from oss_exp.tasks.task import Count, Positive, Share, Whole
from oss_exp.tasks.training import Training, TrainingTask, fit, origin, shuffled

SHOWN = 8  # samples of each class in a grid
GRID_STEPS = 50  # Euler steps of each of them
# Options that may change when a run resumes.
FREE = ("resume", "init_from", "max_steps", "save_every", "num_workers", "compile", "output")


# --------------------------------------------------------------------------------------------------
# Examples
# --------------------------------------------------------------------------------------------------


class Times(abc.ABC):
    """A distribution of the times of training examples."""

    @abc.abstractmethod
    def __call__(self, u: Tensor) -> Tensor:
        """Return the times t of quantiles `u` in (0, 1), float64 of any shape."""


@dataclass(frozen=True)
class UniformTimes(Times):
    """Times that are uniform in [0, 1]."""

    def __call__(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class LogitNormalTimes(Times):
    """Times whose logit, ln sigma, is normal.

    EDM (arXiv 2206.00364, table 1) and SD3 (arXiv 2403.03206) both train with such times.

    Attributes:
        mean: Mean of logit t.
        std: Standard deviation of logit t.
    """

    mean: float = -0.7
    std: Positive = 1.4

    def __call__(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


class Examples(Dataset):
    """An endless stream of training examples {x0, noise, t, label, shared}.

    The images come in one shuffle after the other. `shared` is a number in (0, 1) that all
    examples of a step have in common.

    Args:
        images: Items (image, label).
        seed: Seed of shuffles, noises and times.
        label_dropout: Share of examples without their label.
        times: Distribution of the times.
        batch_size: Examples of a step, over all ranks.
        horizontal_flip: Share of examples that are mirrored, left to right.
    """

    def __init__(
        self,
        images: Any,
        seed: int,
        label_dropout: float,
        times: Times,
        batch_size: int,
        horizontal_flip: float = 0.0,
    ):
        self.images = images
        self.seed = seed
        self.label_dropout = label_dropout
        self.times = times
        self.batch_size = batch_size
        self.horizontal_flip = horizontal_flip

    def __getitem__(self, i: int) -> dict[str, Tensor | int]:
        x0, label = self.images[shuffled(i, len(self.images), self.seed, 0)]

        # Draws of this example, in a fixed order.
        draw = np.random.default_rng((self.seed, 1, i))
        noise = torch.from_numpy(draw.standard_normal(x0.shape, dtype=np.float32))
        t = self.times(torch.tensor(draw.uniform(1e-12, 1), dtype=torch.float64))
        is_dropped = draw.random() < self.label_dropout
        if draw.random() < self.horizontal_flip:
            x0 = x0.flip(-1)

        # The draw of its step.
        shared = np.random.default_rng((self.seed, 2, i // self.batch_size)).random()
        label = NO_CLASS if is_dropped else int(label)
        return {"x0": x0, "noise": noise, "t": t, "label": label, "shared": shared}


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


class PretrainModule(Training):
    """The training of a network on the targets of its parameterization.

    `model` holds the averaged weights. With every checkpoint, the weights and a grid of samples
    are saved.

    Args:
        model: The model, with its initial weights.
        examples: The training examples.
        optimizer: Name of the optimizer.
        compile: Compile the trained network.
        output: Path of the weights.
        folder: The run folder.
        about: The provenance that is complete before training.
        training: Arguments of `Training`.
    """

    def __init__(
        self,
        model: Network,
        examples: Examples,
        optimizer: Literal["adamw", "muon"],
        compile: bool,
        output: Path,
        folder: Path,
        about: Mapping[str, Any],
        **training: Any,
    ):
        super().__init__(examples, **training)
        self.model = model
        self.network = copy.deepcopy(model.backbone).requires_grad_(True).train()
        self.optimizer_name = optimizer
        if compile:
            self.network.compile()
        self.output = output
        self.folder = folder
        self.about = about

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model.loss(self.network, batch)

    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.network.parameters()), list(self.model.backbone.parameters())

    def optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer_name == "muon":
            return MuonAndAdamW(self.network.named_parameters(), self.learning_rate)
        return super().optimizer()

    def on_fit_start(self) -> None:
        # All steps were taken in another folder, so this one has no results yet.
        if self.steps_taken == self.max_steps:
            self.on_save()

    def on_save(self) -> None:
        self._save(self._grid())

    @torch.no_grad()
    def _grid(self) -> np.ndarray:
        """Return a grid of samples (H, W, 3), bytes.

        A row has samples of one condition, or the frames of one video; all rows begin with the
        same noises.
        """
        # Conditions, at most ten.
        shape = self.model.event_shape
        num_conditions = self.model.num_conditions
        num_rows = min(max(num_conditions, 1), 10)
        num_columns = 1 if len(shape) == 4 else SHOWN
        spaced = torch.linspace(0, num_conditions - 1, num_rows, device=self.device)
        conditions = spaced.round().long().repeat_interleave(num_columns)

        # Samples.
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(num_columns, *shape, generator=generator)
        noise = noise.to(self.device, self.dtype).repeat(num_rows, *[1] * len(shape))
        steps = StepSchedule(FlowSchedule(1.0).nodes(GRID_STEPS))
        condition = conditions if num_conditions else None
        pictures = frames_of(self.model.generate(Euler(), steps, noise, condition))
        grid = make_grid(pictures, nrow=len(pictures) // num_rows)[:3]
        return as_bytes(grid[None])[0].cpu().numpy()

    @rank_zero_only
    def _save(self, grid: np.ndarray) -> None:
        # Grid and losses.
        file = self.folder / "samples" / f"step_{self.steps_taken:06d}.png"
        picture = write_atomically(file, encoded(grid))
        if isinstance(self.logger, WandbLogger):
            self.logger.log_image("samples", [str(picture)])
        text = json.dumps({**self.about, "losses": self.losses}) + "\n"
        write_atomically(self.folder / "training.json", text)

        # Weights, in float16.
        weights = self.model.backbone.state_dict()
        for key, value in weights.items():
            weights[key] = value.half() if value.is_floating_point() else value

        training = {
            "steps": self.steps_taken,
            "of": self.max_steps,
            "loss": self.recent_loss(),
            "seconds": self.seconds,
        }
        save_asset(self.output, weights, {**self.about, "training": training})


@dataclass(frozen=True, kw_only=True)
class Pretrain(TrainingTask):
    """Train a network, and write its averaged weights to `output` (.safetensors and .json).

    Checkpoints and grids of samples go into the run folder.

    Attributes:
        label_dropout: Share of examples without their class, for guidance.
        horizontal_flip: Share of pictures that are mirrored, left to right.
        times: Distribution of the times of training examples.
        optimizer: "muon" is Muon for the matrices and kernels of a network's blocks, and AdamW for
            the rest: on small trainings it learns more from an example.
        compile: Use torch.compile: a minute at the start, then faster.
        resume: Run folder or checkpoint to resume from. None: this folder's checkpoint, if any.
        init_from: Initial weights, as for model.checkpoint. None: new ones.
        output: Path of the weights.
    """

    max_steps: Count = 16000
    learning_rate: Positive = 1.0e-3
    warmup_steps: Whole = 500
    ema_decay: Share = 0.999
    horizontal_flip: Share = 0.0
    times: Times = field(default_factory=LogitNormalTimes)
    save_every: Count = 1000
    optimizer: Literal["adamw", "muon"] = "adamw"
    compile: bool = False
    resume: str | None = None
    init_from: str | None = None
    output: str

    def __call__(self, cfg: DictConfig) -> Logger | None:
        kind = border.class_of(cfg.model, "model")
        if not (isinstance(kind, type) and issubclass(kind, Network)):
            raise ValueError(
                f"task=pretrain trains networks; {cfg.model._target_} has no weights to train"
            )
        if self.resume is not None and self.init_from is not None:
            raise ValueError(
                "task.resume and task.init_from both name initial weights; leave out one of them"
            )

        # Checkpoint to resume from.
        folder = Path(cfg.paths.output_dir)
        last = folder / "checkpoints" / "last.ckpt"
        resume = last if last.is_file() else None
        if self.resume is not None:
            resume = _checkpoint(self.resume)
        elif resume is not None:
            require_same(cfg, folder, *FREE)

        # Model and examples; the initial weights are the same on every rank.
        torch.manual_seed(self.seed)
        images = load_images(cfg.images)
        model = _initial(cfg, images, self.init_from or UNTRAINED)
        require_fitting(images, model)
        if self.horizontal_flip and not isinstance(model.decoder, Pixels):
            raise ValueError(
                f"task.horizontal_flip mirrors pictures, model={model.name} works on latents; "
                "leave it at 0, and mirror the pictures before they become latents"
            )
        examples = Examples(
            images,
            self.seed,
            self.label_dropout,
            self.times,
            self.batch_size,
            self.horizontal_flip,
        )

        config_text = OmegaConf.to_yaml(cfg, resolve=True)
        rank_zero_only(write_atomically)(folder / "config.yaml", config_text)

        # Training.
        module = PretrainModule(
            model,
            examples,
            **self.settings(),
            optimizer=self.optimizer,
            compile=self.compile,
            output=Path(self.output),
            folder=folder,
            about=_about(cfg, model, images),
            checkpoint=last,
        )
        logger = border.build(cfg.logger, "logger", Logger | None)
        trainer = fit(cfg, self, module, logger, resume)

        if trainer.is_global_zero:
            result = f"{module.steps_taken} steps, loss {module.recent_loss():.4g}"
            PlainConsole().print(f"{self.output}: {result}", soft_wrap=True)
        return logger


def load_images(images: DictConfig) -> Dataset:
    """Return the items (image, label) of a configuration of conf/images."""
    items = border.build(images, "images")
    return TensorDataset(*items) if isinstance(items, tuple) else items


def require_fitting(images: Dataset, model: Network) -> None:
    """Check that a model can be trained on images.

    Raises:
        ValueError: If the images have another shape than the model's, more classes, or none
            although the model takes some.
    """
    if (shape := tuple(images[0][0].shape)) != model.image_shape:
        raise ValueError(
            f"images has items of shape {shape}, model={model.name} takes {model.image_shape}"
        )
    if model.num_classes is None or not isinstance(images, ImageFolder | TensorDataset):
        return

    # Classes.
    if isinstance(images, TensorDataset):
        labels = images.tensors[1]
    else:
        labels = [label for _, label in images.samples]
    classes = int(torch.as_tensor(labels).max()) + 1

    if classes > model.num_classes:
        raise ValueError(
            f"images has {classes} classes, model={model.name} has {model.num_classes}; set its "
            f"num_classes to at least {classes}, or choose other images"
        )
    if not classes:
        raise ValueError(
            f"images has no classes, model={model.name} has {model.num_classes}; set its "
            "num_classes to null, or give images in a folder for each class"
        )


def _initial(cfg: DictConfig, images: Dataset, checkpoint: str) -> Network:
    """Return the model with its initial weights; the captions of the images are its prompts."""
    captions = getattr(images, "captions", None)
    if takes_prompts(cfg.model) and captions is None:
        raise ValueError(
            f"model={cfg.model.name} needs images with captions, these have classes; choose other "
            "images"
        )
    if captions is not None and not takes_prompts(cfg.model):
        raise ValueError(
            f"model={cfg.model.name} needs images with classes, these have captions; choose other "
            "images"
        )
    prompts = {} if captions is None else {"prompts": captions}
    return border.build(cfg.model, "model", Network, checkpoint=checkpoint, **prompts)


def _checkpoint(resume: str) -> Path:
    """Return the checkpoint of a run folder, or the path itself."""
    path = Path(resume)
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise FileNotFoundError(
            f"task.resume: no checkpoint {path}; give the run folder of an earlier task=pretrain"
        )
    return path


def _about(cfg: DictConfig, model: Network, images: Dataset) -> dict[str, Any]:
    """Return the provenance of the weights that is complete before training."""
    init_from = cfg.task.init_from
    if init_from:
        init_from = {"file": Path(init_from).name, "sha256": model.fingerprint}
    return {
        "name": model.name,
        "seed": cfg.task.seed,
        "init_from": init_from,
        "parameters": sum(parameter.numel() for parameter in model.backbone.parameters()),
        "data": {"images": len(images), "sha256": _fingerprint(images)},
        **origin(),
    }


def _fingerprint(images: Dataset) -> str:
    """Return the SHA-256 of tensors, or of the names, sizes and labels of a folder's files."""
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
