"""Distances: what a search minimises between a student's state and the teacher's at the same time.

A distance compares `features` of the two states: the states themselves, what the network makes of them, or what another
network sees in the result (OSS, arXiv 2503.21774, section 4.2.2). Where the features are linear and the norm is 2, the
search scores every edge from inner products; any other distance is measured on every candidate. Legend: M rows,
B bound samples (row m belongs to sample m % B), *E event dims, F features.
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
from oss_exp.velocity import BoundVelocity

Norm = Literal[1, 2]


class Source(Protocol):
    """What a distance may look at in a model: its pixels and its layers."""

    def decode(self, x0: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def named_modules(self) -> Iterable[tuple[str, nn.Module]]: ...


@dataclass(frozen=True)
class Distance(abc.ABC):
    """The mean over the features of |difference| ^ norm, one number a row."""

    norm: Norm = field(default=2, kw_only=True)

    def __post_init__(self) -> None:
        require_choice(get_args(Norm), norm=self.norm)

    @property
    def linear(self) -> bool:
        """Whether the features are a linear map of x that reads neither t nor the network."""
        return False

    @property
    def calls(self) -> int:
        """Network calls that the features of a row need."""
        return 0

    @abc.abstractmethod
    def features(self, x: Tensor, t: Tensor, velocity: BoundVelocity) -> Tensor:
        """x (M, *E) at t (M,) float64 -> (M, ...)."""

    def bind(self, model: Source) -> Distance:
        """The same, looking at this model's pixels or layers where it needs any."""
        return self

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        """features (M, ...) of two states -> (M,) float64."""
        gap = (a - b).flatten(1).double()
        return (gap.abs() if self.norm == 1 else gap.square()).mean(dim=1)

    @property
    def quadratic(self) -> bool:
        """Whether inner products of states are enough."""
        return self.linear and self.norm == 2


@dataclass(frozen=True)
class XtMSE(Distance):
    """x_t-MSE: all elements of the state, the paper's default."""

    @property
    def linear(self) -> bool:
        return True

    def features(self, x: Tensor, t: Tensor, velocity: BoundVelocity) -> Tensor:
        return x


@dataclass(frozen=True)
class X0MSE(Distance):
    """x0-MSE: the clean prediction x - t v(x, t) at the candidate itself, one network call for every edge."""

    @property
    def calls(self) -> int:
        return 1

    def features(self, x: Tensor, t: Tensor, velocity: BoundVelocity) -> Tensor:
        if bool((t == 0).all()):
            return x
        return x - rowwise(t, x) * velocity(x, t)


class RandomFeatures(nn.Module):
    """A fixed random convolutional network: features without any weights to download; texture rather than meaning."""

    def __init__(self, channels: int = 1, width: int = 32, seed: int = 0):
        super().__init__()
        require_range(at_least=1, at_most=4, channels=channels)
        require_range(at_least=1, at_most=4096, width=width)
        require_range(at_least=0, seed=seed)
        sizes = [channels, width, 2 * width, 4 * width]
        layers = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(sizes)]
        self.layers = nn.ModuleList(layers)
        generator = torch.Generator().manual_seed(seed)
        for layer in layers:
            nn.init.normal_(
                layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5, generator=generator
            )
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x, features = images.float() * 2 - 1, []
        for layer in self.layers:
            x = layer(x).relu()
            features.append(x.mean(dim=(2, 3)))
            features.append(x.amax(dim=(2, 3)))
        return torch.cat(features, dim=1)


@dataclass(frozen=True)
class Inception(X0MSE):
    """Features that an image network sees in the decoded clean prediction: the paper's x0-Inception-V3.

    extractor: images (M, C, H, W) in [0, 1] -> (M, F). decode: the model's, set by `bind`.
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
    """On the model's device, wherever the states are."""
    return model.decode(x0.to(next(chain(model.parameters(), model.buffers()), x0).device))


@dataclass(frozen=True)
class Perceptual(Distance):
    """What a layer of the denoising network itself puts out at (x, t): the paper's x_t-perceptual.

    layer: dotted name of a submodule of the model; all its outputs in a call are compared, under guidance both (but for
              guidance in an interval only the conditional one).
    min_time: the time told to the network where t is smaller, for at t = 0 a trained network has no input scale.
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
            shown = ", ".join([name for name in layers if name][:20])
            raise ValueError(
                f"distance.layer={self.layer!r} is no layer of the model; it has {shown}"
            )
        return replace(self, module=layers[self.layer])

    def features(self, x: Tensor, t: Tensor, velocity: BoundVelocity) -> Tensor:
        if self.module is None:
            raise ValueError(
                "distance Perceptual looks at a model's layer; give a Model, or use XtMSE()"
            )
        seen: list[Tensor] = []

        def watched(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            seen.clear()
            velocity.fn(x, t, condition)
            if not seen:
                raise ValueError(
                    f"layer {self.layer} does not run when the model gives a velocity; choose another"
                )
            outputs = torch.cat(seen) if len(seen[0]) == len(x) else seen[0]
            if velocity.mixed_within != (0.0, 1.0):  # the second answers are of some rows only
                outputs = outputs[: len(x)]
            # Several calls with a row each, or one with several rows a sample: (c * M, ...) -> (M, c * F).
            return (
                outputs.flatten(1)
                .unflatten(0, (-1, len(x)))
                .transpose(0, 1)
                .flatten(1)
                .to(x.device)
            )

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            seen.append(output)

        handle = self.module.register_forward_hook(keep)
        try:
            return replace(velocity, fn=watched).raw(x, t.clamp(min=self.min_time))
        finally:
            handle.remove()


@dataclass(frozen=True)
class Select(Distance):
    """Another distance, with its norm, on some channels and frames of (M, C, H, W) images or (M, C, F, H, W) videos.

    frames:   this many, spread evenly from the first to the last (truncated to integers, as in the released OSS code).
    channels: the first so many. None keeps all.
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
            self._check("channels", self.channels, x.shape[1])
            x = x[:, : self.channels]
        if self.frames is not None:
            if x.ndim != 5:
                raise ValueError(
                    f"frames needs videos of shape (M, C, F, H, W), got {tuple(x.shape)}; set frames=null"
                )
            self._check("frames", self.frames, x.shape[2])
            x = x[:, :, torch.linspace(0, x.shape[2] - 1, self.frames).long().to(x.device)]
        return x

    @staticmethod
    def _check(name: str, wanted: int, present: int) -> None:
        if wanted > present:
            raise ValueError(f"{name}={wanted} but the states have only {present}")
