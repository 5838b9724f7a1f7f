"""Read the checkpoints of a training; nothing else in the package does.

A checkpoint may come from anybody. Only tensors, numbers and texts are read from it, entries that
are not fields of `TrainingState` are dropped (Lightning's callbacks would remove the files that a
checkpoint names), and a checkpoint that does not fit the network is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Len
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from torch.optim import Optimizer

from oss_exp.files import Numbers, Record
from oss_exp.validation import describe

SCALERS = ("MixedPrecision", "FSDPPrecision")  # Lightning's keys of float16's loss scale
RATE_KEYS = ("base_lrs", "last_epoch", "_last_lr", "_step_count", "lr_lambdas")


class Progress(Record):
    """The progress of a training.

    Attributes:
        losses: The loss of every step.
        seconds: Time that training has taken.
        loss_before: Of finetuning, the loss on its first examples before training.
        loss_after: The same after training.
        peak_bytes: The largest memory in use.
    """

    losses: Numbers
    seconds: float
    loss_before: float | None = None
    loss_after: float | None = None
    peak_bytes: int = 0


class TrainingState(BaseModel):
    """A checkpoint: weights, the averages of an optimizer, the learning rate's place, progress."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True, extra="ignore")

    state_dict: dict[str, Tensor]
    optimizer_states: Annotated[list[dict[str, Any]], Len(1, 1)]
    lr_schedulers: Annotated[
        list[dict[str, bool | int | float | list[float | None] | None]], Len(1, 1)
    ]
    progress: Progress


def prune(checkpoint: dict[str, Any]) -> None:
    """Remove what `TrainingState` does not have, and what a learning rate does not resume from."""
    for key in set(checkpoint) - {*TrainingState.model_fields, *SCALERS}:
        del checkpoint[key]
    for rate in checkpoint["lr_schedulers"]:
        for key in set(rate) - {*RATE_KEYS}:
            del rate[key]


def check_state(
    path: Path, state_dict: Mapping[str, Tensor], optimizer: Optimizer, partial: bool
) -> TrainingState:
    """Read a checkpoint and check that it fits.

    Args:
        path: Path of the checkpoint.
        state_dict: State of the network that resumes.
        optimizer: A new optimizer of its weights.
        partial: Accept a part of the state.

    Raises:
        ValueError: With the file's name, if it is not a checkpoint, or one of another network.
    """
    name = f"checkpoint {path}"
    remedy = "give one that this training, or one of the same network, has written"
    state = _read(path, name, remedy)

    # The same network.
    shapes = _shapes(state.state_dict)
    expected = _shapes(state_dict)
    for key in {**expected, **shapes}:
        if partial and key not in shapes:
            continue
        if shapes.get(key) != expected.get(key):
            raise ValueError(
                f"{name} is of another network: {key} is {_shape(shapes, key)} there and "
                f"{_shape(expected, key)} here; {remedy}"
            )

    # An optimizer of its weights; sharded checkpoints have names instead of numbers.
    averages = state.optimizer_states[0].get("state")
    if not isinstance(averages, Mapping):
        raise ValueError(f"{name} has no averages of an optimizer; {remedy}")
    trained = []  # each weight's shape, and the averages that its optimizer has of it
    for group in optimizer.param_groups:
        parts = ("exp_avg", "exp_avg_sq") if "betas" in group else ("momentum_buffer",)
        trained += [(weight.shape, parts) for weight in group["params"]]

    for key, values in averages.items():
        tensors = values if isinstance(values, Mapping) else {}
        has_weight = isinstance(key, int) and key < len(trained)
        shape, parts = trained[key] if has_weight else (None, trained[0][1])

        for part in parts:
            tensor = tensors.get(part)
            if not isinstance(tensor, Tensor) or shape not in (None, tensor.shape):
                raise ValueError(
                    f"{name} has no `{part}` of weight {key} of this network; {remedy}"
                )
    return state


def _read(path: Path, name: str, remedy: str) -> TrainingState:
    """Read a checkpoint, and check the types of its fields."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error}") from None
    except Exception as error:  # whatever damage leads to
        reason = str(error).strip().partition("\n")[0][:160]
        raise ValueError(
            f"{name} is not from a training, or is damaged ({reason}); {remedy}"
        ) from None
    try:
        return TrainingState.model_validate(content)
    except ValidationError as error:
        reason = describe(error, given=content if isinstance(content, Mapping) else None)
        raise ValueError(f"{name} is not from a training: {reason}; {remedy}") from None


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in tensors.items()}


def _shape(shapes: Mapping[str, torch.Size], key: str) -> str:
    return str(tuple(shapes[key])) if key in shapes else "missing"
