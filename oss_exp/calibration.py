"""Amplitude calibration: before a network call, give a student's state the range of values that the teacher's has.

In few steps the range drifts. The 5 and 95 % quantiles of the teacher at each node of its grid, averaged over samples,
say what it should be; one affine map a sample puts it there (Optimal Stepsize, arXiv 2503.21774, section 3.4).
Legend: N+1 teacher nodes, M rows, *E event dims, C channels (the first of E). Times are canonical (1 noise, 0 data).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, JsonValue, field_validator
from torch import Tensor

from oss_exp.files import TABLE_LIMIT, Numbers, Record, load_record, write_atomically

LOW, HIGH = 0.05, 0.95
FORMAT, VERSION = "oss_exp/calibration", 1


class CalibrationRecord(Record):
    """The file of a `Calibration`, whose words these are. quantiles: what low and high are, LOW and HIGH."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["oss_exp/calibration"]
    version: Literal[1]
    quantiles: tuple[float, float]
    last_step_only: bool
    times: Numbers
    low: Numbers | list[Numbers]
    high: Numbers | list[Numbers]
    provenance: dict[str, JsonValue]

    @field_validator("quantiles")
    @classmethod
    def _of_this_program(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value != (LOW, HIGH):
            raise ValueError(f"must be {[LOW, HIGH]}, got {list(value)}")
        return value


def amplitude(x: Tensor, per_channel: bool) -> tuple[Tensor, Tensor]:
    """x (M, *E) -> 5 % and 95 % quantiles over the elements of each sample, or of each channel: (M,) or (M, C) float64.

    Linear between two elements, as numpy's default; exact at any size (torch.quantile refuses large tensors).
    Raises ValueError when x holds NaN or infinity.
    """
    if x.ndim < 1 + per_channel:
        raise ValueError(
            f"an amplitude per {'channel' if per_channel else 'sample'} has no axis in {tuple(x.shape)}"
        )
    if not bool(x.isfinite().all()):
        raise ValueError(
            f"the state of shape {tuple(x.shape)} holds NaN or infinity, so it has no amplitude; check the model's "
            "dtype and the schedule's first time"
        )
    kept, dims = x.shape[: 1 + per_channel], x.shape[1 + per_channel :]
    ordered = x.reshape(*kept, math.prod(dims)).sort(dim=-1).values
    return _quantile(ordered, LOW), _quantile(ordered, HIGH)


def _quantile(ordered: Tensor, q: float) -> Tensor:
    """ordered (..., n) ascending -> (...) float64."""
    last = ordered.shape[-1] - 1
    below = math.floor(q * last)
    first, second = (ordered[..., min(k, last)].double() for k in (below, below + 1))
    return torch.lerp(first, second, q * last - below)


@dataclass(frozen=True, eq=False)
class Calibration:
    """The teacher's amplitudes along its grid, and the affine map that gives them to a student's state.

    times:          (N+1,) the teacher's strictly decreasing grid, in [0, 1].
    low, high:      its mean 5 % and 95 % quantiles there, (N+1,), or (N+1, C) for a table of each channel.
    last_step_only: change the state before the last network call and before no other.
    provenance:     what made it: model and weights hash, teacher, solver, samples, seed, versions.
    Raises ValueError when the values are not finite, the shapes differ, or low exceeds high.
    """

    times: Tensor
    low: Tensor
    high: Tensor
    last_step_only: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("times", "low", "high"):
            value = torch.as_tensor(
                getattr(self, name), dtype=torch.float64
            ).clone()  # nobody else's to change
            object.__setattr__(self, name, value)
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name} of a calibration must be finite numbers")
        times, shape = self.times, tuple(self.low.shape)
        if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()):
            raise ValueError(
                "times of a calibration must be a teacher's grid: two or more, strictly decreasing"
            )
        if times[0] > 1 or times[-1] < 0:
            raise ValueError(
                f"times of a calibration must be in [0, 1], got {float(times[0])} to {float(times[-1])}"
            )
        if len(shape) not in (1, 2) or shape[0] != len(times) or shape != tuple(self.high.shape):
            raise ValueError(
                f"low and high of a calibration must be ({len(times)},) or ({len(times)}, C), a row for each time, "
                f"got {shape} and {tuple(self.high.shape)}"
            )
        if bool((self.low > self.high).any()):
            raise ValueError("low of a calibration must not exceed high")

    @property
    def per_channel(self) -> bool:
        """Whether every channel has a table of its own."""
        return self.low.ndim == 2

    def __call__(self, x: Tensor, t: Tensor, is_last: bool) -> Tensor:
        """x (M, *E) at t (M,) or () -> a x + b, whose quantiles are the table's at t. is_last: the last network call.

        A sample with no spread is only shifted, to the middle of the table's range. ValueError when t is outside the
        grid, x has other channels than the table, or x is not finite.
        """
        if self.last_step_only and not is_last:
            return x
        low, high = self.at(torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(len(x)))
        if self.per_channel and (x.ndim < 2 or x.shape[1] != low.shape[1]):
            raise ValueError(
                f"the calibration has tables of {low.shape[1]} channels, the state is {tuple(x.shape)}"
            )
        q_low, q_high = amplitude(x, self.per_channel)
        spread = q_high - q_low
        flat = (
            spread <= (high - low) * torch.finfo(x.dtype).eps
        )  # what is left to stretch is rounding error
        a = torch.where(flat, 1.0, (high - low) / torch.where(flat, 1.0, spread))
        b = torch.where(flat, (low + high) / 2 - (q_low + q_high) / 2, low - a * q_low)
        a, b = (
            value.to(x.dtype).reshape(*value.shape, *[1] * (x.ndim - value.ndim))
            for value in (a, b)
        )
        return a * x + b

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t (M,) float64 -> low and high there, (M,) or (M, C), on t's device.

        Linear in t between two nodes: the times of hand-made schedules need not be on the teacher's grid.
        """
        times, low, high = (value.to(t.device) for value in (self.times, self.low, self.high))
        first, last = float(times[0]), float(times[-1])
        outside = (
            (t > first + 1e-9) | (t < last - 1e-9) | t.isnan()
        )  # the same time computed twice may differ so much
        if bool(outside.any()):
            raise ValueError(
                f"the calibration has amplitudes for t = {first:.6g} to {last:.6g}, asked for "
                f"t = {float(t[outside][0]):.6g}; calibrate along a noise schedule that covers this time "
                "(oss-exp task=calibrate)"
            )
        right = torch.searchsorted(-times, -t).clamp(1, len(times) - 1)
        weight = ((times[right - 1] - t) / (times[right - 1] - times[right])).clamp(0, 1)
        weight = weight.reshape(-1, *[1] * (low.ndim - 1))
        return torch.lerp(low[right - 1], low[right], weight), torch.lerp(
            high[right - 1], high[right], weight
        )

    def check(self, model_fingerprint: str, model_name: str, grid: Tensor) -> None:
        """ValueError when this was made for other weights, or for another teacher's grid (N+1,)."""
        made_for = self.provenance.get("model")
        made_for = made_for if isinstance(made_for, Mapping) else {}
        if made_for.get("sha256") != model_fingerprint:
            raise ValueError(
                f"the calibration was made for model {made_for.get('name')!r} (weights "
                f"{str(made_for.get('sha256'))[:12]}), this run has {model_name!r} ({model_fingerprint[:12]}); choose "
                "that model, or make another with oss-exp task=calibrate"
            )
        if len(grid) != len(self.times) or not torch.allclose(
            grid.to(self.times), self.times, rtol=0, atol=1e-9
        ):
            raise ValueError(
                f"the calibration was made along a teacher of {len(self.times) - 1} steps from t = "
                f"{float(self.times[0]):.6g}, this run's has {len(grid) - 1} from {float(grid[0]):.6g}, or other "
                "times; choose that noise_schedule and num_teacher_steps, or make another with oss-exp task=calibrate"
            )

    def save(self, path: str | Path) -> Path:
        """Write JSON, whole or not at all."""
        record = {
            "format": FORMAT,
            "version": VERSION,
            "quantiles": [LOW, HIGH],
            "last_step_only": self.last_step_only,
            "times": self.times.tolist(),
            "low": self.low.tolist(),
            "high": self.high.tolist(),
            "provenance": dict(self.provenance),
        }
        return write_atomically(path, json.dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote. FileNotFoundError or ValueError names the file, the fault and the remedy."""
        path = Path(path)
        remedy = "make one with oss-exp task=calibrate"
        record = load_record(path, CalibrationRecord, "calibration", remedy, TABLE_LIMIT)
        try:
            times, low, high = (
                torch.tensor(x, dtype=torch.float64)
                for x in (record.times, record.low, record.high)
            )
            return cls(times, low, high, record.last_step_only, record.provenance)
        except ValueError as error:
            raise ValueError(f"calibration {path} is damaged: {error}; {remedy}") from None
