"""Run a published network, from a public checkpoint in any of its layouts, in canonical time."""

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
    """A size of `Published`."""

    event_shape: Sequence[int]
    num_classes: int | None
    checkpoint: str
    backbone: Callable[..., nn.Module]
    decoder: Callable[..., nn.Module]


class Published(Network):
    """A network that somebody else trained, at one of its sizes.

    The backbone's class knows the names of the public files (`FILES`) and the
    translation of their keys (`translate`, `to_public`).

    Args:
        name: Name of the model.
        size: Name of the size.
        sizes: What differs, by name: `backbone` and `decoder` (partial: only the chosen
            ones are built), `event_shape`, `num_classes`, `checkpoint`. "full" is the
            public network; "tiny" has the same layers, small.
        parameterization: As in `Network`.
        guidance: As in `Network`.
        micro_batch: As in `Network`.
        dtype: As in `Network`.
        checkpoint: A file, by its path or by the name of a shipped one, a folder, or a
            hub id; "random": reproducible random weights, to try all but the pictures;
            "untrained": as initialised; None: that of the size.
        source: URL of the public checkpoint, quoted in the error when it is missing.
        weights_set: As in `Network`.
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
        if checkpoint not in ("random", UNTRAINED):  # fail before large networks are built
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
        """Load the weights, and return a hash of them that is the same in every layout."""
        if checkpoint == "random":
            randomise(self.backbone, torch.Generator().manual_seed(0))
        else:
            self._fill(Path(checkpoint), self.backbone.translate)
        return digest(self.backbone.state_dict())
