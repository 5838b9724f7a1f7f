"""The rules of GenEval, which decide whether a picture shows what its prompt asks for.

Ghosh et al. 2023, arXiv 2310.11513. A detector lists the objects of a picture and a
classifier names their colours. The rules are pure functions of these answers and follow
the published program, including its quirks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter, with_config
from scipy.stats import binomtest
from typing_extensions import NotRequired, TypedDict

from oss_exp.evaluation.psnr import Interval
from oss_exp.files import Count, Record, load_records

Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
TASKS = get_args(Task)
Relation = Literal["left of", "right of", "above", "below"]
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

Box = tuple[float, float, float, float, float]
"""The box of an object in pixels and its score: x1, y1, x2, y2, score."""

Clause = TypedDict(
    "Clause",
    {
        "class": str,
        "count": Count,
        "color": NotRequired[str],
        "position": NotRequired[tuple[Relation, Count]],
    },
)
"""A requirement: `count` objects of a class. `position` is a relation and the number of the clause
whose objects it refers to.
"""


def _check_positions(clauses: list[Clause]) -> list[Clause]:
    """Raise ValueError if a position refers to the clause itself or a later one."""
    for number, clause in enumerate(clauses):
        if "position" in clause and clause["position"][1] >= number:
            raise ValueError(
                f"must relate objects to those of an earlier clause, got {clause['position']}"
            )
    return clauses


@with_config(Record.model_config)
class Wish(TypedDict):
    """A line of GenEval's metadata: what a picture must show, and what it must not."""

    tag: Task
    include: Annotated[list[Clause], Field(min_length=1), AfterValidator(_check_positions)]
    exclude: NotRequired[list[Clause]]
    prompt: str


@dataclass(frozen=True)
class Rules:
    """The thresholds that decide which of the detector's objects count.

    Attributes:
        threshold: The score that an object must exceed.
        counting_threshold: The same for prompts that ask for a number.
        max_objects: Largest number of objects of a class; the most confident count.
        max_overlap: IoU from which the less confident of two objects is dropped; 1
            drops none.
        position_threshold: Share of the two sizes that an offset must exceed.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1


class VerdictRecord(Record):
    """The record of a `Verdict`.

    Attributes:
        number: Number of the picture.
        reasons: As in `Verdict`.
        objects: Boxes by class.
    """

    number: Count
    reasons: list[str]
    objects: dict[str, list[Box]]


@dataclass(frozen=True)
class Verdict:
    """The judgement of a picture.

    Attributes:
        reasons: What is wrong; empty for a correct picture.
        objects: The objects that counted, by class, the most confident first.
    """

    reasons: tuple[str, ...]
    objects: Mapping[str, Sequence[Box]]

    @property
    def correct(self) -> bool:
        return not self.reasons


def judge(
    wanted: Wish,
    found: Mapping[str, Sequence[Box]],
    colour_of: Callable[[str, Box], str],
    rules: Rules = Rules(),
) -> Verdict:
    """Judge whether the objects of a picture are those that its prompt asks for.

    Of a class, the most confident objects are looked at, as many as the clause asks
    for. All of them must have the clause's colour, and all must stand in the clause's
    relation to all objects of the clause that it refers to. `exclude` bounds the number
    of objects.

    Args:
        wanted: The requirements of the prompt.
        found: Boxes of the picture's objects, by class, in any order.
        colour_of: Returns the colour of an object of a class; called only where it
            matters.
        rules: Thresholds.
    """
    # Objects that count.
    objects: dict[str, list[Box]] = {}
    for name, boxes in found.items():
        confident = count_objects(boxes, wanted["tag"], rules)
        if confident:
            objects[name] = confident

    # Clauses to include; `groups` has the objects of each clause, None where it is not satisfied.
    reasons: list[str] = []
    groups: list[Sequence[Box] | None] = []
    for clause in wanted.get("include", ()):
        group = objects.get(clause["class"], [])[: clause["count"]]
        wrong = _judge_clause(clause, group, groups, colour_of, rules)
        reasons += wrong
        groups.append(None if wrong else group)

    # Clauses to exclude.
    for clause in wanted.get("exclude", ()):
        name, count = clause["class"], clause["count"]
        if len(objects.get(name, [])) >= count:
            reasons.append(f"expected {name}<{count}, found {len(objects[name])}")
    return Verdict(tuple(reasons), objects)


def _judge_clause(
    clause: Clause,
    group: Sequence[Box],
    groups: Sequence[Sequence[Box] | None],
    colour_of: Callable[[str, Box], str],
    rules: Rules,
) -> list[str]:
    """Return what is wrong with the objects of a clause: one reason or none."""
    name, count = clause["class"], clause["count"]
    if len(group) < count:
        return [f"expected {name}>={count}, found {len(group)}"]

    # Colour.
    if "color" in clause:
        colour = clause["color"]
        colours = [colour_of(name, box) for box in group]
        right = colours.count(colour)
        if right < count:
            counts = []
            for other in COLOURS:
                if other in colours:
                    counts.append(f"{colours.count(other)} {other}")
            others = ", ".join(counts)
            return [f"expected {colour} {name}>={count}, found {right} {colour}; and {others}"]

    # Position.
    if "position" in clause:
        relation, target = clause["position"]
        others = groups[target]
        if others is None:
            return [f"no target for {name} to be {relation}"]
        for box, other in product(group, others):
            relations = relative_position(box, other, rules.position_threshold)
            if relation not in relations:
                actual = " and ".join(relations)
                return [f"expected {name} {relation} target, found {actual} target"]
    return []


def count_objects(boxes: Sequence[Box], tag: str, rules: Rules) -> list[Box]:
    """Return the objects of a class that count for a prompt of this task, most confident first."""
    threshold = rules.counting_threshold if tag == "counting" else rules.threshold

    # Of equal scores the last comes first, as in the published program.
    confident = [box for box in reversed(boxes) if box[4] > threshold]
    confident.sort(key=lambda box: -box[4])
    confident = confident[: rules.max_objects]
    if rules.max_overlap == 1:
        return confident

    # Overlapping objects.
    separate: list[Box] = []
    for box in confident:
        if all(iou(box, other) < rules.max_overlap for other in separate):
            separate.append(box)
    return separate


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union of two boxes, with or without a score, ends included."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a[:4]) + area(*b[:4]) - common
    return common / union if union else 0.0


def relative_position(a: Sequence[float], b: Sequence[float], threshold: float) -> list[str]:
    """Return where box a is, seen from box b.

    An offset of the centres counts as far as it exceeds `threshold` times the sum of
    the two sizes, in units of the whole offset.

    Returns:
        Of "left of", "right of", "above" and "below": none, one, or two for a diagonal.
    """
    boxes = np.asarray([a[:4], b[:4]], dtype=float).reshape(2, 2, 2)  # (box, corner, axis)
    centres = boxes.mean(1)
    sizes = np.abs(boxes[:, 1] - boxes[:, 0])

    # Offset beyond the threshold.
    offset = centres[0] - centres[1]
    excess = np.maximum(np.abs(offset) - threshold * sizes.sum(0), 0) * np.sign(offset)
    if not excess.any():
        return []

    x, y = excess / np.linalg.norm(offset)
    relations = []
    if abs(x) > 0.5:
        relations.append("left of" if x < 0 else "right of")
    if abs(y) > 0.5:
        relations.append("above" if y < 0 else "below")
    return relations


def read_metadata(file: str | Path) -> list[Wish]:
    """Read GenEval's `evaluation_metadata.jsonl`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not as it should be; the message names the line.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"GenEval's prompts {path} do not exist; get prompts/evaluation_metadata.jsonl from "
            "github.com/djghosh13/geneval"
        )
    remedy = "get evaluation_metadata.jsonl again"
    wishes = load_records(path, TypeAdapter(Wish), "metadata of GenEval", remedy)
    if not wishes:
        raise ValueError(f"{path} has 0 prompts; {remedy}")
    return wishes


def scores(tags: Sequence[str], correct: Sequence[bool]) -> dict[str, Interval]:
    """Return the share of correct pictures in each task, and `overall`, the mean of these shares.

    Intervals are of 95 %: Wilson's (1927) for a task, and from these for the overall
    score.

    Args:
        tags: Task of each picture.
        correct: Verdict on each picture.
    """
    names = np.asarray(tags)
    right = np.asarray(correct, dtype=bool)
    shares = {}
    for task in TASKS:
        in_task = right[names == task]
        if len(in_task):
            bounds = binomtest(int(in_task.sum()), len(in_task)).proportion_ci(method="wilson")
            mean = float(in_task.mean())
            shares[task] = Interval(mean, bounds.low, bounds.high, len(in_task))
    return {**shares, "overall": _mean(list(shares.values()))}


def differences(
    tags: Sequence[str], correct: Sequence[bool], other: Sequence[bool]
) -> dict[str, Interval]:
    """Return by how much the shares of `scores` exceed another schedule's, paired by picture.

    Args:
        tags: Task of each picture.
        correct: Verdict on each picture.
        other: Verdicts on the other schedule's pictures of the same prompts and noises.
    """
    names = np.asarray(tags)
    gain = np.asarray(correct, dtype=float) - np.asarray(other, dtype=float)
    gains = {}
    for task in TASKS:
        in_task = names == task
        if in_task.any():
            gains[task] = Interval.of(gain[in_task])
    return {**gains, "overall": _mean(list(gains.values()))}


def _mean(parts: Sequence[Interval]) -> Interval:
    """Return the mean of independent estimates, with its interval."""
    mean = float(np.mean([part.mean for part in parts]))
    n = sum(part.n for part in parts)
    halves = [part.half for part in parts if part.half is not None]
    if len(halves) < len(parts):
        return Interval(mean, None, None, n)
    half = float(np.sqrt(sum(half**2 for half in halves))) / len(parts)
    return Interval(mean, mean - half, mean + half, n)
