"""Amplitude calibration: give a student's state the range of values that the teacher's has.

In few steps the range drifts. The 5 % and 95 % quantiles of the teacher at each node of
its grid, averaged over samples, are the target; before a network call one affine map a
sample restores them (Optimal Stepsize, arXiv 2503.21774, section 3.4). Legend: N+1
teacher nodes, M rows, *E event dims, C channels (the first of E). Times are canonical
(1 noise, 0 data).
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
    """The file of a `Calibration`; `quantiles` are those that `low` and `high` hold."""

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
    def _check_quantiles(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value != (LOW, HIGH):
            raise ValueError(f"must be {[LOW, HIGH]}, got {list(value)}")
        return value


def amplitude(x: Tensor, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Return the 5 % and 95 % quantiles of the elements of each sample, or of each channel.

    They are linear between two elements, as numpy's default, and exact at any size
    (torch.quantile refuses large tensors).

    Args:
        x: (M, *E).
        per_channel: Whether each channel has its own quantiles.

    Returns:
        Two tensors (M,), or (M, C) if per_channel, float64.

    Raises:
        ValueError: If x holds NaN or infinity.
    """
    # Check.
    if x.ndim < 1 + per_channel:
        raise ValueError(
            f"an amplitude per {'channel' if per_channel else 'sample'} has no axis in "
            f"{tuple(x.shape)}"
        )

    if not bool(x.isfinite().all()):
        raise ValueError(
            f"the state of shape {tuple(x.shape)} holds NaN or infinity, so it has no amplitude; "
            "check the model's dtype and the schedule's first time"
        )

    # Quantiles.
    rows = x.shape[: 1 + per_channel]
    elements = math.prod(x.shape[1 + per_channel :])
    ordered = x.reshape(*rows, elements).sort(dim=-1).values
    return _quantile(ordered, LOW), _quantile(ordered, HIGH)


def _quantile(ordered: Tensor, q: float) -> Tensor:
    """Return the quantile (...), float64, of ascending values (..., n)."""
    last = ordered.shape[-1] - 1
    index = math.floor(q * last)
    low = ordered[..., index].double()
    high = ordered[..., min(index + 1, last)].double()
    return torch.lerp(low, high, q * last - index)


@dataclass(frozen=True, eq=False)
class Calibration:
    """The teacher's amplitudes along its grid, as an affine map that restores them in a student.

    Attributes:
        times: (N+1,) the teacher's grid, strictly decreasing in [0, 1].
        low: The teacher's mean 5 % quantiles there, (N+1,), or (N+1, C) for a table per
            channel.
        high: Its mean 95 % quantiles, of the same shape.
        last_step_only: Whether only the state before the last network call is changed.
        provenance: Model and hash of its weights, teacher, solver, samples, seed and
            versions.

    Raises:
        ValueError: If the values are not finite, the shapes differ, or low exceeds
            high.
    """

    times: Tensor
    low: Tensor
    high: Tensor
    last_step_only: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Copies, which the caller cannot change.
        for name in ("times", "low", "high"):
            value = torch.as_tensor(getattr(self, name), dtype=torch.float64).clone()
            object.__setattr__(self, name, value)
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name} of a calibration must be finite numbers")

        # Times.
        times = self.times
        if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()):
            raise ValueError(
                "times of a calibration must be a teacher's grid: two or more, strictly decreasing"
            )

        if times[0] > 1 or times[-1] < 0:
            raise ValueError(
                "times of a calibration must be in [0, 1], "
                f"got {float(times[0])} to {float(times[-1])}"
            )

        # Quantiles.
        shape = tuple(self.low.shape)
        if len(shape) not in (1, 2) or shape[0] != len(times) or shape != tuple(self.high.shape):
            raise ValueError(
                f"low and high of a calibration must be ({len(times)},) or ({len(times)}, C), "
                f"a row for each time, got {shape} and {tuple(self.high.shape)}"
            )

        if bool((self.low > self.high).any()):
            raise ValueError("low of a calibration must not exceed high")

    @property
    def per_channel(self) -> bool:
        """True where every channel has its own table."""
        return self.low.ndim == 2

    def __call__(self, x: Tensor, t: Tensor, is_last: bool) -> Tensor:
        """Return the state a x + b whose quantiles are the table's at t.

        A sample without spread is only shifted, to the middle of the table's range.

        Args:
            x: (M, *E).
            t: (M,) or ().
            is_last: Whether the state is that before the last network call.

        Raises:
            ValueError: If t is outside the grid, x has other channels than the table,
                or x is not finite.
        """
        if self.last_step_only and not is_last:
            return x

        # Target and present quantiles.
        t = torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(len(x))
        low, high = self.at(t)
        if self.per_channel and (x.ndim < 2 or x.shape[1] != low.shape[1]):
            raise ValueError(
                f"the calibration has tables of {low.shape[1]} channels, "
                f"the state is {tuple(x.shape)}"
            )
        q_low, q_high = amplitude(x, self.per_channel)

        # The map. A spread of the size of the rounding error is not stretched.
        spread = q_high - q_low
        flat = spread <= (high - low) * torch.finfo(x.dtype).eps
        a = torch.where(flat, 1.0, (high - low) / torch.where(flat, 1.0, spread))
        b = torch.where(flat, (low + high) / 2 - (q_low + q_high) / 2, low - a * q_low)
        shape = (*a.shape, *[1] * (x.ndim - a.ndim))
        return a.to(x.dtype).reshape(shape) * x + b.to(x.dtype).reshape(shape)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return low and high at times t (M,), float64: (M,) or (M, C) on t's device.

        They are linear in t between two nodes, because the times of hand-made schedules
        need not be on the teacher's grid.

        Raises:
            ValueError: If a time is outside the grid.
        """
        times = self.times.to(t.device)
        low = self.low.to(t.device)
        high = self.high.to(t.device)

        # Check, up to the rounding error of a time.
        first = float(times[0])
        last = float(times[-1])
        outside = (t > first + 1e-9) | (t < last - 1e-9) | t.isnan()
        if bool(outside.any()):
            raise ValueError(
                f"the calibration has amplitudes for t = {first:.6g} to {last:.6g}, "
                f"asked for t = {float(t[outside][0]):.6g}; "
                "calibrate along a noise schedule that covers this time (oss-exp task=calibrate)"
            )

        # Interpolate.
        right = torch.searchsorted(-times, -t).clamp(1, len(times) - 1)
        weight = ((times[right - 1] - t) / (times[right - 1] - times[right])).clamp(0, 1)
        weight = weight.reshape(-1, *[1] * (low.ndim - 1))
        low_at_t = torch.lerp(low[right - 1], low[right], weight)
        high_at_t = torch.lerp(high[right - 1], high[right], weight)
        return low_at_t, high_at_t

    def check(self, model_fingerprint: str, model_name: str, grid: Tensor) -> None:
        """Raise ValueError if this was made for other weights or another teacher's grid.

        Args:
            model_fingerprint: SHA-256 of the run's weights.
            model_name: Name of the run's model, quoted in the message.
            grid: (N+1,) the run's teacher grid.
        """
        # Model.
        model = self.provenance.get("model")
        if not isinstance(model, Mapping):
            model = {}

        if model.get("sha256") != model_fingerprint:
            raise ValueError(
                f"the calibration was made for model {model.get('name')!r} "
                f"(weights {str(model.get('sha256'))[:12]}), this run has {model_name!r} "
                f"({model_fingerprint[:12]}); "
                "choose that model, or make another with oss-exp task=calibrate"
            )

        # Grid.
        has_length = len(grid) == len(self.times)
        if not has_length or not torch.allclose(grid.to(self.times), self.times, rtol=0, atol=1e-9):
            raise ValueError(
                f"the calibration was made along a teacher of {len(self.times) - 1} steps from "
                f"t = {float(self.times[0]):.6g}, this run's has {len(grid) - 1} from "
                f"{float(grid[0]):.6g}, or other times; "
                "choose that noise_schedule and num_teacher_steps, "
                "or make another with oss-exp task=calibrate"
            )

    def save(self, path: str | Path) -> Path:
        """Write the calibration as JSON, whole or not at all, and return its path."""
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
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: If the file is missing.
            ValueError: If it is damaged. The message names the file, the fault and the
                remedy.
        """
        path = Path(path)
        remedy = "make one with oss-exp task=calibrate"
        record = load_record(path, CalibrationRecord, "calibration", remedy, TABLE_LIMIT)
        try:
            return cls(
                times=torch.tensor(record.times, dtype=torch.float64),
                low=torch.tensor(record.low, dtype=torch.float64),
                high=torch.tensor(record.high, dtype=torch.float64),
                last_step_only=record.last_step_only,
                provenance=record.provenance,
            )
        except ValueError as error:
            raise ValueError(f"calibration {path} is damaged: {error}; {remedy}") from None
