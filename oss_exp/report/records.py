"""Records of the files in a run folder that reports read.

The folder may be another person's, so it is treated as data: nothing in it is made into
an object or looked up elsewhere, and no link is followed out of it.
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
PICTURES, FRAMES = 64, 4096  # of each schedule in a run
LARGEST = 256  # longest side of a report's pictures, in pixels
PICTURES_LIMIT = 1 << 31  # bytes of all pictures; one schedule's are in memory at a time


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MOST:
        raise ValueError(f"must have at most {MOST} entries, got {len(value)}")
    return value


MetricValues = Annotated[dict[Name, float], BeforeValidator(_few)]


class Measured(Record):
    """A record of measurements; those of a student that diverged are NaN."""

    model_config = ConfigDict(allow_inf_nan=True)


class Model(Record):
    """The model of a run.

    Other fields are kept too: they tell apart what must not be compared.

    Attributes:
        name: Name of the model's configuration.
    """

    model_config = ConfigDict(extra="allow")

    name: Name


class Teacher(Record):
    """The teacher of a run.

    Attributes:
        noise_schedule: The configuration of its noise schedule.
        num_steps: Its steps, N.
    """

    model_config = ConfigDict(extra="allow")

    noise_schedule: JsonValue = None
    num_steps: Count


class TeacherGrid(Record):
    """The file teacher.json.

    Attributes:
        times: Times t of the teacher's nodes, decreasing.
    """

    times: Annotated[
        list[Annotated[float, Field(ge=0, le=1)]], FailFast(), Field(max_length=100_000)
    ]

    @model_validator(mode="after")
    def _decreasing(self) -> Self:
        if not all(a > b for a, b in pairwise(self.times)):
            raise ValueError("must have times that decrease")
        return self


class Planning(TypedDict, total=False):
    """The cost of a schedule: network calls for a search sample, and seconds."""

    network_calls_per_sample: float
    seconds: float


class Images(Measured):
    """The PSNR of single images.

    Attributes:
        index: Sample indices.
        psnr: PSNR of each in dB.
    """

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
    """The measurements of one schedule; `metrics` has FID and the like by name."""

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
    """The file metrics.json; `teacher_metrics` has FID and the like of the teacher's samples."""

    model: Model
    teacher: Teacher
    solver: JsonValue
    seed: int
    teacher_metrics: MetricValues
    rows: Annotated[list[Row], FailFast(), Field(max_length=MOST)]


class Curve(Record):
    """Amplitudes of the states of the teacher or a student.

    Attributes:
        strategy: Name of the strategy, or "teacher".
        num_steps: Number of steps.
        calibrated: True for a student with calibration.
        times: Times t of the states.
        low: 5 % quantile at each time.
        high: 95 % quantile at each time.
    """

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
    """The file amplitude.json of task=calibrate: curves of one teacher and of students."""

    curves: Annotated[list[Curve], FailFast(), Field(min_length=2, max_length=MOST)]

    @model_validator(mode="after")
    def _of_one_teacher(self) -> Self:
        teachers = sum(curve.strategy == "teacher" for curve in self.curves)
        if teachers != 1:
            raise ValueError(f"must have curves of one teacher, got {teachers}")
        return self


class TrainingRecord(Record):
    """The file training.json; `losses` has the loss of every step."""

    losses: Annotated[Numbers, Field(min_length=1)]


class Judged(Record):
    """The verdicts on the pictures of a schedule or of the teacher."""

    label: Name
    num_steps: Count
    verdicts: Annotated[list[VerdictRecord], FailFast()]


class GenEvalRecord(Record):
    """The file geneval.json.

    Attributes:
        prompts: What pictures had to show.
        images_per_prompt: Pictures of each prompt.
        rows: Verdicts on every schedule's pictures; the first row is the teacher.
    """

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
    """Read metrics.json of a run folder.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not as it should be; the message names the file and the
            field.
    """
    return _read(folder, "metrics.json", MetricsRecord, "metrics of a run", "measure again")


def read_amplitude(folder: Path) -> AmplitudeRecord:
    """Read amplitude.json; raises as `read_metrics`."""
    return _read(folder, "amplitude.json", AmplitudeRecord, "amplitudes of a run")


def read_training(folder: Path) -> TrainingRecord:
    """Read training.json; raises as `read_metrics`."""
    return _read(folder, "training.json", TrainingRecord, "losses of a training run")


def read_finetuning(folder: Path) -> FinetuneRecord:
    """Read finetune.json; raises as `read_metrics`."""
    return _read(folder, "finetune.json", FinetuneRecord, "stages of a finetuning")


def read_geneval(folder: Path) -> GenEvalRecord:
    """Read geneval.json; raises as `read_metrics`."""
    return _read(folder, "geneval.json", GenEvalRecord, "GenEval's results")


def read_teacher_times(folder: Path) -> list[float]:
    """Read the times of the teacher's nodes; runs of early versions have none."""
    if not (folder / "teacher.json").is_file():
        return []
    return _read(folder, "teacher.json", TeacherGrid, "times of the teacher").times


def read_configuration(folder: Path) -> str:
    """Read config.yaml as text to be displayed."""
    return read_text(inside(folder, "config.yaml"), "configuration", CONFIG_LIMIT)


def read_pictures(folder: Path) -> dict[str, np.ndarray]:
    """Read samples.npz: the pictures of the teacher and of schedules.

    Returns:
        {label: uint8, (n, H, W, C) or (n, F, H, W, C)}; empty without such a file.
    """
    path = folder / "samples.npz"
    if not path.is_file():
        return {}
    pictures = _load(inside(folder, path.name), "samples of a run")
    _check_pictures(path, pictures, (4, 5))
    return pictures


def read_ways(folder: Path) -> dict[str, np.ndarray]:
    """Read trajectories.npz: predictions of the clean sample along the trajectories.

    Returns:
        {"times/<label>": (n, P), "x0/<label>": uint8, (n, P, H, W, C)}; empty without
        such a file.
    """
    path = folder / "trajectories.npz"
    if not path.is_file():
        return {}
    arrays = _load(inside(folder, path.name), "predictions of a run")

    # Pictures.
    pictures = {}
    for key, array in arrays.items():
        if key.startswith("x0/"):
            pictures[key.removeprefix("x0/")] = array
    _check_pictures(path, pictures, (5,))

    # A time for every picture.
    times = {}
    for key, array in arrays.items():
        if key.startswith("times/"):
            times[key.removeprefix("times/")] = array.shape
    if times != {label: array.shape[:2] for label, array in pictures.items()}:
        raise ValueError(f"predictions of a run {path} must have the time of each; measure again")
    return arrays


def _load(path: Path, what: str) -> dict[str, np.ndarray]:
    """Read the arrays of a file, with pictures reduced to a report's size."""

    def small(array: np.ndarray) -> np.ndarray:
        if array.dtype != np.uint8 or array.ndim not in (4, 5) or not array.size:
            return array
        if array.ndim == 5:
            return reduced(array, LARGEST)
        return reduced(array[:, None], LARGEST)[:, 0]

    arrays = load_arrays(path, what, "measure again", None, PICTURES_LIMIT, small)
    return {name: array for name, array in arrays.items() if array is not None}


def _check_pictures(
    path: Path, pictures: dict[str, np.ndarray], dimensions: tuple[int, ...]
) -> None:
    """Raise ValueError unless all are bytes of the teacher's shape, of 64 samples at most."""
    teacher = pictures.get("teacher")
    if teacher is None:
        raise ValueError(f"{path} has no pictures of the teacher; measure again")

    for label, array in pictures.items():
        # Dtype.
        if array.dtype != np.uint8 or array.ndim not in dimensions:
            raise ValueError(
                f"{path} must hold pictures of bytes, and {label!r:.80} is {array.dtype!s:.40}"
            )

        # Shape.
        *_, height, width, channels = array.shape
        is_picture = height and width and channels in (1, 3) and array.size
        is_teachers = array.shape[-3:] == teacher.shape[-3:] and array.ndim == teacher.ndim
        if not (is_picture and is_teachers and len(array) <= PICTURES):
            shapes = f"{array.shape!s:.80}, the teacher {teacher.shape!s:.80}"
            raise ValueError(f"{path}: {label!r:.80} has pictures of shape {shapes}")
        if array.ndim == 5 and array.shape[1] > FRAMES:
            raise ValueError(
                f"{path}: {label!r:.80} has {array.shape[1]} frames or steps, more than {FRAMES}"
            )


def reduced(videos: np.ndarray, side: int) -> np.ndarray:
    """Shrink videos (n, F, H, W, C) of bytes so that no side exceeds `side` pixels."""
    factor = side / max(videos.shape[2:4])
    if factor >= 1:
        return videos
    size = [max(1, round(factor * pixels)) for pixels in videos.shape[2:4]]
    channels_first = torch.from_numpy(videos).flatten(0, 1).movedim(-1, 1).float()
    small = F.interpolate(channels_first, size=size, mode="area").round().byte()
    return small.movedim(1, -1).unflatten(0, videos.shape[:2]).numpy()
