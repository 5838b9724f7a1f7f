"""Schedules that others optimised for one large model and published as a list of noise levels.

A list of n + 1 levels makes n network calls. For another number of calls the list is
interpolated, with the logarithm of the level linear between neighbours, as Align Your
Steps does. The last level is where the optimisation stopped; samplers put 0 in its
place, and so does `nodes`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from oss_exp.checks import require_choice
from oss_exp.noise import EDMPath, NoiseSchedule


@dataclass(frozen=True)
class PublishedSchedule(NoiseSchedule):
    """A published list of noise levels.

    Attributes:
        tables: {name: positive levels from noise to data}.
        table: Name of one of the tables.

    Raises:
        ValueError: If no table has this name.
    """

    tables: ClassVar[Mapping[str, tuple[float, ...]]]

    table: str

    def __post_init__(self) -> None:
        require_choice(self.tables, table=self.table)

    def _times(self, num_steps: int) -> Tensor:
        levels = torch.tensor(self.tables[self.table], dtype=torch.float64)
        position = torch.arange(num_steps, dtype=torch.float64) * (len(levels) - 1) / num_steps
        index = position.long()
        ratio = levels[index + 1] / levels[index]
        # Exactly a level where the position is whole.
        return self._canonical(levels[index] * ratio ** (position - index))

    @abc.abstractmethod
    def _canonical(self, levels: Tensor) -> Tensor:
        """Return the canonical times of levels in the units of the tables."""


@dataclass(frozen=True)
class AlignYourSteps(PublishedSchedule):
    """Align Your Steps (arXiv 2404.14507), table 3: ten steps for one of four models.

    The levels are sigma / alpha. The tables are for Stable Diffusion (`sd15`, `sdxl`),
    Stable Video Diffusion (`svd`) and the first stage of DeepFloyd-IF (`deepfloyd_if`).
    `sd15_30` and `sdxl_30` are not by the authors: they are lists of 30 steps by
    Koitenshin (github.com/AUTOMATIC1111/stable-diffusion-webui, pull request 15751).

    Attributes:
        table: Name of one of these tables.
    """

    tables: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
        "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
        "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
        "deepfloyd_if": (
            *(160.41, 8.081, 3.315, 1.885, 1.207, 0.785),
            *(0.553, 0.293, 0.186, 0.030, 0.006),
        ),
        "sd15_30": (
            *(14.61, 11.22, 8.662, 6.636, 5.581, 4.713, 3.996, 3.514, 3.13, 2.788),
            *(2.483, 2.22, 1.977, 1.778, 1.613, 1.465, 1.314, 1.168, 1.034, 0.9167),
            *(0.807, 0.7115, 0.6225, 0.5316, 0.4538, 0.3754),
            *(0.2748, 0.2018, 0.1415, 0.06564, 0.02917),
        ),
        "sdxl_30": (
            *(14.61, 11.15, 8.525, 6.475, 5.426, 4.609, 3.896, 3.269, 2.746, 2.301),
            *(1.957, 1.673, 1.427, 1.231, 1.069, 0.9261, 0.8041, 0.6958, 0.6054, 0.5293),
            *(0.4674, 0.4134, 0.3619, 0.3098, 0.2653, 0.223),
            *(0.1763, 0.138, 0.1072, 0.05861, 0.02917),
        ),
    }

    table: Literal["sd15", "sdxl", "svd", "deepfloyd_if", "sd15_30", "sdxl_30"] = "sd15"

    def _canonical(self, levels: Tensor) -> Tensor:
        return EDMPath().canonical(levels)


@dataclass(frozen=True)
class OSSComfyUI(PublishedSchedule):
    """Optimal Stepsize (arXiv 2503.21774) as shipped with ComfyUI.

    There are 10 steps for FLUX, 20 for Wan 2.1 and 40 for Chroma. The levels are flow
    times that include the model's resolution shift. They are the numbers of the node
    OptimalStepsScheduler (github.com/comfyanonymous/ComfyUI,
    comfy_extras/nodes_optimalsteps.py).

    Attributes:
        table: "flux", "wan" or "chroma".
    """

    tables: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "flux": (
            *(0.9968, 0.9886, 0.9819, 0.975, 0.966, 0.9471),
            *(0.9158, 0.8287, 0.5512, 0.2808, 0.001),
        ),
        "wan": (
            *(1.0, 0.997, 0.995, 0.993, 0.991, 0.989, 0.987, 0.985, 0.98, 0.975),
            *(0.973, 0.968, 0.96, 0.946, 0.927, 0.902, 0.864, 0.776, 0.539, 0.208, 0.001),
        ),
        "chroma": (
            *(0.992, 0.99, 0.988, 0.985, 0.982, 0.978, 0.973, 0.968, 0.961, 0.953),
            *(0.943, 0.931, 0.917, 0.9, 0.881, 0.858, 0.832, 0.802, 0.769, 0.731),
            *(0.69, 0.646, 0.599, 0.55, 0.501, 0.451, 0.402, 0.355, 0.311, 0.27),
            *(0.232, 0.199, 0.169, 0.143, 0.12, 0.101, 0.084, 0.07, 0.058, 0.048, 0.001),
        ),
    }

    table: Literal["flux", "wan", "chroma"] = "flux"

    def _canonical(self, levels: Tensor) -> Tensor:
        return levels
