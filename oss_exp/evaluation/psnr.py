"""PSNR for each image or video, and confidence intervals of means.

Pixels are in [0, 1], decoded and clipped. The reference is the teacher's image from the
same noise and condition.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from oss_exp.evaluation.pictures import frames_of

CEILING = 120.0  # dB; reported for images that are equal to float32 precision


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each sample, 10 log10(1 / MSE), in dB.

    The PSNR of a video is the mean over its frames. Waveforms (B, C, samples) are not
    clipped; their peak is 1, the full scale from -1 to 1.

    Args:
        images: Images (B, C, H, W), videos (B, C, F, H, W) or waveforms, in [0, 1].
        reference: The same shape.

    Returns:
        Shape (B,), float64, at most 120.
    """
    if images.ndim == 5:
        frames = psnr(frames_of(images), frames_of(reference))
        return frames.unflatten(0, (len(images), -1)).mean(1)

    dims = tuple(range(1, images.ndim))
    value = peak_signal_noise_ratio(
        images.double(), reference.double(), 1.0, dim=dims, reduction="none"
    )
    return value.clamp(max=CEILING)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval.

    Attributes:
        mean: The mean.
        low: Lower end of the interval; None where n is 1.
        high: Upper end of the interval; None where n is 1.
        n: Number of values.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: np.ndarray) -> Interval:
        """Return the mean of values (n,), n >= 1, with Student's t interval."""
        mean, n = float(np.mean(values)), len(values)
        if n == 1:
            return cls(mean, None, None, 1)
        half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
        return cls(mean, mean - half, mean + half, n)

    @property
    def half(self) -> float | None:
        """Half the width of the interval; None where there is none."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the fields by name, as a run's records store them."""
        return asdict(self)

    def __str__(self) -> str:
        half = "" if self.high is None else f" ± {self.high - self.mean:.2f}"
        return f"{self.mean:.2f}{half}"
