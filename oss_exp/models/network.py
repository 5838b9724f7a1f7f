"""A neural network behind canonical time: any backbone, any parameterization, weights from a safetensors file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from oss_exp.files import find_asset, load_asset
from oss_exp.models.base import Model
from oss_exp.models.guidance import Guidance
from oss_exp.models.parameterization import Parameterization
from oss_exp.solvers import BoundVelocity


class Network(Model):
    """backbone(x (M, *E), clock (M,), classes (M,), -1 for none) -> what `parameterization` says, at pixels in [-1, 1].

    checkpoint:  a safetensors file that `task=pretrain` wrote, by path or by the name it is shipped under; null: the
                 weights as initialised, for training.
    micro_batch: network rows evaluated at a time.
    """

    def __init__(
        self,
        name: str,
        backbone: nn.Module,
        parameterization: Parameterization,
        event_shape: Sequence[int],
        num_classes: int | None,
        guidance: Guidance,
        micro_batch: int,
        checkpoint: str | None,
    ):
        super().__init__()
        self.name, self.backbone, self.parameterization = name, backbone, parameterization
        self.path, self.event_shape, self.num_classes = parameterization.path, tuple(event_shape), num_classes
        self.guidance, self.micro_batch = guidance, micro_batch
        self.fingerprint = "untrained" if checkpoint is None else self._load(find_asset(checkpoint, "checkpoint"))
        self.eval().requires_grad_(False)

    def velocity(self, condition: Tensor | None, guidance: Guidance | None = None) -> BoundVelocity:
        if condition is not None and not bool(((condition >= 0) & (condition < (self.num_classes or 0))).all()):
            raise ValueError(f"{self.name} has {self.num_classes or 'no'} classes, got {condition.unique().tolist()}")
        return (guidance or self.guidance).bind(self._velocity, condition, self.micro_batch)

    def decode(self, x0: Tensor) -> Tensor:
        return ((x0 + 1) / 2).clamp(0, 1)

    def _velocity(self, x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        question, clock = self.parameterization.question(x, t)
        return self.parameterization.velocity(self.backbone(question, clock, classes), x, t)

    def _load(self, path: Path) -> str:
        """Every weight from the file, none left over; returns its SHA-256."""
        tensors, record = load_asset(path, "checkpoint")
        own = self.backbone.state_dict()
        wrong = [
            f"{key}: {shape(tensors.get(key))} in the file, {shape(own.get(key))} in the network"
            for key in sorted(own.keys() | tensors.keys())
            if shape(tensors.get(key)) != shape(own.get(key))
        ]
        if wrong:
            raise ValueError(
                f"checkpoint {path} is of another architecture than model={self.name}: {len(wrong)} weights differ, "
                f"first {wrong[0]}; choose the model it was trained as, or change model.backbone"
            )
        self.backbone.load_state_dict(tensors)
        return record["sha256"]


def shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))
