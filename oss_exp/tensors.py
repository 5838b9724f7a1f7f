"""Tensor helpers that every floor uses."""

from __future__ import annotations

from torch import Tensor


def rowwise(weight: Tensor, x: Tensor) -> Tensor:
    """Return weight (M,) or () in x's dtype, shaped to multiply x (M, *E) row by row."""
    return weight.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
