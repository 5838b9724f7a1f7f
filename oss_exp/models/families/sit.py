"""Run the published SiT networks (Ma et al. 2024, arXiv 2401.08740): DiT with flow matching."""

from __future__ import annotations

from torch import Tensor

from oss_exp.models.families.dit import PublishedDiT


class SiT(PublishedDiT):
    """A public SiT, which predicts the velocity v = eps - x0.

    Its clock s = 1 - t runs from noise at 0 to data at 1, and its answer is dx / ds =
    x0 - eps. Its files have the keys of DiT.
    """

    FILES = ("SiT-XL-2-256x256.pt", "SiT-XL-2-256.pt")

    def forward(self, x: Tensor, clock: Tensor, classes: Tensor) -> Tensor:
        """Return v (M, C, h, w) at x (M, C, h, w).

        Args:
            x: Latents (M, C, h, w).
            clock: Canonical times (M,).
            classes: Classes (M,), -1 for none.
        """
        return -super().forward(x, 1 - clock, classes)
