"""GenEval: does a picture show what its prompt asks for? (Ghosh et al. 2023, arXiv 2310.11513.)

A detector says which objects are in a picture, a classifier which colour they have; the rules are pure functions of
what they said, those of the published program, its quirks too. An object is a box (x1, y1, x2, y2) in pixels with a
score; objects are listed by class, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
"""x1, y1, x2, y2, score."""

Clause = TypedDict(
    "Clause",
    {
        "class": str,
        "count": Count,
        "color": NotRequired[str],
        "position": NotRequired[tuple[Relation, Count]],
    },
)
"""So many objects of a class. position: where they stand, seen from those of the clause of this number."""


def _related(clauses: list[Clause]) -> list[Clause]:
    for number, clause in enumerate(clauses):
        if "position" in clause and clause["position"][1] >= number:
            raise ValueError(
                f"must relate objects to those of an earlier clause, got {clause['position']}"
            )
    return clauses


@with_config(Record.model_config)
class Wish(TypedDict):
    """A line of GenEval's metadata: what a picture of the prompt must show, and what it must not."""

    tag: Task
    include: Annotated[list[Clause], Field(min_length=1), AfterValidator(_related)]
    exclude: NotRequired[list[Clause]]
    prompt: str


@dataclass(frozen=True)
class Rules:
    """Which of the detector's objects count.

    threshold:          the score that they must exceed; counting_threshold: for prompts that ask for a number.
    max_objects:        of a class, the most confident ones.
    max_overlap:        IoU from which the less confident of two is dropped; 1: none is.
    position_threshold: share of the two sizes that an offset must exceed.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1


class VerdictRecord(Record):
    """What is kept of a `Verdict` on the picture of this number: boxes of x1, y1, x2, y2 and score, by class."""

    number: Count
    reasons: list[str]
    objects: dict[str, list[Box]]


@dataclass(frozen=True)
class Verdict:
    """reasons: what is wrong, empty where all is right. objects: those that counted, the most confident first."""

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
    """Is what a prompt of GenEval's wants among what was found? colour_of(class, box): asked only if it matters.

    Of a class as many objects as wanted are looked at, the most confident: all must have the colour, and all must stand
    where they should to all objects of the clause they are related to. `exclude` bounds their number.
    """
    objects = {
        name: kept
        for name, boxes in found.items()
        if (kept := counted(boxes, wanted["tag"], rules))
    }
    reasons: list[str] = []
    groups: list[Sequence[Box] | None] = []  # of each clause, where it is satisfied
    for clause in wanted.get("include", ()):
        name, count = clause["class"], clause["count"]
        seen = objects.get(name, [])[:count]
        wrong = _clause(clause, seen, groups, colour_of, rules)
        reasons += wrong
        groups.append(None if wrong else seen)
    for clause in wanted.get("exclude", ()):
        name, count = clause["class"], clause["count"]
        if len(objects.get(name, [])) >= count:
            reasons.append(f"expected {name}<{count}, found {len(objects[name])}")
    return Verdict(tuple(reasons), objects)


def _clause(
    clause: Clause,
    seen: Sequence[Box],
    groups: Sequence[Sequence[Box] | None],
    colour_of: Callable[[str, Box], str],
    rules: Rules,
) -> list[str]:
    """What is wrong with the objects seen."""
    name, count = clause["class"], clause["count"]
    if len(seen) < count:
        return [f"expected {name}>={count}, found {len(seen)}"]
    if "color" in clause:
        colours, colour = [colour_of(name, box) for box in seen], clause["color"]
        if (right := colours.count(colour)) < count:
            rest = ", ".join(
                f"{colours.count(other)} {other}" for other in COLOURS if other in colours
            )
            return [f"expected {colour} {name}>={count}, found {right} {colour}; and {rest}"]
    if "position" in clause:
        relation, target = clause["position"]
        if (others := groups[target]) is None:
            return [f"no target for {name} to be {relation}"]
        for box in seen:
            for other in others:
                relations = relative_position(box, other, rules.position_threshold)
                if relation not in relations:
                    return [
                        f"expected {name} {relation} target, found {' and '.join(relations)} target"
                    ]
    return []


def counted(boxes: Sequence[Box], tag: str, rules: Rules) -> list[Box]:
    """Those of a class that count for a prompt of this tag, the most confident first."""
    least = rules.counting_threshold if tag == "counting" else rules.threshold
    # Of equals the last comes first, as in the original.
    confident = sorted((box for box in reversed(boxes) if box[4] > least), key=lambda box: -box[4])
    kept: list[Box] = []
    for box in confident[: rules.max_objects]:
        if rules.max_overlap == 1 or all(iou(box, other) < rules.max_overlap for other in kept):
            kept.append(box)
    return kept


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of boxes, with or without a score, whose last pixel is theirs."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a[:4]) + area(*b[:4]) - common
    return common / union if union else 0.0


def relative_position(a: Sequence[float], b: Sequence[float], threshold: float) -> list[str]:
    """Where box a is, seen from b: of left of, right of, above and below none, one, or two for a diagonal.

    Offsets of the middles count for what exceeds `threshold` of the two sizes together, in units of the whole offset.
    """
    boxes = np.asarray([a[:4], b[:4]], dtype=float).reshape(2, 2, 2)  # (box, corner, axis)
    middles, sizes = boxes.mean(1), np.abs(boxes[:, 1] - boxes[:, 0])
    offset = middles[0] - middles[1]
    excess = np.maximum(np.abs(offset) - threshold * sizes.sum(0), 0) * np.sign(offset)
    if not excess.any():
        return []
    x, y = excess / np.linalg.norm(offset)
    known = (("left of", x < -0.5), ("right of", x > 0.5), ("above", y < -0.5), ("below", y > 0.5))
    return [name for name, holds in known if holds]


def read_metadata(file: str | Path) -> list[Wish]:
    """Lines of GenEval's `evaluation_metadata.jsonl`; ValueError says which line is not as it should be."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"GenEval's prompts {path} do not exist; get prompts/evaluation_metadata.jsonl from "
            "github.com/djghosh13/geneval"
        )
    wishes = load_records(
        path, TypeAdapter(Wish), "metadata of GenEval", "get evaluation_metadata.jsonl again"
    )
    if not wishes:
        raise ValueError(f"{path} has 0 prompts; get evaluation_metadata.jsonl again")
    return wishes


def scores(tags: Sequence[str], correct: Sequence[bool]) -> dict[str, Interval]:
    """Of each task that is there the share of right images, and `overall`, the mean of the tasks' shares.

    Intervals are of 95 %, a task's Wilson's (1927), overall's from those.
    """
    names, right = np.asarray(tags), np.asarray(correct, dtype=bool)
    found = {}
    for task in TASKS:
        own = right[names == task]
        if len(own):
            around = binomtest(int(own.sum()), len(own)).proportion_ci(method="wilson")
            found[task] = Interval(float(own.mean()), around.low, around.high, len(own))
    return {**found, "overall": _mean(list(found.values()))}


def differences(
    tags: Sequence[str], correct: Sequence[bool], other: Sequence[bool]
) -> dict[str, Interval]:
    """As `scores`, of how much larger the shares are than the other's on the same prompts and noises, pair by pair."""
    names, gain = (
        np.asarray(tags),
        np.asarray(correct, dtype=float) - np.asarray(other, dtype=float),
    )
    found = {task: Interval.of(gain[names == task]) for task in TASKS if (names == task).any()}
    return {**found, "overall": _mean(list(found.values()))}


def _mean(parts: Sequence[Interval]) -> Interval:
    """Of independent estimates."""
    mean, n = float(np.mean([part.mean for part in parts])), sum(part.n for part in parts)
    halves = [part.half for part in parts if part.half is not None]
    if len(halves) < len(parts):
        return Interval(mean, None, None, n)
    half = float(np.sqrt(sum(half**2 for half in halves))) / len(parts)
    return Interval(mean, mean - half, mean + half, n)
