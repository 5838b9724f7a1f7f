"""The log-spectral distance of waveforms.

It detects changes of loudness and timbre that PSNR does not separate.
"""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 1024  # samples; shorter waveforms use one window
FLOOR = 1e-10  # least power, where a sine of full scale has about 1: 100 dB of range


def spectral_distance(waves: Tensor, reference: Tensor) -> Tensor:
    """Return the log-spectral distance between waveforms, in dB.

    It is the root mean square over frequencies of the difference between the two power
    spectra in dB, averaged over frames and channels (Gray & Markel 1976). Frames are
    Hann windows, a quarter of a window apart.

    Args:
        waves: Waveforms, shape (B, channels, samples).
        reference: Waveforms of the same shape.

    Returns:
        One distance for each sample, shape (B,), float64.
    """
    size = min(WINDOW, waves.shape[-1])
    window = torch.hann_window(size, dtype=torch.float64, device=waves.device)

    def levels(x: Tensor) -> Tensor:
        """Return the levels in dB, shape (B * channels, frequencies, frames)."""
        flat = x.double().flatten(0, 1)
        spectrum = torch.stft(
            flat, size, max(size // 4, 1), window=window, center=False, return_complex=True
        )
        return 10 * ((spectrum.abs() / window.sum()) ** 2 + FLOOR).log10()

    difference = (levels(waves) - levels(reference)).square().mean(dim=1).sqrt()
    return difference.unflatten(0, waves.shape[:2]).flatten(1).mean(dim=1)
