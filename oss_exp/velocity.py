"""The velocity that solvers and searches call: a network with its condition and guidance bound.

Legend: B bound samples, M rows (a multiple of B), R outputs of a guided call, *E event dims.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from oss_exp.tensors import rowwise

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""v = f(x (M, *E), t (M,)) -> (M, *E). M is any multiple of the B bound samples; row m belongs to sample m % B."""


def standard_normal_velocity(x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
    """Return the exact velocity of data from a standard normal law, v = (2 t - 1) x / (t^2 + (1 - t)^2)."""
    return rowwise((2 * t - 1) / (t**2 + (1 - t) ** 2), x) * x


@dataclass(frozen=True, eq=False)
class BoundVelocity:
    """A VelocityFn made of fn(x (M, *E), t (M,), condition (M, ...) or None) and one condition for each sample.

    It tiles the condition over the rows, feeds the network at most `micro_batch` rows at a time, and can be cut to a
    few samples, so that a search can work through its samples in small groups.

    mix:          under guidance fn returns its R outputs apart, (M, R, *E), and v is their sum with these weights: for
                  a scale g (g, 1 - g), conditional first.
    mixed_within: the times (low, high) at which one row of x costs R network rows; elsewhere its outputs are one.
    divisible:    whether it can be cut to some of its samples. A plain function may know which row is which sample.
    """

    fn: Callable[[Tensor, Tensor, Tensor | None], Tensor] = standard_normal_velocity
    condition: Tensor | None = None
    micro_batch: int = sys.maxsize
    mix: tuple[float, ...] = (1.0,)
    mixed_within: tuple[float, float] = (0.0, 1.0)
    divisible: bool = True

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1 row, got {self.micro_batch}")

    @classmethod
    def of(cls, velocity: VelocityFn) -> BoundVelocity:
        """Return the velocity itself, or a plain function wrapped as one that cannot be divided."""
        if isinstance(velocity, BoundVelocity):
            return velocity
        return cls(partial(_unconditioned, velocity), divisible=False)

    def rows_at(self, t: Tensor) -> Tensor:
        """Network rows that one row of x costs at these times."""
        low, high = self.mixed_within
        return torch.where((t >= low) & (t <= high), len(self.mix), 1)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.combine(self.outputs(x, t))

    def outputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Return the R outputs of one network call apart, (M, *E) each: one, or under guidance all that are mixed."""
        return self.apart(self.raw(x, t))

    def apart(self, raw: Tensor) -> tuple[Tensor, ...]:
        """Split what fn returned into its R outputs."""
        return (raw,) if len(self.mix) == 1 else raw.unbind(1)

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the velocity (M, *E) of R outputs."""
        if len(outputs) == 1:
            return outputs[0]
        first, *rest = (weight * output for weight, output in zip(self.mix, outputs, strict=True))
        return sum(rest, first)

    def raw(self, x: Tensor, t: Tensor) -> Tensor:
        """Return what fn returns, for all rows."""
        rows = None
        if self.condition is not None:
            rows = self.condition.repeat(
                len(x) // len(self.condition), *[1] * (self.condition.ndim - 1)
            )
        if len(x) <= self.micro_batch:
            return self.fn(x, t, rows)
        parts = [
            slice(start, start + self.micro_batch) for start in range(0, len(x), self.micro_batch)
        ]
        return torch.cat(
            [self.fn(x[part], t[part], None if rows is None else rows[part]) for part in parts]
        )

    def offloaded(self, device: torch.device) -> BoundVelocity:
        """Return the same for rows in host memory, of which a micro-batch at a time goes to the network's device."""

        def fn(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            return self.fn(x.to(device), t.to(device), condition).to(x.device)

        return replace(self, fn=fn)

    def subset(self, samples: Tensor) -> BoundVelocity:
        """Return the same for these of the B samples only, (b,) positions. Raises TypeError where it is indivisible."""
        if not self.divisible:
            raise TypeError(
                "a plain velocity function cannot be cut to some samples; bind it as a BoundVelocity"
            )
        return replace(self, condition=None if self.condition is None else self.condition[samples])


def _unconditioned(velocity: VelocityFn, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
    return velocity(x, t)
