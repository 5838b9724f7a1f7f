"""Distances: what a search minimises between a student's state and the teacher's at the same time.

A distance compares `features` of the two states: the states themselves, the network's
prediction from them, or what another network sees in that prediction (OSS,
arXiv 2503.21774, section 4.2.2). Where the features are linear and the norm is 2, the
search scores every edge from inner products; any other distance is measured on every
candidate. Legend: M rows, B bound samples (row m belongs to sample m % B), *E event
dims, F features.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, pairwise
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from oss_exp.checks import require_choice, require_range
from oss_exp.tensors import rowwise
from oss_exp.velocity import BoundVelocity, network_running

Norm = Literal[1, 2]


class Source(Protocol):
    """The part of a model that a distance may use: its pixels and its layers."""

    def decode(self, x0: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def named_modules(self) -> Iterable[tuple[str, nn.Module]]: ...


@dataclass(frozen=True)
class Distance(abc.ABC):
    """A distance between two states: the mean over their features of |difference|^norm.

    Attributes:
        norm: 1 or 2.
    """

    norm: Norm = field(default=2, kw_only=True)

    def __post_init__(self) -> None:
        require_choice(get_args(Norm), norm=self.norm)

    @property
    def linear(self) -> bool:
        """True where the features are a linear map of x, without t or the network."""
        return False

    @property
    def calls(self) -> int:
        """The number of network calls that the features of a row need."""
        return 0

    @abc.abstractmethod
    def features(self, x: Tensor, t: Tensor, velocity: BoundVelocity) -> Tensor:
        """Return the features (M, ...) of states x (M, *E) at times t (M,), float64."""

    def bind(self, model: Source) -> Distance:
        """Return the distance bound to a model, where it needs pixels or layers."""
        return self

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance (M,), float64, between the features (M, ...) of two states."""
        difference = (a - b).flatten(1).double()
        if self.norm == 1:
            return difference.abs().mean(dim=1)
        return difference.square().mean(dim=1)

    @property
    def quadratic(self) -> bool:
        """True where the distance follows from inner products of states."""
        return self.linear and self.norm == 2


@dataclass(frozen=True)
class XtMSE(Distance):
    """The x_t-MSE of all elements of the state, the paper's default."""

    @property
    def linear(self) -> bool:
        return True

    def features(self, x: Tensor, t: Tensor, velocity: BoundVelocity) -> Tensor:
        return x


@dataclass(frozen=True)
class X0MSE(Distance):
    """The x0-MSE of the clean predictions x - t v(x, t), which cost one network call per edge."""

    @property
    def calls(self) -> int:
        return 1

    def features(self, x: Tensor, t: Tensor, velocity: BoundVelocity) -> Tensor:
        if bool((t == 0).all()):
            return x
        return x - rowwise(t, x) * velocity(x, t)


class RandomFeatures(nn.Module):
    """A fixed random convolutional network, which needs no weights; it sees texture, not meaning.

    Args:
        channels: Channels of the images, 1 to 4.
        width: Channels of the first of three layers; the next ones have 2 and 4 times
            as many.
        seed: Seed of the weights.
    """

    def __init__(self, channels: int = 1, width: int = 32, seed: int = 0):
        super().__init__()
        require_range(at_least=1, at_most=4, channels=channels)
        require_range(at_least=1, at_most=4096, width=width)
        require_range(at_least=0, seed=seed)

        # Layers.
        sizes = [channels, width, 2 * width, 4 * width]
        layers = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(sizes)]
        self.layers = nn.ModuleList(layers)

        # Weights.
        generator = torch.Generator().manual_seed(seed)
        for layer in layers:
            std = (2 / layer.weight[0].numel()) ** 0.5
            nn.init.normal_(layer.weight, std=std, generator=generator)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (M, 14 width) of images (M, channels, H, W) in [0, 1]."""
        x = images.float() * 2 - 1
        features: list[Tensor] = []
        for layer in self.layers:
            x = layer(x).relu()
            features.append(x.mean(dim=(2, 3)))
            features.append(x.amax(dim=(2, 3)))
        return torch.cat(features, dim=1)


@dataclass(frozen=True)
class Inception(X0MSE):
    """The distance between image features of the clean predictions: the paper's x0-Inception-V3.

    Attributes:
        extractor: Maps images (M, C, H, W) in [0, 1] to features (M, F).
        decode: The model's decoder, set by `bind`.
    """

    extractor: nn.Module = field(default_factory=RandomFeatures)
    decode: Callable[[Tensor], Tensor] | None = None

    def bind(self, model: Source) -> Inception:
        return replace(self, decode=partial(_decoded, model))

    def features(self, x: Tensor, t: Tensor, velocity: BoundVelocity) -> Tensor:
        if self.decode is None:
            raise ValueError(
                "distance Inception looks at a model's pixels; give a Model, or use XtMSE()"
            )
        images = self.decode(super().features(x, t, velocity))
        return self.extractor.to(images.device)(images).to(x.device)


def _decoded(model: Source, x0: Tensor) -> Tensor:
    """Decode x0 on the model's device."""
    weight = next(chain(model.parameters(), model.buffers()), x0)
    return model.decode(x0.to(weight.device))


@dataclass(frozen=True)
class Perceptual(Distance):
    """The distance between outputs of a layer of the denoising network: the paper's x_t-perceptual.

    Attributes:
        layer: Dotted name of a submodule of the model. All its outputs in a call are
            compared. Under guidance these are the conditional and the unconditional
            ones; with guidance in an interval only the conditional ones.
        min_time: Time given to the network where t is smaller, because a trained
            network has no input scale at t = 0.
        module: The submodule, set by `bind`.
    """

    layer: str = "responsibilities"
    min_time: float = 0.001
    module: nn.Module | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(at_least=0, below=1, min_time=self.min_time)

    @property
    def calls(self) -> int:
        return 1

    def bind(self, model: Source) -> Perceptual:
        layers = dict(model.named_modules())
        if not self.layer or self.layer not in layers:
            names = [name for name in layers if name]
            raise ValueError(
                f"distance.layer={self.layer!r} is not a layer of the model; "
                f"it has {', '.join(names[:20])}"
            )
        return replace(self, module=layers[self.layer])

    def features(self, x: Tensor, t: Tensor, velocity: BoundVelocity) -> Tensor:
        if self.module is None:
            raise ValueError(
                "distance Perceptual looks at a model's layer; give a Model, or use XtMSE()"
            )
        outputs: list[Tensor] = []

        def layer_features(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            """Run the network and return the layer's outputs in place of the velocity."""
            outputs.clear()
            with network_running():
                velocity.fn(x, t, condition)
            if not outputs:
                raise ValueError(
                    f"layer {self.layer} does not run when the model gives a velocity; "
                    "choose another"
                )
            return _row_features(outputs, x, velocity)

        def record(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            outputs.append(output)

        # Record the layer's outputs while the network runs.
        handle = self.module.register_forward_hook(record)
        try:
            return replace(velocity, fn=layer_features).raw(x, t.clamp(min=self.min_time))
        finally:
            handle.remove()


def _row_features(outputs: list[Tensor], x: Tensor, velocity: BoundVelocity) -> Tensor:
    """Return features (M, c * F) from a layer's outputs during one network call on x (M, *E).

    A guided call runs the network c times with M rows, or once with c M rows.
    """
    stacked = torch.cat(outputs) if len(outputs[0]) == len(x) else outputs[0]
    if velocity.mixed_within != (0.0, 1.0):  # the unconditional rows are not there at every time
        stacked = stacked[: len(x)]
    calls = stacked.flatten(1).unflatten(0, (-1, len(x)))  # (c, M, F)
    return calls.transpose(0, 1).flatten(1).to(x.device)


@dataclass(frozen=True)
class Select(Distance):
    """Another distance on some channels of images (M, C, H, W) or frames of videos (M, C, F, H, W).

    Attributes:
        distance: The distance whose features are cut.
        frames: Number of frames, evenly spaced from the first to the last; None keeps
            all. Indices are truncated to integers, as in the released OSS code.
        channels: Number of leading channels; None keeps all.
        norm: That of `distance`.
    """

    distance: Distance = field(default_factory=XtMSE)
    frames: int | None = None
    channels: int | None = None
    norm: Norm = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", self.distance.norm)
        require_range(at_least=1, frames=self.frames, channels=self.channels)

    @property
    def linear(self) -> bool:
        return self.distance.linear

    @property
    def calls(self) -> int:
        return self.distance.calls

    def bind(self, model: Source) -> Select:
        return replace(self, distance=self.distance.bind(model))

    def features(self, x: Tensor, t: Tensor, velocity: BoundVelocity) -> Tensor:
        x = self.distance.features(x, t, velocity)
        if self.channels is not None:
            _require_at_most("channels", self.channels, x.shape[1])
            x = x[:, : self.channels]
        if self.frames is not None:
            if x.ndim != 5:
                raise ValueError(
                    f"frames needs videos of shape (M, C, F, H, W), got {tuple(x.shape)}; "
                    "set frames=null"
                )
            _require_at_most("frames", self.frames, x.shape[2])
            frames = torch.linspace(0, x.shape[2] - 1, self.frames).long()
            x = x[:, :, frames.to(x.device)]
        return x


def _require_at_most(name: str, count: int, available: int) -> None:
    if count > available:
        raise ValueError(f"{name}={count} but the states have only {available}")
