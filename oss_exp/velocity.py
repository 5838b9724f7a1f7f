"""The velocity that solvers and searches call: a network with its condition and guidance bound.

Legend: B bound samples, M rows (a multiple of B), R outputs of a guided call, *E event dims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""v = f(x (M, *E), t (M,)) -> (M, *E). M is any multiple of the B bound samples; row m belongs to sample m % B."""


@dataclass(frozen=True, eq=False)
class BoundVelocity:
    """fn(x (M, *E), t (M,), condition (M, ...) or None) with one condition per sample bound, as a VelocityFn.

    Tiles the condition over the rows, feeds the network at most `micro_batch` rows at a time, and can be cut to a few
    samples, which lets a search work through its samples in small groups. A plain VelocityFn is enough everywhere else.
    mix: under guidance fn returns its R answers apart, (M, R, *E), and v is their sum with these weights: for a scale
         g (g, 1 - g), conditional first.
    mixed_within: the times (low, high) at which one row of x costs R network rows; elsewhere its answers are one.
    """

    fn: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    condition: Tensor | None
    micro_batch: int
    mix: tuple[float, ...] = (1.0,)
    mixed_within: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1 row, got {self.micro_batch}")

    def rows_at(self, t: Tensor) -> Tensor:
        """Network rows that one row of x costs at these times."""
        low, high = self.mixed_within
        return torch.where((t >= low) & (t <= high), len(self.mix), 1)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return mixed(self, answers(self, x, t))

    def raw(self, x: Tensor, t: Tensor) -> Tensor:
        """What fn returns, of all rows."""
        rows = None
        if self.condition is not None:
            rows = self.condition.repeat(len(x) // len(self.condition), *[1] * (self.condition.ndim - 1))
        if len(x) <= self.micro_batch:
            return self.fn(x, t, rows)
        parts = [slice(start, start + self.micro_batch) for start in range(0, len(x), self.micro_batch)]
        return torch.cat([self.fn(x[part], t[part], None if rows is None else rows[part]) for part in parts])

    def offloaded(self, device: torch.device) -> BoundVelocity:
        """The same for rows in host memory, of which a micro-batch at a time goes to the network's device."""

        def fn(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            return self.fn(x.to(device), t.to(device), condition).to(x.device)

        return replace(self, fn=fn)

    def subset(self, samples: Tensor) -> BoundVelocity:
        """The same for these of the B samples only, (b,) positions."""
        return replace(self, condition=None if self.condition is None else self.condition[samples])


def answers(f: VelocityFn, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """One network call -> its R answers apart, (M, *E) each: one, or under guidance all that the velocity mixes."""
    if isinstance(f, BoundVelocity):
        return (f.raw(x, t),) if len(f.mix) == 1 else f.raw(x, t).unbind(1)
    return (f(x, t),)


def mixed(f: VelocityFn, answers: Sequence[Tensor]) -> Tensor:
    """The velocity (M, *E) of these answers."""
    if len(answers) == 1:
        return answers[0]
    return sum(weight * answer for weight, answer in zip(f.mix, answers, strict=True))
