"""Scenes of coloured garments for a GenEval of our own: what a prompt wants, and pictures that show it.

A wish is a record like GenEval's metadata (`evaluation.geneval`), for one of its six
tasks. A scene shows what it wants and nothing else, with the boxes of its objects, so
that detectors can be trained and judged on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import TypedDict, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from oss_exp.data.captioned import CaptionedImages
from oss_exp.data.images import Split
from oss_exp.geneval.garments import COLOURS, GARMENTS
from oss_exp.geneval.rules import TASKS, Clause, Relation, Rules, Task, Wish, relative_position

CANVAS = 64
SIDES = {
    1: (24, 34),
    2: (21, 28),
    3: (18, 24),
    4: (17, 22),
}  # pixels of a garment's picture, by how many there are
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS: tuple[Relation, ...] = get_args(Relation)
LINES = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
DRAWN = 0.15  # of full brightness, above which a pixel is of a garment


@dataclass(frozen=True)
class Object:
    """A garment in a scene. box: x1, y1, x2, y2, pixels, all its own."""

    garment: str
    colour: str
    box: tuple[int, int, int, int]


class Content(TypedDict):
    """What a scene must show, which is part of a wish."""

    include: list[Clause]


def wishes() -> dict[str, list[Wish]]:
    """All that can be wished, by GenEval's task."""
    pairs = list(permutations(GARMENTS, 2))
    kinds = list(product(COLOURS, GARMENTS))
    return {
        "single_object": [_wish("single_object", _one(name), [_clause(name)]) for name in GARMENTS],
        "two_object": [
            _wish("two_object", f"{_one(a)} and {_one(b)}", [_clause(a), _clause(b)])
            for a, b in pairs
        ],
        "counting": [
            {
                **_wish(
                    "counting", f"{NUMBERS[count]} {plural(name)}", [_clause(name, count=count)]
                ),
                "exclude": [_clause(name, count=count + 1)],
            }
            for name, count in product(GARMENTS, NUMBERS)
        ],
        "colors": [_wish("colors", _one(c, name), [_clause(name, color=c)]) for c, name in kinds],
        "position": [
            _wish(
                "position",
                f"{_one(a)} {where} {_one(b)}",
                [_clause(b), _clause(a, position=(where, 0))],
            )
            for (a, b), where in product(pairs, RELATIONS)
        ],
        "color_attr": [
            _wish(
                "color_attr",
                f"{_one(c, a)} and {_one(d, b)}",
                [_clause(a, color=c), _clause(b, color=d)],
            )
            for (c, a), (d, b) in product(kinds, kinds)
            if a != b and c != d
        ],
    }


def listed(seed: int) -> list[Wish]:
    """As many wishes of each task as GenEval has prompts, 553 in all; some repeat where there are not so many."""
    found = []
    for task, known in wishes().items():
        draw = np.random.default_rng((seed, TASKS.index(task)))
        rounds = [draw.permutation(len(known)) for _ in range(-(-LINES[task] // len(known)))]
        found += [known[i] for i in np.concatenate(rounds)[: LINES[task]]]
    return found


def plural(garment: str) -> str:
    return (
        garment
        if garment.endswith("s") and garment != "dress"
        else f"{garment}{'es' if garment == 'dress' else 's'}"
    )


def _one(*words: str) -> str:
    return " ".join(("an" if words[0] == "orange" else "a", *words))


def _clause(
    garment: str,
    count: int = 1,
    color: str | None = None,
    position: tuple[Relation, int] | None = None,
) -> Clause:
    clause: Clause = {"class": garment, "count": count}
    if color is not None:
        clause["color"] = color
    if position is not None:
        clause["position"] = position
    return clause


def _wish(tag: Task, prompt: str, include: list[Clause]) -> Wish:
    return {"tag": tag, "include": include, "prompt": prompt}


# --------------------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------------------


class Wardrobe:
    """Garments to draw scenes with. pictures (n, 1, 32, 32) in [-1, 1] with a black frame of 2 pixels, labels (n,)."""

    def __init__(self, pictures: Tensor, labels: Tensor):
        self.pictures = (pictures[:, :, 2:-2, 2:-2] + 1) / 2
        self.of = {
            name: (labels == number).nonzero()[:, 0].numpy() for number, name in enumerate(GARMENTS)
        }

    def scene(self, wish: Content | Wish, draw: np.random.Generator) -> tuple[Tensor, list[Object]]:
        """(3, 64, 64) in [0, 1]; what the wish leaves open is drawn at random. Objects do not overlap."""
        clauses = [clause for clause in wish["include"] for _ in range(clause["count"])]
        low, high = SIDES[len(clauses)]
        sprites = []
        for clause in clauses:
            colour = clause.get("color") or str(draw.choice(list(COLOURS)))
            number = draw.choice(self.of[clause["class"]])
            side = int(draw.integers(low, high + 1))
            picture = F.interpolate(
                self.pictures[number][None], (side, side), mode="bilinear", antialias=True
            )[0, 0]
            rows, columns = ((picture > DRAWN).any(axis).nonzero()[:, 0] for axis in (1, 0))
            cut = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            sprites.append((clause["class"], colour, cut))
        while True:
            boxes = [_place(cut, draw) for *_, cut in sprites]
            if not _overlap(boxes) and _related(clauses, boxes):
                break
        canvas, objects = torch.zeros(3, CANVAS, CANVAS), []
        for (name, colour, cut), box in zip(sprites, boxes, strict=True):
            x1, y1, x2, y2 = box
            canvas[:, y1 : y2 + 1, x1 : x2 + 1] = cut * torch.tensor(COLOURS[colour])[:, None, None]
            objects.append(Object(name, colour, box))
        return canvas, objects

    def anything(self, draw: np.random.Generator) -> Content:
        """One to four garments of any kinds and colours."""
        names = draw.choice(GARMENTS, draw.integers(1, 5))
        return {"include": [_clause(str(name)) for name in names]}


class FashionScenes(CaptionedImages):
    """(3, 64, 64): scenes of all wishes, each task as often as the others, for a model of prompts."""

    def __init__(self, root: str | Path, split: Split = "train", download: bool = False):
        self.wishes = wishes()
        self.captions = [wish["prompt"] for known in self.wishes.values() for wish in known]
        self.first = dict(
            zip(self.wishes, np.cumsum([0, *map(len, self.wishes.values())]).tolist(), strict=False)
        )
        super().__init__(root, split, items_each=20, download=download)
        self.wardrobe = Wardrobe(self.garments, self.labels)

    def _make(self, i: int) -> tuple[Tensor, int]:
        draw, task = np.random.default_rng((1, i)), TASKS[i % len(TASKS)]
        number = int(draw.integers(len(self.wishes[task])))
        picture, _ = self.wardrobe.scene(self.wishes[task][number], draw)
        return picture * 2 - 1, self.first[task] + number


def _place(cut: Tensor, draw: np.random.Generator) -> tuple[int, int, int, int]:
    height, width = cut.shape
    x, y = int(draw.integers(CANVAS - width + 1)), int(draw.integers(CANVAS - height + 1))
    return x, y, x + width - 1, y + height - 1


def _overlap(boxes: Sequence[Sequence[int]]) -> bool:
    """Do any two touch?"""
    return any(
        a[0] <= b[2] + 1 and b[0] <= a[2] + 1 and a[1] <= b[3] + 1 and b[1] <= a[3] + 1
        for number, a in enumerate(boxes)
        for b in boxes[:number]
    )


def _related(clauses: Sequence[Clause], boxes: Sequence[Sequence[int]]) -> bool:
    """Is each where it should be to the first, and nowhere else?"""
    return all(
        relative_position(box, boxes[0], Rules().position_threshold) == [clause["position"][0]]
        for clause, box in zip(clauses, boxes, strict=True)
        if "position" in clause
    )
