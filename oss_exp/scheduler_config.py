"""The config file of a diffusers scheduler, checked before the scheduler is made from it.

Unchecked, a number in the file could ask for all memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, FailFast, Field
from typing_extensions import TypeAliasType

from oss_exp.files import Record, load_record

Whole = Annotated[int, Field(ge=1, le=100_000)]
Order = Annotated[int, Field(ge=1, le=10)]
Positive = Annotated[float, Field(gt=0)]
Exponent = Annotated[float, Field(ge=-10, le=10)]
Beta = Annotated[float, Field(ge=0, le=1)]
Betas = TypeAliasType(
    "Betas", Annotated[list[Beta], FailFast(), Field(min_length=1, max_length=100_000)]
)


class SchedulerConfig(Record):
    """The record of a scheduler_config.json, with ranges for the numbers that decide its times.

    Other fields are allowed and unchecked. A field that is missing has the default of
    diffusers.
    """

    model_config = ConfigDict(extra="allow")

    num_train_timesteps: Whole = 1000
    original_inference_steps: Whole = 50
    steps_offset: Annotated[int, Field(ge=0, le=100_000)] = 0
    stages: Order = 3
    solver_order: Order = 2
    predictor_order: Order = 2
    corrector_order: Order = 2
    beta_start: Beta = 1e-4
    beta_end: Beta = 0.02
    trained_betas: Betas | None = None
    sigma_min: Annotated[float, Field(ge=0)] | None = None
    sigma_max: Positive | Literal[False] | None = None
    sigma_data: Positive = 0.5
    rho: Positive = 7.0
    shift: Positive | None = None
    flow_shift: Positive | None = None
    snr_shift_scale: Positive = 3.0
    shift_terminal: Annotated[float, Field(gt=0, lt=1)] | Literal[False] | None = None
    base_shift: Exponent | None = None
    max_shift: Exponent | None = None
    base_image_seq_len: Annotated[int, Field(ge=1, le=10**9)] | None = None
    max_image_seq_len: Annotated[int, Field(ge=1, le=10**9)] | None = None


def read_scheduler_config(file: Path) -> dict[str, Any]:
    """Return the content of a scheduler_config.json.

    Raises:
        ValueError: If a field is wrong. The message names the file, the field and the
            remedy.
    """
    record = load_record(file, SchedulerConfig, "config of a scheduler", "get it again")
    return record.model_dump(exclude_unset=True)
