"""The velocity that solvers and searches call: a network with its condition and guidance bound.

Legend: B bound samples, M rows (a multiple of B, except inside `fn`), R outputs of a
guided call, *E event dims.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from oss_exp.tensors import rowwise

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""v = f(x (M, *E), t (M,)) -> (M, *E).

M is any multiple of the B bound samples, and row m belongs to sample m % B.
"""


def standard_normal_velocity(x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
    """Return the exact velocity of standard normal data, v = (2t - 1) x / (t^2 + (1 - t)^2)."""
    return rowwise((2 * t - 1) / (t**2 + (1 - t) ** 2), x) * x


@dataclass(frozen=True, eq=False)
class BoundVelocity:
    """A velocity function made of a network function and one condition for each sample.

    It repeats the conditions over the rows and feeds the network at most `micro_batch`
    rows at a time. It can be cut to a few samples, so that a search can work in small
    groups.

    Attributes:
        fn: The network function, fn(x (M, *E), t (M,), condition (M, ...) or None). It
            returns the velocity (M, *E), or under guidance its R outputs apart,
            (M, R, *E).
        condition: (B, ...), or None.
        micro_batch: Most rows in one call of `fn`.
        mix: Weights of the R outputs, whose weighted sum is v. A guidance scale g has
            the weights (g, 1 - g), with the conditional output first.
        mixed_within: The interval of times [low, high] in which guidance applies, so that a
            row of x costs R network rows. Outside, it costs one.
        divisible: Whether `subset` can cut it to some of its samples. A plain function
            cannot be cut, because it may tell samples apart by their rows.
        has_means: Whether samples of one condition share a mean clean sample. If not, such
            as for tokens, each in its own context, schedules have a mean of 0.
    """

    fn: Callable[[Tensor, Tensor, Tensor | None], Tensor] = standard_normal_velocity
    condition: Tensor | None = None
    micro_batch: int = sys.maxsize
    mix: tuple[float, ...] = (1.0,)
    mixed_within: tuple[float, float] = (0.0, 1.0)
    divisible: bool = True
    has_means: bool = True

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1 row, got {self.micro_batch}")

    @classmethod
    def of(cls, velocity: VelocityFn) -> BoundVelocity:
        """Wrap a plain function as an indivisible velocity; return a BoundVelocity unchanged."""
        if isinstance(velocity, BoundVelocity):
            return velocity
        return cls(partial(_unconditioned, velocity), divisible=False)

    def rows_at(self, t: Tensor) -> Tensor:
        """Return the number of network rows (M,) that a row of x costs at each time t (M,)."""
        low, high = self.mixed_within
        return torch.where((t >= low) & (t <= high), len(self.mix), 1)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (M, *E) of x (M, *E) at t (M,)."""
        return self.combine(self.outputs(x, t))

    def outputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Return the R outputs (M, *E) of one network call; without guidance R = 1."""
        return self.apart(self.raw(x, t))

    def apart(self, raw: Tensor) -> tuple[Tensor, ...]:
        """Split the result of `raw` into its R outputs (M, *E)."""
        return (raw,) if len(self.mix) == 1 else raw.unbind(1)

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the velocity (M, *E), the weighted sum of the R outputs."""
        if len(outputs) == 1:
            return outputs[0]
        first, *others = (weight * output for weight, output in zip(self.mix, outputs, strict=True))
        return sum(others, first)

    def raw(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the result of `fn`, (M, *E) or (M, R, *E), computed in micro-batches."""
        condition = None
        if self.condition is not None:
            repeats = len(x) // len(self.condition)
            condition = self.condition.repeat(repeats, *[1] * (self.condition.ndim - 1))
        if len(x) <= self.micro_batch:
            return self.fn(x, t, condition)

        parts: list[Tensor] = []
        for start in range(0, len(x), self.micro_batch):
            rows = slice(start, start + self.micro_batch)
            parts.append(self.fn(x[rows], t[rows], None if condition is None else condition[rows]))
        return torch.cat(parts)

    def offloaded(self, device: torch.device) -> BoundVelocity:
        """Return the velocity for x in host memory and a network on `device`.

        Each micro-batch is moved to the device, and its result is moved back.
        """

        def fn(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            return self.fn(x.to(device), t.to(device), condition).to(x.device)

        return replace(self, fn=fn)

    def subset(self, samples: Tensor) -> BoundVelocity:
        """Return the velocity of the samples at positions (b,) only.

        Raises:
            TypeError: If the velocity is indivisible.
        """
        if not self.divisible:
            raise TypeError(
                "a plain velocity function cannot be cut to some samples; "
                "bind it as a BoundVelocity"
            )
        return replace(self, condition=None if self.condition is None else self.condition[samples])


_running = ContextVar("_running", default=False)


@contextmanager
def network_running() -> Iterator[None]:
    """Run the network for every call within this context, also where a log could answer.

    For what hooks see inside of the network.
    """
    token = _running.set(True)
    try:
        yield
    finally:
        _running.reset(token)


def network_has_to_run() -> bool:
    """Return whether calls are within `network_running`."""
    return _running.get()


def _unconditioned(velocity: VelocityFn, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
    return velocity(x, t)


def joined(velocities: Sequence[BoundVelocity]) -> BoundVelocity:
    """Bind several velocities of the same B samples as one velocity of all of them.

    A search on it finds one schedule for all, such as for several guidance scales. Sample
    b of velocity g is sample G b + g of the result, so the G samples of one b are
    neighbours.

    Args:
        velocities: G divisible velocities, each bound to B conditions.

    Raises:
        ValueError: If one of them is bound to no conditions.
    """
    num_velocities = len(velocities)
    conditions = [v.condition for v in velocities if v.condition is not None]
    if len(conditions) < num_velocities:
        raise ValueError("velocities can be joined only where each sample has a condition")

    def fn(x: Tensor, t: Tensor, samples: Tensor | None) -> Tensor:
        assert samples is not None
        v = torch.empty_like(x)
        for g, velocity in enumerate(velocities):
            rows = (samples % num_velocities == g).nonzero()[:, 0]
            if len(rows):
                part = velocity.subset(samples[rows] // num_velocities)
                v[rows] = part(x[rows], t[rows])
        return v

    # The condition of a sample is its number.
    samples = torch.arange(len(conditions[0]) * num_velocities, device=conditions[0].device)
    micro_batch = min(velocity.micro_batch for velocity in velocities) * num_velocities
    has_means = all(velocity.has_means for velocity in velocities)
    return BoundVelocity(fn, samples, micro_batch, has_means=has_means)
