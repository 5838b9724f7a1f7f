"""Networks whose condition is the number of a prompt; its encodings are looked up in tables.

Legend: B samples, P prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from oss_exp.files import sha256
from oss_exp.models.checkpoints.sets import Tensors
from oss_exp.models.checkpoints.weights import digest, randomise
from oss_exp.models.guidance import Guidance
from oss_exp.models.network import Dtype, Network
from oss_exp.models.parameterization import Parameterization
from oss_exp.velocity import BoundVelocity


class Prompted(Network):
    """A network whose condition is a prompt's number.

    Args:
        name: See `Network`, also for the arguments that are missing here.
        prompts: The prompts that conditions number.
        encoder_sha256: Hash of the text encoder, which also determines the velocity.
        backbone: Its attribute `network` is filled with weights; it knows the encodings of all
            prompts.
        checkpoint: File of the network's weights, or `random`.
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
        self.prompts = list(prompts)
        self.encoder_sha256 = encoder_sha256
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
        """Bind the numbers of prompts (B,) and guidance. Raises ValueError for other conditions."""
        if condition is None or condition.is_floating_point() or condition.ndim != 1:
            raise ValueError(
                f"{self.name} needs the numbers of prompts; set data=prompts data.prompts=FILE"
            )
        if not bool(((condition >= 0) & (condition < len(self.prompts))).all()):
            raise ValueError(
                f"{self.name} has {len(self.prompts)} prompts and is asked for number "
                f"{int(condition.max())}; set data=prompts data.prompts=FILE"
            )
        return (guidance or self.guidance).bind(self._velocity, condition, self.micro_batch)

    def _load(self, checkpoint: str) -> str:
        """Fill the network, and return a hash of it and of the text encoder."""
        network = self.backbone.network
        if checkpoint == "random":
            randomise(network, torch.Generator().manual_seed(0))
        else:
            self._fill(Path(checkpoint), _below_network)
        return sha256(f"{digest(network.state_dict())} {self.encoder_sha256}".encode())


def _below_network(tensors: Tensors) -> Tensors:
    """Return a network's tensors by the keys of the backbone around it."""
    return {f"network.{key}": value for key, value in tensors.items()}


class PromptedBackbone(nn.Module):
    """A network of diffusers with the encodings of prompts.

    Args:
        network: The network.
        **tables: Encodings (P + 1, ...) of all prompts, by name. The last one, which -1 selects,
            stands for no prompt.
    """

    def __init__(self, network: nn.Module, **tables: Tensor):
        super().__init__()
        self.network = network
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
