"""The files of a run folder that reports read: what each must hold.

The folder may be another person's. It is data: nothing in it is made into an object or looked up elsewhere, and no link
is followed out of it.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import (
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    JsonValue,
    PositiveInt,
    model_validator,
)
from typing_extensions import Self, TypedDict

from oss_exp.checks import Name
from oss_exp.evaluation.psnr import Interval
from oss_exp.files import (
    AGAIN,
    CONFIG_LIMIT,
    TABLE_LIMIT,
    Count,
    Numbers,
    Record,
    inside,
    load_arrays,
    load_record,
    read_text,
)
from oss_exp.geneval.rules import VerdictRecord, Wish
from oss_exp.models.stages import FinetuneRecord

Table = Numbers | list[Numbers]  # a number at each time, or one for each channel
FIELDS = 1 << 19  # of a file
MOST = 1000  # schedules, metrics, curves or stages of a run
PICTURES, FRAMES = 64, 4096  # that a run keeps of each schedule
LARGEST = 256  # pixels a side of the pictures of a report
PICTURES_LIMIT = (
    1 << 31
)  # 2 GiB: of all pictures, of which those of one schedule are in memory at a time


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MOST:
        raise ValueError(f"must have at most {MOST} entries, got {len(value)}")
    return value


MetricValues = Annotated[dict[Name, float], BeforeValidator(_few)]


class Measured(Record):
    """What an evaluation measured; of a student that diverged, numbers are NaN."""

    model_config = ConfigDict(allow_inf_nan=True)


class Model(Record):
    """name: that of its configuration. Whatever else is known of it tells arenas apart."""

    model_config = ConfigDict(extra="allow")

    name: Name


class Teacher(Record):
    """noise_schedule: its configuration; num_steps: N."""

    model_config = ConfigDict(extra="allow")

    noise_schedule: JsonValue = None
    num_steps: Count


class TeacherGrid(Record):
    """teacher.json: the times of the teacher's nodes, noise first."""

    times: Annotated[
        list[Annotated[float, Field(ge=0, le=1)]], FailFast(), Field(max_length=100_000)
    ]

    @model_validator(mode="after")
    def _decreasing(self) -> Self:
        if not all(a > b for a, b in pairwise(self.times)):
            raise ValueError("must have times that decrease")
        return self


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
            raise ValueError(
                f"must have a psnr for each index, got {len(self.psnr)} for {len(self.index)}"
            )
        return self


class Row(Measured):
    """One measured schedule. metrics: FID and the like, by name."""

    strategy: Name
    num_steps: Count
    nfe: Count
    baseline: bool
    start: Name
    planning: Planning
    psnr: Interval
    spread: Interval
    metrics: MetricValues
    per_image: Images


class MetricsRecord(Measured):
    """metrics.json. teacher_metrics: FID and the like, by name, of the teacher's own samples."""

    model: Model
    teacher: Teacher
    solver: JsonValue
    seed: int
    teacher_metrics: MetricValues
    rows: Annotated[list[Row], FailFast(), Field(max_length=MOST)]


class Curve(Record):
    """Amplitudes of the teacher or of a student along its way: its times, and low and high at each."""

    strategy: Name
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

    curves: Annotated[list[Curve], FailFast(), Field(min_length=2, max_length=MOST)]

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

    label: Name
    num_steps: Count
    verdicts: Annotated[list[VerdictRecord], FailFast()]


class GenEvalRecord(Record):
    """geneval.json: what was asked for, and of every schedule the verdicts; the teacher is the first."""

    prompts: Annotated[list[Wish], FailFast(), Field(min_length=1)]
    images_per_prompt: Annotated[PositiveInt, Field(le=100_000)]
    rows: Annotated[list[Judged], FailFast(), Field(min_length=1, max_length=MOST)]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        count = len(self.prompts) * self.images_per_prompt
        for row in self.rows:
            if len(row.verdicts) != count:
                raise ValueError(
                    f"must have {count} verdicts on {row.label!r:.80}, got {len(row.verdicts)}"
                )
        return self

    @property
    def tags(self) -> list[str]:
        """The task of every picture."""
        return [wish["tag"] for wish in self.prompts for _ in range(self.images_per_prompt)]


R = TypeVar("R", bound=Record)


def _read(folder: Path, name: str, form: type[R], what: str, remedy: str = AGAIN) -> R:
    return load_record(inside(folder, name), form, what, remedy, TABLE_LIMIT, FIELDS)


def read_metrics(folder: Path) -> MetricsRecord:
    """metrics.json of a run. FileNotFoundError or ValueError, as all of these, names the file and the field."""
    return _read(folder, "metrics.json", MetricsRecord, "metrics of a run", "measure again")


def read_amplitude(folder: Path) -> AmplitudeRecord:
    return _read(folder, "amplitude.json", AmplitudeRecord, "amplitudes of a run")


def read_training(folder: Path) -> TrainingRecord:
    return _read(folder, "training.json", TrainingRecord, "losses of a training run")


def read_finetuning(folder: Path) -> FinetuneRecord:
    return _read(folder, "finetune.json", FinetuneRecord, "stages of a finetuning")


def read_geneval(folder: Path) -> GenEvalRecord:
    return _read(folder, "geneval.json", GenEvalRecord, "GenEval's results")


def read_teacher_times(folder: Path) -> list[float]:
    """The times of the teacher's nodes; none of a run of a version that did not write them."""
    if not (folder / "teacher.json").is_file():
        return []
    return _read(folder, "teacher.json", TeacherGrid, "times of the teacher").times


def read_configuration(folder: Path) -> str:
    """The text of config.yaml, for people to read."""
    return read_text(inside(folder, "config.yaml"), "configuration", CONFIG_LIMIT)


def read_pictures(folder: Path) -> dict[str, np.ndarray]:
    """samples.npz: bytes (n, H, W, C) or (n, F, H, W, C) of the teacher and of schedules; empty where there is none."""
    path = folder / "samples.npz"
    if not path.is_file():
        return {}
    pictures = _load(inside(folder, path.name), "samples of a run")
    _check_pictures(path, pictures, (4, 5))
    return pictures


def read_ways(folder: Path) -> dict[str, np.ndarray]:
    """trajectories.npz: times/<label> (n, P) and x0/<label>, bytes (n, P, H, W, C); empty where there is none."""
    path = folder / "trajectories.npz"
    if not path.is_file():
        return {}
    ways = _load(inside(folder, path.name), "predictions of a run")
    pictures = {
        key.removeprefix("x0/"): each for key, each in ways.items() if key.startswith("x0/")
    }
    _check_pictures(path, pictures, (5,))
    times = {
        key.removeprefix("times/"): each for key, each in ways.items() if key.startswith("times/")
    }
    if {key: each.shape for key, each in times.items()} != {
        key: each.shape[:2] for key, each in pictures.items()
    }:
        raise ValueError(f"predictions of a run {path} must have the time of each; measure again")
    return ways


def _load(path: Path, what: str) -> dict[str, np.ndarray]:
    """The arrays of a file, pictures reduced to the size of those of a report."""

    def small(array: np.ndarray) -> np.ndarray:
        pictures = array.dtype == np.uint8 and array.ndim in (4, 5) and array.size
        if not pictures:
            return array
        return (
            reduced(array, LARGEST) if array.ndim == 5 else reduced(array[:, None], LARGEST)[:, 0]
        )

    found = load_arrays(path, what, "measure again", None, PICTURES_LIMIT, small)
    return {name: array for name, array in found.items() if array is not None}


def _check_pictures(
    path: Path, pictures: dict[str, np.ndarray], dimensions: tuple[int, ...]
) -> None:
    """ValueError unless all are bytes of the teacher's shape, for as many samples or fewer."""
    teacher = pictures.get("teacher")
    if teacher is None:
        raise ValueError(f"{path} has no pictures of the teacher; measure again")
    for label, each in pictures.items():
        if each.dtype != np.uint8 or each.ndim not in dimensions:
            raise ValueError(
                f"{path} must hold pictures of bytes, and {label!r:.80} is {each.dtype!s:.40}"
            )
        *_, height, width, channels = each.shape
        fits = 0 < len(each) <= PICTURES and height and width and channels in (1, 3)
        if (
            not fits
            or each.shape[-3:] != teacher.shape[-3:]
            or each.ndim != teacher.ndim
            or each.size == 0
        ):
            shapes = f"{each.shape!s:.80}, the teacher {teacher.shape!s:.80}"
            raise ValueError(f"{path}: {label!r:.80} has pictures of shape {shapes}")
        if each.ndim == 5 and each.shape[1] > FRAMES:
            raise ValueError(
                f"{path}: {label!r:.80} has {each.shape[1]} frames or steps, more than {FRAMES}"
            )


def reduced(videos: np.ndarray, side: int) -> np.ndarray:
    """(n, F, H, W, C) bytes, at most `side` pixels high and wide."""
    factor = side / max(videos.shape[2:4])
    if factor >= 1:
        return videos
    size = [max(1, round(factor * pixels)) for pixels in videos.shape[2:4]]
    channels_first = torch.from_numpy(videos).flatten(0, 1).movedim(-1, 1).float()
    small = F.interpolate(channels_first, size=size, mode="area").round().byte()
    return small.movedim(1, -1).unflatten(0, videos.shape[:2]).numpy()
