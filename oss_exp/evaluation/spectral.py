"""The log-spectral distance of waveforms, which hears a change of loudness or timbre that PSNR does not see apart."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 1024  # samples, or as many as there are
FLOOR = 1e-10  # of a power, that of a sine of full scale being of order 1: 100 dB


def spectral_distance(waves: Tensor, reference: Tensor) -> Tensor:
    """waves, reference (B, channels, samples) -> (B,) float64 log-spectral distance in dB.

    The root mean square over frequencies of the difference of the two power spectra in dB, then the mean over frames
    and channels (Gray & Markel 1976), of Hann windows a quarter of a window apart.
    """
    size = min(WINDOW, waves.shape[-1])
    window = torch.hann_window(size, dtype=torch.float64, device=waves.device)

    def levels(x: Tensor) -> Tensor:
        """(B * channels, frequencies, frames) dB."""
        flat = x.double().flatten(0, 1)
        spectrum = torch.stft(
            flat, size, max(size // 4, 1), window=window, center=False, return_complex=True
        )
        return 10 * ((spectrum.abs() / window.sum()) ** 2 + FLOOR).log10()

    difference = (levels(waves) - levels(reference)).square().mean(dim=1).sqrt()
    return difference.unflatten(0, waves.shape[:2]).flatten(1).mean(dim=1)
