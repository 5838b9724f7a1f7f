"""Networks of prompts: a condition is a prompt's number, whose encodings are made once and looked up.

Legend: M rows, *E event dims, P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from oss_exp.files import sha256
from oss_exp.models.checkpoints.weights import digest, randomise
from oss_exp.models.guidance import Guidance
from oss_exp.models.network import Dtype, Network
from oss_exp.models.parameterization import Parameterization
from oss_exp.velocity import BoundVelocity


class Prompted(Network):
    """A network whose condition is a prompt's number.

    prompts:        those that conditions number.
    encoder_sha256: of the text encoder, which makes the velocity too.
    backbone:       around a `network`, not yet filled, and the encodings of all prompts.
    checkpoint:     the file of the network's weights, or `random`. weights_set: as Network's.
    """

    def __init__(
        self,
        name: str,
        prompts: Sequence[str],
        encoder_sha256: str,
        backbone: nn.Module,
        parameterization: Parameterization,
        event_shape: Sequence[int],
        decoder: nn.Module,
        guidance: Guidance,
        micro_batch: int,
        dtype: Dtype,
        checkpoint: str,
        weights_set: str | None = None,
    ):
        self.prompts, self.encoder_sha256 = list(prompts), encoder_sha256
        super().__init__(
            name=name,
            backbone=backbone,
            parameterization=parameterization,
            event_shape=event_shape,
            num_classes=None,
            decoder=decoder,
            guidance=guidance,
            micro_batch=micro_batch,
            dtype=dtype,
            checkpoint=checkpoint,
            weights_set=weights_set,
        )

    @property
    def num_conditions(self) -> int:
        return len(self.prompts)

    def velocity(self, condition: Tensor | None, guidance: Guidance | None = None) -> BoundVelocity:
        """condition: numbers of prompts (B,)."""
        if condition is None or condition.is_floating_point() or condition.ndim != 1:
            raise ValueError(
                f"{self.name} needs the numbers of prompts; set data=prompts data.prompts=FILE"
            )
        if not bool(((condition >= 0) & (condition < len(self.prompts))).all()):
            raise ValueError(
                f"{self.name} has {len(self.prompts)} prompts and is asked for number {int(condition.max())}; "
                "set data=prompts data.prompts=FILE"
            )
        return (guidance or self.guidance).bind(self._velocity, condition, self.micro_batch)

    def _load(self, checkpoint: str) -> str:
        """Fill the network; the hash is of it and the text encoder, for both make the velocity."""
        network = self.backbone.network
        if checkpoint == "random":
            randomise(network, torch.Generator().manual_seed(0))
        else:
            self._fill(
                Path(checkpoint),
                lambda tensors: {f"network.{key}": each for key, each in tensors.items()},
            )
        return sha256(f"{digest(network.state_dict())} {self.encoder_sha256}".encode())


class PromptedBackbone(nn.Module):
    """A network of diffusers and the encodings of prompts.

    tables: encodings (P + 1, ...) by name of all prompts and, where -1 finds it, of the one that stands for none.
    """

    def __init__(self, network: nn.Module, **tables: Tensor):
        super().__init__()
        self.network = network
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
