"""SiT-XL/2 as it is published (Ma et al. 2024, arXiv 2401.08740): DiT's network, trained by flow matching."""

from __future__ import annotations

from torch import Tensor

from oss_exp.models.families.dit import PublishedDiT


class SiT(PublishedDiT):
    """x (M, C, h, w), clock (M,) in [0, 1], 1 being noise, classes (M,), -1 for none -> v = eps - x0.

    Its own clock s = 1 - t runs from noise at 0 to data at 1, and what it says is dx / ds = x0 - eps. The keys of its
    files are DiT's.
    """

    FILES = ("SiT-XL-2-256x256.pt", "SiT-XL-2-256.pt")

    def forward(self, x: Tensor, clock: Tensor, classes: Tensor) -> Tensor:
        return -super().forward(x, 1 - clock, classes)
