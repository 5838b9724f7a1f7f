"""A neural network behind canonical time: any backbone, any parameterization, weights from a safetensors file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oss_exp.checks import require_choice, require_range
from oss_exp.files import find_asset
from oss_exp.models.base import Model
from oss_exp.models.checkpoints.sets import Tensors, Translate
from oss_exp.models.checkpoints.weights import UNTRAINED, digest, file_sha256, read_for, trained_in
from oss_exp.models.guidance import Guidance
from oss_exp.models.parameterization import Parameterization
from oss_exp.tensors import rowwise
from oss_exp.velocity import BoundVelocity

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


class Network(Model):
    """backbone(x (M, *E), clock (M,), classes (M,), -1 for none) -> what `parameterization` says.

    decoder:     x0 (B, *E) -> pixels in [0, 1].
    micro_batch: network rows evaluated at a time.
    dtype:       of the network's weights and its input; states and times stay wider.
    checkpoint:  a file of weights, by path or by the name it is shipped under, or the run folder of a `task=pretrain`;
                 `untrained`: the weights as initialised, for training.
    weights_set: which of several sets in that file; null: the one that fits, of several the average.
    """

    def __init__(
        self,
        name: str,
        backbone: nn.Module,
        parameterization: Parameterization,
        event_shape: Sequence[int],
        num_classes: int | None,
        decoder: nn.Module,
        guidance: Guidance,
        micro_batch: int,
        dtype: Dtype,
        checkpoint: str,
        weights_set: str | None = None,
    ):
        super().__init__()
        require_choice(get_args(Dtype), dtype=dtype)
        require_range(at_least=1, num_classes=num_classes, micro_batch=micro_batch)
        if min(event_shape, default=0) < 1:
            raise ValueError(f"event_shape must be sizes of at least 1, got {list(event_shape)}")
        self.name, self.backbone, self.parameterization = name, backbone, parameterization
        self.path, self.event_shape, self.num_classes = (
            parameterization.path,
            tuple(event_shape),
            num_classes,
        )
        self.decoder, self.guidance, self.micro_batch = decoder, guidance, micro_batch
        self.weights_set = weights_set
        self.fingerprint = UNTRAINED if checkpoint == UNTRAINED else self._load(checkpoint)
        self.backbone.to(getattr(torch, dtype))
        self.eval().requires_grad_(False)

    @property
    def needs_classes(self) -> bool:
        """A network that was trained with classes is at its best with one."""
        return self.num_classes is not None

    def velocity(self, condition: Tensor | None, guidance: Guidance | None = None) -> BoundVelocity:
        if condition is not None and not bool(
            ((condition >= 0) & (condition < (self.num_classes or 0))).all()
        ):
            raise ValueError(
                f"{self.name} has {self.num_classes or 'no'} classes, got {condition.unique().tolist()}"
            )
        return (guidance or self.guidance).bind(self._velocity, condition, self.micro_batch)

    def decode(self, x0: Tensor) -> Tensor:
        return self.decoder(x0)

    @property
    def num_conditions(self) -> int:
        """How many conditions there are to choose from; 0: it takes none."""
        return self.num_classes or 0

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of what it is trained on: an event, where an event is an image."""
        return self.event_shape

    def loss(self, network: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Of a backbone in training, like its own: the error of its answers, () float32.

        batch: x0, noise (B, *image_shape), t (B,) float64, label (B,), NO_CLASS for none, and shared (B,), a number in
        (0, 1) that all examples of a step have in common.
        """
        x0, noise, t = batch["x0"], batch["noise"], batch["t"]
        question, clock = self.parameterization.question(
            rowwise(1 - t, x0) * x0 + rowwise(t, x0) * noise, t
        )
        output = network(question, clock, batch["label"])
        return F.mse_loss(output.float(), self.parameterization.answer(x0, noise, t).float())

    def _velocity(self, x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        question, clock = self.parameterization.question(x, t)
        output = self.backbone(question.to(next(self.backbone.parameters()).dtype), clock, classes)
        return self.parameterization.velocity(output.to(x), x, t)

    def _load(self, checkpoint: str) -> str:
        """Fill the backbone; returns the SHA-256 of what it was filled with: of the file, where that is safetensors."""
        path = find_asset(checkpoint, "checkpoint")
        path = trained_in(path) if path.is_dir() else path
        self._fill(path)
        return (
            file_sha256(path)
            if path.suffix == ".safetensors"
            else digest(self.backbone.state_dict())
        )

    def _fill(self, path: Path, translate: Translate = Tensors) -> None:
        """Every weight of the backbone from a file, none left over."""
        own = self.backbone.state_dict()
        self.backbone.load_state_dict(
            read_for(path, own, translate, self.weights_set, f"model={self.name}")
        )


def adaptive_norms(backbone: nn.Module) -> list[str]:
    """Return the names of the parameters that turn clock and condition into shifts, scales and gates.

    A backbone that has such names their layers in its class attribute `adaptive_norms`, such as ("norm1.linear",).
    """
    layers = getattr(backbone, "adaptive_norms", ())
    names = [name for name, _ in backbone.named_parameters()]
    return [name for name in names if any(f".{layer}." in f".{name}." for layer in layers)]


def at_size(name: str, size: str, sizes: Mapping[str, Any]) -> str:
    """The name of a model at one of its sizes; ValueError where it has no such one."""
    require_choice(sizes, size=size)
    return name if size == "full" else f"{name}_{size}"


def build_part(sizes: Mapping[str, Mapping[str, Any]], size: str, part: str) -> Any:
    """What the partial `part` of a size makes; ValueError says where the settings are that make nothing."""
    with settings_named(f"sizes.{size}.{part}"):
        return sizes[size][part]()


@contextmanager
def settings_named(place: str) -> Iterator[None]:
    """Raise what goes wrong within, where a part of a model is made, as a ValueError that names its settings."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        kind = (
            ""
            if isinstance(error, RuntimeError | TypeError | ValueError)
            else f"{type(error).__name__}: "
        )
        raise ValueError(f"{place}: {kind}{error}") from error


def shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))
