"""The JSON file of a step schedule, version 3, and the reading of version 2.

`docs/schedule_format.md` holds the JSON Schema of `ScheduleFile`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    FailFast,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    field_validator,
)
from torch import Tensor
from typing_extensions import TypeAliasType

from oss_exp.checks import Name
from oss_exp.files import AGAIN, TABLE_LIMIT, Numbers, Record, load_record, load_tensors
from oss_exp.names import with_public_names
from oss_exp.validation import describe

FORMAT = "oss_exp/step_schedule"
VERSION = 3
MOST_STEPS = 10_000
Time = Annotated[float, Field(ge=0, le=1)]
# Lists may have millions of entries; reading ends at the first wrong one.
Times = TypeAliasType(
    "Times", Annotated[list[Time], FailFast(), Field(min_length=1, max_length=MOST_STEPS + 1)]
)
ManyTimes = TypeAliasType("ManyTimes", Annotated[list[Times], FailFast(), Field(min_length=1)])
StartTime = Annotated[float, Field(gt=0, le=1)]
Order = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Orders = TypeAliasType("Orders", Annotated[list[Order], FailFast(), Field(max_length=MOST_STEPS)])
ManyOrders = TypeAliasType("ManyOrders", Annotated[list[Orders], FailFast()])
Sample = Annotated[int, Field(lt=2**63)]
Samples = TypeAliasType("Samples", Annotated[tuple[Sample, ...], FailFast()])
Weights = TypeAliasType(
    "Weights", Annotated[list[Numbers], FailFast(), Field(max_length=MOST_STEPS)]
)


class _Record(Record):
    """A record that refuses other fields."""

    model_config = ConfigDict(extra="forbid")


class MeanFile(_Record):
    """The safetensors file beside the JSON, with the tensor `mean` (G, *E)."""

    file: str = Field(
        description="Name of a safetensors file in the same folder.",
        pattern=r"^[^/\\]+$",
        max_length=255,
    )
    sha256: str = Field(description="SHA-256 of that file.", pattern=r"^[0-9a-f]{64}$")


class PinnedStart(_Record):
    """A start at the first time, with the initial noise as the state."""

    kind: Literal["pinned"]


class FreeStart(_Record):
    """A start that uses the initial noise, of `start_time`, as the state at the first time."""

    kind: Literal["free"]
    start_time: StartTime = Field(description="Time of the initial noise.")


class AnalyticStart(_Record):
    """A start by one jump towards the mean, from `start_time` to the first time, without a call."""

    kind: Literal["analytic"]
    start_time: StartTime = Field(description="Time of the initial noise.")
    mean: MeanFile


class SolverStepsRecord(_Record):
    """Steps of the solver that `provenance.solver` names."""

    kind: Literal["solver"]
    orders: Orders | ManyOrders | None = Field(
        description=(
            "Order of each of the K steps (or of each sample's steps); null: the solver's own."
        )
    )


class FittedStepsRecord(_Record):
    """Steps with fitted coefficients."""

    kind: Literal["fitted"]
    weights: Weights = Field(
        description=(
            "K rows of coefficients: of x, the noise, the mean, and the predictions of x0, "
            "newest first."
        )
    )
    mean: MeanFile


class Cell(_Record):
    """One setting in which a schedule was measured: the model of the search with one change.

    Losses and gains are paired, on the same noises. Intervals are 95 % intervals.
    """

    axis: str = Field(
        description=(
            "The setting that is changed; `base`: none. "
            "`shape`: resolution or frames, as latent sizes."
        )
    )
    value: JsonValue = Field(description="Its value.")
    n: int = Field(description="Held-out samples.", ge=1)
    psnr: float = Field(description="PSNR to the teacher of this setting, dB.")
    psnr_interval: tuple[float, float]
    baseline: float = Field(description="PSNR of the baseline.")
    gain: float = Field(description="PSNR minus the baseline's.")
    gain_interval: tuple[float, float]
    loss: float = Field(description="PSNR of the base minus that of this setting.")
    loss_interval: tuple[float, float]
    moved: float | None = Field(
        description="PSNR of this setting's teacher against the base's, if the sizes are equal."
    )


class Certificate(_Record):
    """The settings in which a schedule was measured; it holds up to a loss of `tolerance`."""

    baseline: str = Field(description="Name of the best baseline in the base.")
    tolerance: float = Field(
        description="Largest loss, dB, of a setting in which the schedule holds.", ge=0
    )
    base: dict[str, JsonValue] = Field(
        description="Value of each axis in the base; null: the model has no such axis."
    )
    cells: list[Cell] = Field(max_length=MOST_STEPS)
    skipped: dict[str, str] = Field(description="Settings that were not measured, and why.")
    calls: int = Field(description="Network rows of the measurements.", ge=0)


def _finite(value: Any) -> Any:
    """Return the value with None in place of nan and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Provenance = Annotated[dict[str, Any], AfterValidator(_finite)]


class ScheduleFile(_Record):
    """A step schedule: K + 1 times (1 noise, 0 data), a start, and how each step is taken."""

    format: Literal["oss_exp/step_schedule"] = FORMAT
    version: Literal[3] = VERSION
    times: Times | ManyTimes = Field(
        description=(
            "K + 1 strictly decreasing times that end at 0; "
            "a list of such lists if each sample has its own."
        )
    )
    samples: Samples | None = Field(description="Index of each sample, if each has its own times.")
    start: Annotated[PinnedStart | FreeStart | AnalyticStart, Field(discriminator="kind")]
    steps: Annotated[SolverStepsRecord | FittedStepsRecord, Field(discriminator="kind")]
    provenance: Provenance = Field(
        description="How it was made: model, teacher, solver, strategy, versions."
    )
    range: Certificate | None = Field(
        default=None, description="Where it was measured to hold, by task=certify."
    )

    @field_validator("provenance")
    @classmethod
    def _check_provenance(cls, provenance: dict[str, Any]) -> dict[str, Any]:
        return _with_checked_entries(provenance)


class _Provenance(Record):
    """The entries of a provenance that this program reads again, with their types."""

    class Model(Record):
        """The model that the times were searched on."""

        name: Name = "-"

    class Strategy(Record):
        """The strategy that planned the times; a baseline is not searched by this program."""

        name: Name = "-"
        baseline: bool = False

    class Planning(Record):
        """The cost of the search."""

        network_calls_per_sample: float = 0
        seconds: float = 0
        cost_per_round: Numbers = Field(default=[], max_length=MOST_STEPS)

    model: Model | None = None
    strategy: Strategy | None = None
    planning: Planning | None = None


def _with_checked_entries(provenance: dict[str, Any]) -> dict[str, Any]:
    """Return a provenance unchanged. Raises ValueError if an entry of `_Provenance` is wrong."""
    sections: dict[str, Any] = {}
    for key in _Provenance.model_fields:
        if isinstance(provenance.get(key), dict):
            sections[key] = provenance[key]
    try:
        _Provenance.model_validate(sections)
    except ValidationError as error:
        raise ValueError(f"has a wrong entry: {describe(error, given=sections)}") from None
    return provenance


def read_schedule_file(path: Path) -> tuple[ScheduleFile, Tensor | None]:
    """Read the file of a step schedule.

    Returns:
        The record, and the mean (G, *E), or None if there is none.

    Raises:
        FileNotFoundError: If the file or its mean is missing.
        ValueError: If one of them is damaged. The message names the file, the fault and
            the remedy.
    """
    # Record.
    try:
        content = load_record(path, _VERSIONS, "step schedule", limit=TABLE_LIMIT)
    except ValueError:
        owner = path.with_name(f"{path.name.removesuffix('.mean.json')}.json")
        if path.name.endswith(".mean.json") and owner.is_file():
            raise ValueError(
                f"{path} is not a step schedule but belongs to the one beside it; give {owner}"
            ) from None

        raise

    # Older version.
    try:
        record = _from_version_2(content) if isinstance(content, _Version2) else content
    except ValidationError as error:
        raise ValueError(
            f"step schedule {path} of version 2: field {describe(error)}; {AGAIN}"
        ) from None

    # Mean.
    if isinstance(record.start, AnalyticStart):
        mean = record.start.mean
    elif isinstance(record.steps, FittedStepsRecord):
        mean = record.steps.mean
    else:
        return record, None

    file = path.with_name(mean.file)
    tensors = load_tensors(file, mean.sha256, "mean of a step schedule")
    if "mean" not in tensors:
        raise ValueError(f"{file} holds no tensor `mean`; restore it or plan the schedule again")
    return record, tensors["mean"]


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **ScheduleFile.model_json_schema(),
    }


# --------------------------------------------------------------------------------------------------
# Version 2, written until release 0.1
# --------------------------------------------------------------------------------------------------


class _Version2(_Record):
    """The file of a step schedule, version 2."""

    format: Literal["oss_exp/step_schedule"]
    version: Literal[2]
    num_steps: int
    start: Literal["free", "pinned", "analytic"]
    start_time: StartTime
    times: Times | ManyTimes
    orders: Orders | ManyOrders | None
    weights: Weights | None
    samples: Samples | None
    mean: MeanFile | None
    provenance: dict[str, Any]


def _from_version_2(old: _Version2) -> ScheduleFile:
    """Return the record of version 3."""
    first_times = [row[0] if isinstance(row, list) else row for row in old.times]
    mean = None if old.mean is None else old.mean.model_dump()

    # Start. A pinned start at another time than its noise ran as a free one.
    kind = "free" if old.start == "pinned" and max(first_times) != old.start_time else old.start
    start: dict[str, Any] = {"kind": kind}
    if kind != "pinned":
        start["start_time"] = old.start_time
    if kind == "analytic":
        start["mean"] = mean

    # Steps.
    if old.weights is None:
        steps = {"kind": "solver", "orders": old.orders}
    else:
        steps = {"kind": "fitted", "weights": old.weights, "mean": mean}

    return ScheduleFile.model_validate(
        {
            "times": old.times,
            "samples": old.samples,
            "start": start,
            "steps": steps,
            "provenance": with_public_names(old.provenance),
        }
    )


_VERSIONS = TypeAdapter(Annotated[_Version2 | ScheduleFile, Field(discriminator="version")])
