"""A published network: a public checkpoint, whatever its layout, behind canonical time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn

from oss_exp.models.checkpoints.weights import UNTRAINED, digest, locate, randomise
from oss_exp.models.guidance import Guidance
from oss_exp.models.network import Dtype, Network, at_size, build_part
from oss_exp.models.parameterization import Parameterization


class PublishedSize(TypedDict):
    """One of the sizes of `Published`."""

    event_shape: Sequence[int]
    num_classes: int | None
    checkpoint: str
    backbone: Callable[..., nn.Module]
    decoder: Callable[..., nn.Module]


class Published(Network):
    """A network that somebody else trained, at one of its sizes.

    sizes:      by name what differs: `backbone` and `decoder` (partial: only the chosen ones are built), `event_shape`,
                `num_classes`, `checkpoint`. `full` is the public one; `tiny` has the same layers, small.
    checkpoint: a file, by path or by the name it is shipped under, a folder or a hub id; `random`: reproducible random
                weights, to try all but the pictures; `untrained`: as initialised; null: that of the size.
    source:     where the public checkpoint is had, for the message when it is missing.
    weights_set: as Network's.

    The backbone's class says what the public files are called (`FILES`) and how their keys translate (`translate`,
    `to_public`).
    """

    def __init__(
        self,
        name: str,
        size: str,
        sizes: Mapping[str, PublishedSize],
        parameterization: Parameterization,
        guidance: Guidance,
        micro_batch: int,
        dtype: Dtype,
        checkpoint: str | None,
        source: str,
        weights_set: str | None = None,
    ):
        name, chosen = at_size(name, size, sizes), sizes[size]
        checkpoint = checkpoint or chosen["checkpoint"]
        if checkpoint not in (
            "random",
            UNTRAINED,
        ):  # a missing file is found before large networks are built
            checkpoint = str(locate(checkpoint, chosen["backbone"].func.FILES, source, own=True))
        super().__init__(
            name=name,
            decoder=build_part(sizes, size, "decoder"),
            backbone=build_part(sizes, size, "backbone"),
            parameterization=parameterization,
            event_shape=chosen["event_shape"],
            num_classes=chosen["num_classes"],
            guidance=guidance,
            micro_batch=micro_batch,
            dtype=dtype,
            checkpoint=checkpoint,
            weights_set=weights_set,
        )

    def _load(self, checkpoint: str) -> str:
        """The hash is of the weights themselves, so it is the same in every layout."""
        if checkpoint == "random":
            randomise(self.backbone, torch.Generator().manual_seed(0))
        else:
            self._fill(Path(checkpoint), self.backbone.translate)
        return digest(self.backbone.state_dict())
