"""Scenes of coloured garments for a GenEval of our own: prompts, and pictures that satisfy them.

A wish is a record like GenEval's metadata (`geneval.rules`), for one of its six tasks.
A scene shows what a wish asks for and nothing else, with the boxes of its objects, so
that detectors can be trained and tested on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product
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

CANVAS = 64  # side of a scene in pixels
SIDES = {1: (24, 34), 2: (21, 28), 3: (18, 24), 4: (17, 22)}  # of garments, by their number
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
DRAWN = 0.15  # least brightness of a garment's pixels, where full brightness is 1


@dataclass(frozen=True)
class Object:
    """A garment in a scene.

    Attributes:
        garment: Its class.
        colour: Its colour.
        box: x1, y1, x2, y2 in pixels, ends included.
    """

    garment: str
    colour: str
    box: tuple[int, int, int, int]


class Content(TypedDict):
    """The part of a wish that a scene must show."""

    include: list[Clause]


# --------------------------------------------------------------------------------------------------
# Wishes
# --------------------------------------------------------------------------------------------------


def wishes() -> dict[str, list[Wish]]:
    """Return all possible wishes by GenEval's task."""
    by_task: dict[str, list[Wish]] = {task: [] for task in LINES}

    def add(tag: Task, prompt: str, *include: Clause) -> Wish:
        wish: Wish = {"tag": tag, "include": list(include), "prompt": prompt}
        by_task[tag].append(wish)
        return wish

    # One garment.
    for name in GARMENTS:
        add("single_object", _one(name), _clause(name))
    for colour, name in product(COLOURS, GARMENTS):
        add("colors", _one(colour, name), _clause(name, color=colour))

    # Several of a kind, and no more.
    for name, count in product(GARMENTS, NUMBERS):
        prompt = f"{NUMBERS[count]} {plural(name)}"
        wish = add("counting", prompt, _clause(name, count=count))
        wish["exclude"] = [_clause(name, count=count + 1)]

    # Two garments, and where they are.
    for a, b in permutations(GARMENTS, 2):
        add("two_object", f"{_one(a)} and {_one(b)}", _clause(a), _clause(b))
        for relation in RELATIONS:
            prompt = f"{_one(a)} {relation} {_one(b)}"
            add("position", prompt, _clause(b), _clause(a, position=(relation, 0)))

    # Two garments of two colours.
    kinds = list(product(COLOURS, GARMENTS))
    for (c, a), (d, b) in product(kinds, kinds):
        if a != b and c != d:
            prompt = f"{_one(c, a)} and {_one(d, b)}"
            add("color_attr", prompt, _clause(a, color=c), _clause(b, color=d))
    return by_task


def listed(seed: int) -> list[Wish]:
    """Return as many wishes of each task as GenEval has prompts, 553 in all.

    Wishes repeat where a task has fewer.

    Args:
        seed: Seed of the choice.
    """
    chosen = []
    for task, options in wishes().items():
        draw = np.random.default_rng((seed, TASKS.index(task)))
        rounds = -(-LINES[task] // len(options))
        order = np.concatenate([draw.permutation(len(options)) for _ in range(rounds)])
        chosen += [options[i] for i in order[: LINES[task]]]
    return chosen


def plural(garment: str) -> str:
    """Return the plural of a garment."""
    if garment == "dress":
        return "dresses"
    return garment if garment.endswith("s") else f"{garment}s"


def _one(*words: str) -> str:
    """Return words with an article."""
    return " ".join(("an" if words[0] == "orange" else "a", *words))


def _clause(
    garment: str,
    count: int = 1,
    color: str | None = None,
    position: tuple[Relation, int] | None = None,
) -> Clause:
    """Return a clause without the parts that are None."""
    clause: Clause = {"class": garment, "count": count}
    if color is not None:
        clause["color"] = color
    if position is not None:
        clause["position"] = position
    return clause


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------


class Wardrobe:
    """Garments that scenes are drawn with.

    Args:
        pictures: Shape (n, 1, 32, 32), in [-1, 1], with a black frame of 2 pixels.
        labels: Classes, shape (n,).
    """

    def __init__(self, pictures: Tensor, labels: Tensor):
        self.pictures = (pictures[:, :, 2:-2, 2:-2] + 1) / 2
        self.of: dict[str, np.ndarray] = {}
        for label, name in enumerate(GARMENTS):
            self.of[name] = (labels == label).nonzero()[:, 0].numpy()

    def scene(self, wish: Content | Wish, draw: np.random.Generator) -> tuple[Tensor, list[Object]]:
        """Draw a scene whose objects do not overlap.

        Args:
            wish: What it must show.
            draw: Source of what the wish leaves open.

        Returns:
            The picture (3, 64, 64) in [0, 1], and its objects.
        """
        # One clause for each object.
        clauses: list[Clause] = []
        for clause in wish["include"]:
            clauses += [clause] * clause["count"]

        # Garments, cut out, and their colours.
        colours = []
        cuts = []
        for clause in clauses:
            colours.append(clause.get("color") or str(draw.choice(list(COLOURS))))
            cuts.append(self._cut(clause["class"], SIDES[len(clauses)], draw))

        # Places; all are drawn anew until they fit.
        while True:
            boxes = [_place(cut, draw) for cut in cuts]
            if not _overlap(boxes) and _related(clauses, boxes):
                break

        # Picture.
        canvas = torch.zeros(3, CANVAS, CANVAS)
        objects = []
        for clause, colour, cut, box in zip(clauses, colours, cuts, boxes, strict=True):
            x1, y1, x2, y2 = box
            canvas[:, y1 : y2 + 1, x1 : x2 + 1] = cut * torch.tensor(COLOURS[colour])[:, None, None]
            objects.append(Object(clause["class"], colour, box))
        return canvas, objects

    def _cut(self, name: str, sides: tuple[int, int], draw: np.random.Generator) -> Tensor:
        """Return a garment of a class, resized and without its dark margin, (h, w) in [0, 1]."""
        number = draw.choice(self.of[name])
        low, high = sides
        side = int(draw.integers(low, high + 1))
        picture = F.interpolate(
            self.pictures[number][None], (side, side), mode="bilinear", antialias=True
        )[0, 0]

        # Bounding box of the bright pixels.
        bright = picture > DRAWN
        rows = bright.any(1).nonzero()[:, 0]
        columns = bright.any(0).nonzero()[:, 0]
        return picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

    def anything(self, draw: np.random.Generator) -> Content:
        """Return a wish for one to four garments of any class and colour."""
        names = draw.choice(GARMENTS, draw.integers(1, 5))
        return {"include": [_clause(str(name)) for name in names]}


class FashionScenes(CaptionedImages):
    """Scenes (3, 64, 64) of all wishes, each task as often as the others, to train on prompts."""

    def __init__(self, root: str | Path, split: Split = "train", download: bool = False):
        # Captions of all wishes, and the number of each task's first one.
        self.wishes = wishes()
        self.captions = []
        self.first = {}
        for task, options in self.wishes.items():
            self.first[task] = len(self.captions)
            self.captions += [wish["prompt"] for wish in options]

        super().__init__(root, split, items_each=20, download=download)
        self.wardrobe = Wardrobe(self.garments, self.labels)

    def _make(self, i: int) -> tuple[Tensor, int]:
        draw = np.random.default_rng((1, i))
        task = TASKS[i % len(TASKS)]
        number = int(draw.integers(len(self.wishes[task])))
        picture, _ = self.wardrobe.scene(self.wishes[task][number], draw)
        return picture * 2 - 1, self.first[task] + number


def _place(cut: Tensor, draw: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw the box of a garment (h, w) in the scene."""
    height, width = cut.shape
    x = int(draw.integers(CANVAS - width + 1))
    y = int(draw.integers(CANVAS - height + 1))
    return x, y, x + width - 1, y + height - 1


def _overlap(boxes: Sequence[Sequence[int]]) -> bool:
    """Return whether any two boxes overlap or touch."""
    for a, b in combinations(boxes, 2):
        in_columns = a[0] <= b[2] + 1 and b[0] <= a[2] + 1
        in_rows = a[1] <= b[3] + 1 and b[1] <= a[3] + 1
        if in_columns and in_rows:
            return True
    return False


def _related(clauses: Sequence[Clause], boxes: Sequence[Sequence[int]]) -> bool:
    """Return whether each box is in its clause's relation to the first, and in no other."""
    threshold = Rules().position_threshold
    for clause, box in zip(clauses, boxes, strict=True):
        if "position" in clause:
            relation, _ = clause["position"]
            if relative_position(box, boxes[0], threshold) != [relation]:
                return False
    return True
