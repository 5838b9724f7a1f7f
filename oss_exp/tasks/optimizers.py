"""Muon for the matrices and kernels of a network's blocks beside AdamW for its other weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

SPEED = 2.0  # Muon's learning rate is so many times AdamW's
DECAY = 0.01  # of the weights, as AdamW's default


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices and kernels of repeated blocks, AdamW for all other weights.

    Muon (https://kellerjordan.github.io/posts/muon) makes the momentum of a matrix orthogonal; the
    kernel of a convolution is the matrix (out, in * height * width). Its steps are scaled to the
    size of AdamW's (arXiv 2502.16982), so one learning rate serves both. First and last layers and
    convolutions of single channels stay with AdamW.

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
                "task.optimizer=muon is for networks of repeated blocks: this one has no matrix in "
                "a block; use adamw"
            )
        self.adamw = torch.optim.AdamW(others, lr=learning_rate, weight_decay=DECAY)
        with _as_matrices(matrices, {}):
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
        with _as_matrices(self.muon.param_groups[0]["params"], self.state):
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
    """Return matrices and kernels of numbered modules, as of repeated blocks, and all others."""
    matrices, others = [], []
    for name, parameter in parameters:
        is_repeated = any(part.isdigit() for part in name.split("."))
        is_kernel = parameter.ndim > 2 and parameter.shape[1] > 1
        is_matrix = parameter.ndim == 2 or is_kernel
        (matrices if is_repeated and is_matrix else others).append(parameter)
    return matrices, others


@contextmanager
def _as_matrices(weights: list[Tensor], state: Mapping[Tensor, dict[str, Any]]) -> Iterator[None]:
    """Give kernels, their gradients and momenta two axes meanwhile, as torch's Muon needs."""
    kernels = [(weight, weight.shape) for weight in weights if weight.ndim > 2]
    for kernel, _ in kernels:
        _reshape(kernel, (len(kernel), -1), state)
    try:
        yield
    finally:
        for kernel, shape in kernels:
            _reshape(kernel, shape, state)


def _reshape(weight: Tensor, shape: Sequence[int], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Reshape a weight, its gradient and its momentum in place."""
    gradient, weight.grad = weight.grad, None
    weight.data = weight.data.reshape(shape)
    if gradient is not None:
        weight.grad = gradient.reshape(shape)
    if weight in state:
        state[weight]["momentum_buffer"] = state[weight]["momentum_buffer"].reshape(shape)
