"""Tensor helpers that every floor uses."""

from __future__ import annotations

from torch import Tensor


def rowwise(weight: Tensor, x: Tensor) -> Tensor:
    """weight (M,) or () float64 -> x's dtype, shaped to multiply x (M, *E)."""
    return weight.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
