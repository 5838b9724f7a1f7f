"""PSNR per image or video, and the intervals that make means comparable.

Pixels are in [0, 1], decoded and clipped; the reference is the teacher's image from the same noise and condition.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from oss_exp.evaluation.pictures import frames_of

CEILING = 120.0  # dB; stands for images that are equal to float32 precision, where the ratio has no finite value


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """images, reference (B, ...) in [0, 1] -> (B,) 10 log10(1 / MSE) in dB, at most 120.

    Of videos (B, C, F, H, W) it is the mean over their frames. Of waveforms (B, C, samples), which are not clipped, it
    is against full scale, -1 to 1: a peak of 1, as for pixels.
    """
    if images.ndim == 5:
        return psnr(frames_of(images), frames_of(reference)).unflatten(0, (len(images), -1)).mean(1)
    dims = tuple(range(1, images.ndim))
    value = peak_signal_noise_ratio(
        images.double(), reference.double(), 1.0, dim=dims, reduction="none"
    )
    return value.clamp(max=CEILING)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval (Student's t); one value has no interval, low and high are None."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: np.ndarray) -> Interval:
        """values (n,), n >= 1."""
        mean, n = float(np.mean(values)), len(values)
        if n == 1:
            return cls(mean, None, None, 1)
        half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
        return cls(mean, mean - half, mean + half, n)

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)

    def __str__(self) -> str:
        half = "" if self.high is None else f" ± {self.high - self.mean:.2f}"
        return f"{self.mean:.2f}{half}"
