"""The files of a run folder that reports read: what each must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, FailFast, Field, JsonValue, PositiveInt, model_validator
from typing_extensions import Self, TypedDict

from oss_exp.evaluation.psnr import Interval
from oss_exp.files import TABLE_LIMIT, Count, Numbers, Record, load_record
from oss_exp.geneval.rules import VerdictRecord, Wish
from oss_exp.models.stages import FinetuneRecord

Table = Numbers | list[Numbers]  # a number at each time, or one for each channel


class Measured(Record):
    """What an evaluation measured; of a student that diverged, numbers are NaN."""

    model_config = ConfigDict(allow_inf_nan=True)


class Model(Record):
    """name: that of its configuration. Whatever else is known of it tells arenas apart."""

    model_config = ConfigDict(extra="allow")

    name: str


class Teacher(Record):
    """noise_schedule: its configuration; num_steps: N."""

    model_config = ConfigDict(extra="allow")

    noise_schedule: JsonValue = None
    num_steps: Count


class Planning(TypedDict, total=False):
    """What a schedule cost: network calls per search sample, and seconds."""

    network_calls_per_sample: float
    seconds: float


class Images(Measured):
    """index: numbers of samples; psnr: of each."""

    index: Annotated[list[Count], FailFast()]
    psnr: Numbers

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if len(self.index) != len(self.psnr):
            raise ValueError(f"must have a psnr for each index, got {len(self.psnr)} for {len(self.index)}")
        return self


class Row(Measured):
    """One measured schedule. metrics: FID and the like, by name."""

    strategy: str
    num_steps: Count
    nfe: Count
    baseline: bool
    start: str
    planning: Planning
    psnr: Interval
    spread: Interval
    metrics: dict[str, float]
    per_image: Images


class MetricsRecord(Measured):
    """metrics.json. teacher_metrics: FID and the like, by name, of the teacher's own samples."""

    model: Model
    teacher: Teacher
    solver: JsonValue
    seed: int
    teacher_metrics: dict[str, float]
    rows: list[Row]


class Curve(Record):
    """Amplitudes of the teacher or of a student along its way: its times, and low and high at each."""

    strategy: str
    num_steps: Count
    calibrated: bool
    times: Numbers
    low: Table
    high: Table

    @model_validator(mode="after")
    def _complete(self) -> Self:
        counts = len(self.times), len(self.low), len(self.high)
        if len(set(counts)) > 1:
            raise ValueError(f"must have as many low and high as times, got {counts}")
        return self


class AmplitudeRecord(Record):
    """amplitude.json, of task=calibrate."""

    curves: Annotated[list[Curve], Field(min_length=2)]

    @model_validator(mode="after")
    def _of_one_teacher(self) -> Self:
        teachers = sum(curve.strategy == "teacher" for curve in self.curves)
        if teachers != 1:
            raise ValueError(f"must have curves of one teacher, got {teachers}")
        return self


class TrainingRecord(Record):
    """training.json. losses: of every step."""

    losses: Annotated[Numbers, Field(min_length=1)]


class Judged(Record):
    """A schedule, or the teacher, and the verdicts on its pictures."""

    label: str
    num_steps: Count
    verdicts: Annotated[list[VerdictRecord], FailFast()]


class GenEvalRecord(Record):
    """geneval.json: what was asked for, and of every schedule the verdicts; the teacher is the first."""

    prompts: Annotated[list[Wish], Field(min_length=1)]
    images_per_prompt: PositiveInt
    rows: Annotated[list[Judged], Field(min_length=1)]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for row in self.rows:
            if len(row.verdicts) != len(self.tags):
                raise ValueError(f"must have {len(self.tags)} verdicts on {row.label!r:.80}, got {len(row.verdicts)}")
        return self

    @property
    def tags(self) -> list[str]:
        """The task of every picture."""
        return [wish["tag"] for wish in self.prompts for _ in range(self.images_per_prompt)]


def read_metrics(folder: Path) -> MetricsRecord:
    """metrics.json of a run. FileNotFoundError or ValueError, as all of these, names the file and the field."""
    return load_record(folder / "metrics.json", MetricsRecord, "metrics of a run", "measure again", TABLE_LIMIT)


def read_amplitude(folder: Path) -> AmplitudeRecord:
    return load_record(folder / "amplitude.json", AmplitudeRecord, "amplitudes of a run", limit=TABLE_LIMIT)


def read_training(folder: Path) -> TrainingRecord:
    return load_record(folder / "training.json", TrainingRecord, "losses of a training run", limit=TABLE_LIMIT)


def read_finetuning(folder: Path) -> FinetuneRecord:
    return load_record(folder / "finetune.json", FinetuneRecord, "stages of a finetuning", limit=TABLE_LIMIT)


def read_geneval(folder: Path) -> GenEvalRecord:
    return load_record(folder / "geneval.json", GenEvalRecord, "GenEval's results", limit=TABLE_LIMIT)
