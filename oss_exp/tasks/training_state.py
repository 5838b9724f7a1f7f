"""What a training keeps to go on from: the record of a checkpoint, and the one place where such a file is read.

A checkpoint may come from anybody. Only tensors, numbers and texts are read from it, what is not named here is left out
(Lightning's callbacks would remove the files that a checkpoint names), and what does not fit the network is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Len
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from oss_exp.files import Numbers, Record
from oss_exp.validation import describe

SCALERS = ("MixedPrecision", "FSDPPrecision")  # what Lightning keeps of float16's loss scale


class Progress(Record):
    """How far a training has come; of finetuning also the loss on its first examples before and after."""

    losses: Numbers
    seconds: float
    loss_before: float | None = None
    loss_after: float | None = None
    peak_bytes: int = 0


class TrainingState(BaseModel):
    """A checkpoint: the weights, AdamW's two averages of each, the rate's place on its way, the progress."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True, extra="ignore")

    state_dict: dict[str, Tensor]
    optimizer_states: Annotated[list[dict[str, Any]], Len(1, 1)]
    lr_schedulers: Annotated[
        list[dict[str, bool | int | float | list[float | None] | None]], Len(1, 1)
    ]
    progress: Progress


def prune(checkpoint: dict[str, Any]) -> None:
    """Take out of a checkpoint all that a `TrainingState` has not, and what a rate's schedule does not go on from."""
    for key in set(checkpoint) - {*TrainingState.model_fields, *SCALERS}:
        del checkpoint[key]
    kept = ("base_lrs", "last_epoch", "_last_lr", "_step_count", "lr_lambdas")
    for rate in checkpoint["lr_schedulers"]:
        for key in set(rate) - {*kept}:
            del rate[key]


def check_state(
    path: Path, own: Mapping[str, Tensor], trained: list[Tensor], partial: bool
) -> TrainingState:
    """Read a checkpoint; ValueError with the file's name where it is none, or of another network.

    own: the network's state; trained: the weights that the optimizer changes; partial: a part of the state is enough.
    """
    name, remedy = (
        f"checkpoint {path}",
        "give one that this training, or one of the same network, has written",
    )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error}") from None
    except Exception as error:  # whatever damage leads to
        reason = str(error).strip().partition("\n")[0][:160]
        raise ValueError(
            f"{name} is none of a training, or is damaged ({reason}); {remedy}"
        ) from None
    try:
        state = TrainingState.model_validate(found)
    except ValidationError as error:
        reason = describe(error, given=found if isinstance(found, Mapping) else None)
        raise ValueError(f"{name} is none of a training: {reason}; {remedy}") from None

    # The same network, and an optimizer of its weights.
    weights = {key: tensor.shape for key, tensor in state.state_dict.items()}
    wanted = {key: tensor.shape for key, tensor in own.items() if not partial or key in weights}
    if wrong := [key for key in {**wanted, **weights} if weights.get(key) != wanted.get(key)]:
        raise ValueError(f"{name} is of another network: {wrong[0]} is {_shape(weights, wrong[0])} there and "
                         f"{_shape(wanted, wrong[0])} here; {remedy}")  # fmt: skip
    averages = state.optimizer_states[0].get("state")
    if not isinstance(averages, Mapping):
        raise ValueError(f"{name} has no averages of an optimizer; {remedy}")
    for key, values in averages.items():
        tensors = values if isinstance(values, Mapping) else {}
        shape = (
            trained[key].shape if isinstance(key, int) and key < len(trained) else None
        )  # or names, where sharded
        for part in ("exp_avg", "exp_avg_sq"):
            if not isinstance(tensors.get(part), Tensor) or shape not in (
                None,
                tensors[part].shape,
            ):
                raise ValueError(
                    f"{name} has no `{part}` of weight {key} of this network; {remedy}"
                )
    return state


def _shape(shapes: Mapping[str, torch.Size], key: str) -> str:
    return str(tuple(shapes[key])) if key in shapes else "missing"
