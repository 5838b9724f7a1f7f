"""A neural network as a velocity in canonical time.

`Network` takes any backbone, any parameterization, and weights from a file. At the end are helpers
for the model families, which build their networks from parts and sizes.

Legend: B samples, M rows, *E event dims.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
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


@runtime_checkable
class Initialised(Protocol):
    """A backbone with initial weights of its own, in place of its layers' defaults."""

    def initialise(self) -> None:
        """Set the weights that training begins with."""
        ...


class Network(Model):
    """A backbone with its parameterization, its decoder and its weights.

    Args:
        name: Name in tables and files.
        backbone: Maps input (M, *E), clock (M,) and classes (M,), -1 for none, to an output. The
            parameterization says what the three mean.
        parameterization: Clock, input scaling and output of the backbone.
        event_shape: *E.
        num_classes: Number of classes, or None.
        decoder: Maps x0 (B, *E) to pixels in [0, 1].
        guidance: Guidance of a velocity that is bound without one.
        micro_batch: Most network rows in one call of the backbone.
        dtype: Type of the network's weights and input; states and times stay wider.
        checkpoint: File of weights, by path or by the name it is shipped under, or the run folder
            of a `task=pretrain`. `untrained` leaves the weights as initialised, for training.
        weights_set: Name of a set of weights in that file. None takes the set that fits the
            backbone; if several do, the averaged weights (EMA).
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

        # Checks.
        require_choice(get_args(Dtype), dtype=dtype)
        require_range(at_least=1, num_classes=num_classes, micro_batch=micro_batch)
        if min(event_shape, default=0) < 1:
            raise ValueError(f"event_shape must be sizes of at least 1, got {list(event_shape)}")

        # Parts.
        self.name = name
        self.backbone = backbone
        self.parameterization = parameterization
        self.path = parameterization.path
        self.event_shape = tuple(event_shape)
        self.num_classes = num_classes
        self.decoder = decoder
        self.guidance = guidance
        self.micro_batch = micro_batch
        self.weights_set = weights_set

        # Weights.
        if checkpoint == UNTRAINED:
            self.fingerprint = UNTRAINED
            if isinstance(backbone, Initialised):
                backbone.initialise()
        else:
            self.fingerprint = self._load(checkpoint)
        self.backbone.to(getattr(torch, dtype))
        self.eval().requires_grad_(False)

    @property
    def needs_classes(self) -> bool:
        """True if the network was trained with classes, so that a sample should have one."""
        return self.num_classes is not None

    def velocity(self, condition: Tensor | None, guidance: Guidance | None = None) -> BoundVelocity:
        """Return the velocity with classes (B,) and guidance bound.

        Raises:
            ValueError: If a class does not exist, or there is guidance but no class.
        """
        if condition is not None:
            valid = (condition >= 0) & (condition < (self.num_classes or 0))
            if not bool(valid.all()):
                classes = condition.unique().tolist()
                raise ValueError(
                    f"{self.name} has {self.num_classes or 'no'} classes, got {classes}"
                )
        return (guidance or self.guidance).bind(self._velocity, condition, self.micro_batch)

    def decode(self, x0: Tensor) -> Tensor:
        """Decode x0 (B, *E) to pixels in [0, 1]."""
        return self.decoder(x0)

    @property
    def num_conditions(self) -> int:
        """The number of conditions to choose from; 0 if the network takes none."""
        return self.num_classes or 0

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of a training example."""
        return self.event_shape

    def loss(self, network: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the training loss of a backbone, scalar float32.

        Args:
            network: The backbone in training, with the same inputs as this model's own.
            batch: x0 and noise (B, *image_shape), t (B,) float64, and label (B,), NO_CLASS for
                none. It also has shared (B,), a number in (0, 1) that all examples of a training
                step have in common, which this loss does not use.
        """
        x0, noise, t = batch["x0"], batch["noise"], batch["t"]
        x = rowwise(1 - t, x0) * x0 + rowwise(t, x0) * noise
        network_input, clock = self.parameterization.inputs(x, t)
        output = network(network_input, clock, batch["label"])
        target = self.parameterization.target(x0, noise, t)
        return self.parameterization.loss(output.float(), target.float(), t)

    def _velocity(self, x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        network_input, clock = self.parameterization.inputs(x, t)
        dtype = next(self.backbone.parameters()).dtype
        output = self.backbone(network_input.to(dtype), clock, classes)
        return self.parameterization.velocity(output.to(x), x, t)

    def _load(self, checkpoint: str) -> str:
        """Fill the backbone; return the SHA-256 of a safetensors file, else of the weights."""
        path = find_asset(checkpoint, "checkpoint")
        if path.is_dir():
            path = trained_in(path)
        self._fill(path)
        if path.suffix == ".safetensors":
            return file_sha256(path)
        return digest(self.backbone.state_dict())

    def _fill(self, path: Path, translate: Translate = Tensors) -> None:
        """Fill the backbone from a file; neither may have a weight that the other lacks."""
        weights = self.backbone.state_dict()
        reader = f"model={self.name}"
        self.backbone.load_state_dict(read_for(path, weights, translate, self.weights_set, reader))


def adaptive_norms(backbone: nn.Module) -> list[str]:
    """Return the names of the parameters that turn clock and condition into shifts and scales.

    A backbone with such parameters names their layers in its class attribute `adaptive_norms`,
    such as ("norm1.linear",).
    """
    layers = getattr(backbone, "adaptive_norms", ())
    names = []
    for name, _ in backbone.named_parameters():
        if any(f".{layer}." in f".{name}." for layer in layers):
            names.append(name)
    return names


def at_size(name: str, size: str, sizes: Mapping[str, Any]) -> str:
    """Return the name of a model at one of its sizes. Raises ValueError for any other size."""
    require_choice(sizes, size=size)
    return name if size == "full" else f"{name}_{size}"


def build_part(sizes: Mapping[str, Mapping[str, Any]], size: str, part: str) -> Any:
    """Build one part of a model at a size; an error names the settings that do not fit."""
    with settings_named(f"sizes.{size}.{part}"):
        return sizes[size][part]()


@contextmanager
def settings_named(place: str) -> Iterator[None]:
    """Raise errors from within as a ValueError that names the settings; OSError passes."""
    try:
        yield
    except OSError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error
    except Exception as error:
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from error


def shape(tensor: Tensor | None) -> str:
    """Return a tensor's shape as text, for messages."""
    return "absent" if tensor is None else str(tuple(tensor.shape))
