"""Muon for the matrices of a network's blocks beside AdamW for its other weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

SPEED = 2.0  # Muon's learning rate is so many times AdamW's
DECAY = 0.01  # of the weights, as AdamW's default


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices of repeated blocks, AdamW for all other weights.

    Muon (https://kellerjordan.github.io/posts/muon) makes the momentum of a matrix orthogonal. Its
    steps are scaled to the size of AdamW's (arXiv 2502.16982), so one learning rate serves both.
    Kernels of convolutions, first and last layers stay with AdamW.

    Args:
        parameters: Named weights.
        learning_rate: AdamW's learning rate; Muon's is twice that.

    Raises:
        ValueError: If there is no matrix in a block, or torch has no Muon (before 2.9).
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], learning_rate: float):
        if not hasattr(torch.optim, "Muon"):
            raise ValueError("task.optimizer=muon needs torch 2.9 or newer; use adamw")
        matrices, others = split(parameters)
        if not matrices:
            raise ValueError(
                "task.optimizer=muon is for transformers: this network has no matrix in a block; "
                "use adamw"
            )
        self.adamw = torch.optim.AdamW(others, lr=learning_rate, weight_decay=DECAY)
        self.muon = torch.optim.Muon(
            matrices,
            lr=SPEED * learning_rate,
            weight_decay=DECAY,
            adjust_lr_fn="match_rms_adamw",
        )
        super().__init__([*self.adamw.param_groups, *self.muon.param_groups], {})
        self._share()

    def step(self, closure: Any = None) -> Any:
        """Take a step of both."""
        loss = None if closure is None else closure()
        self.adamw.step()
        self.muon.step()
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state of both."""
        super().load_state_dict(dict(state_dict))
        self._share()

    def _share(self) -> None:
        """Let both have this optimizer's groups and state, which a checkpoint holds."""
        self.adamw.param_groups = self.param_groups[:1]
        self.muon.param_groups = self.param_groups[1:]
        self.adamw.state = self.muon.state = self.state


def split(parameters: Iterable[tuple[str, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the matrices of numbered modules, as of repeated blocks, and all other parameters."""
    matrices, others = [], []
    for name, parameter in parameters:
        is_repeated = any(part.isdigit() for part in name.split("."))
        (matrices if is_repeated and parameter.ndim == 2 else others).append(parameter)
    return matrices, others
