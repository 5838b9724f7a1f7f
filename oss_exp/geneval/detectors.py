"""What finds the objects that GenEval asks for: a small network that knows our garments, and Mask2Former with CLIP.

A detector takes images (B, 3, H, W) in [0, 1] and gives for each its objects by class; it tells their colours too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oss_exp.evaluation.features import Shipped
from oss_exp.geneval.garments import COLOURS, GARMENTS
from oss_exp.geneval.rules import Box, Rules, Verdict, Wish, judge


@dataclass(frozen=True, eq=False)
class Seen:
    """box: x1, y1, x2, y2, pixels, all its own, and the score; mask (H, W): which pixels are the object's."""

    box: Box
    mask: Tensor


class Detector(Protocol):
    """rules: the thresholds that its scores are made for. fingerprint: SHA-256 of its weights."""

    rules: Rules
    fingerprint: str

    def detect(self, images: Tensor) -> list[dict[str, list[Seen]]]:
        """images (B, 3, H, W) in [0, 1]."""
        ...

    def colour(self, image: Tensor, name: str, seen: Seen) -> str:
        """Of an object of this class in image (3, H, W)."""
        ...


def look(
    detector: Detector, image: Tensor, seen: Mapping[str, Sequence[Seen]], wanted: Wish
) -> Verdict:
    """GenEval's verdict on image (3, H, W), of which `detect` gave `seen`."""
    owner = {each.box: each for objects in seen.values() for each in objects}
    boxes = {name: [each.box for each in objects] for name, objects in seen.items()}
    return judge(
        wanted, boxes, lambda name, box: detector.colour(image, name, owner[box]), detector.rules
    )


class FashionDetector(Shipped):
    """Finds garments on black: a heat map of middles for each class, and how far the four edges are (CenterNet, Zhou et
    al. 2019, arXiv 1904.07850). A cell is 4 x 4 pixels; a peak among its eight neighbours is an object.
    """

    asset, task, what = "fashion_detector.safetensors", "fit_detector", "detector"
    CELL = 4
    rules = Rules(threshold=0.3, counting_threshold=0.3)

    def __init__(self, name: str = "fashion_detector", fingerprint: str = ""):
        super().__init__(name, fingerprint)
        self.stem = nn.Sequential(_conv(3, 24, stride=2), _conv(24, 48, stride=2), _conv(48, 48))
        self.down = nn.ModuleList([_stage(48, 64), _stage(64, 96)])
        self.up = nn.ModuleList([_conv(96 + 64, 64), _conv(64 + 48, 64)])
        self.heat, self.edges = nn.Conv2d(64, len(GARMENTS), 1), nn.Conv2d(64, 4, 1)
        assert self.heat.bias is not None
        nn.init.constant_(self.heat.bias, -4.0)  # few cells have an object

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> heat (B, classes, H/4, W/4) before the sigmoid, distances of the edges (B, 4, H/4, W/4)."""
        x = self.stem(images.float())
        levels = [x]
        for stage in self.down:
            levels.append(x := stage(x))
        for layer, finer in zip(self.up, levels[-2::-1], strict=True):
            x = layer(torch.cat([F.interpolate(x, scale_factor=2), finer], dim=1))
        return self.heat(x), F.softplus(self.edges(x)) * self.CELL

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[dict[str, list[Seen]]]:
        if images.ndim != 4 or images.shape[1] != 3 or any(side % 16 for side in images.shape[2:]):
            raise ValueError(
                f"the detector of garments takes RGB images whose sides are multiples of 16, got {tuple(images.shape)}"
            )
        heat, edges = self(images)
        score = heat.sigmoid()
        best, kind = score.max(1)  # a cell has one object
        peak = (best == F.max_pool2d(best, 3, 1, 1)) & (best > self.rules.threshold)
        found: list[dict[str, list[Seen]]] = [{} for _ in images]
        for number, row, column in peak.nonzero().tolist():
            left, up, right, down = edges[number, :, row, column].tolist()
            x, y = self.CELL * (column + 0.5) - 0.5, self.CELL * (row + 0.5) - 0.5
            box = (x - left, y - up, x + right, y + down, float(best[number, row, column]))
            seen = Seen(box, _inside(images[number], box))
            found[number].setdefault(GARMENTS[int(kind[number, row, column])], []).append(seen)
        return found

    def colour(self, image: Tensor, name: str, seen: Seen) -> str:
        """The nearest to the mean colour of what is bright in the box."""
        bright = image.amax(0)
        mask = seen.mask & (bright > 0.2 * bright.amax())
        return nearest_colours((image * mask).sum((1, 2))[None])[0]

    def loss(self, images: Tensor, heat: Tensor, edges: Tensor, middles: Tensor) -> Tensor:
        """heat (B, classes, h, w) 1 at a middle and less around, edges (B, 4, h, w) where middles (B, h, w) are.

        The focal loss of CenterNet, and the mean error of the edges in cells.
        """
        raw, found = self(images)
        score, at = raw.float().sigmoid().clamp(1e-4, 1 - 1e-4), heat == 1
        positive = ((1 - score) ** 2 * score.log())[at].sum()
        negative = ((1 - heat) ** 4 * score**2 * (1 - score).log())[~at].sum()
        count = at.sum().clamp(min=1)
        error = (found.float() - edges).abs().mean(1)[middles].sum() / self.CELL
        return (error - positive - negative) / count


def nearest_colours(mean: Tensor) -> list[str]:
    """Of mean colours (n, 3) in any brightness, the names of the nearest by direction."""
    known = torch.tensor(list(COLOURS.values())).to(mean)
    closest = (F.normalize(mean, dim=1) @ F.normalize(known, dim=1).T).argmax(1)
    return [list(COLOURS)[i] for i in closest]


def targets(
    objects: Sequence[tuple[str, Sequence[float]]], side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Objects (class, x1, y1, x2, y2) of a square image -> heat (classes, h, w), edges (4, h, w), middles (h, w).

    Heat falls off as a Gaussian a sixth as wide as the object.
    """
    cells = side // FashionDetector.CELL
    heat, edges = torch.zeros(len(GARMENTS), cells, cells), torch.zeros(4, cells, cells)
    middles = torch.zeros(cells, cells, dtype=torch.bool)
    place = FashionDetector.CELL * (torch.arange(cells) + 0.5) - 0.5
    for name, (x1, y1, x2, y2) in objects:
        column, row = (
            int(((low + high + 1) / 2) // FashionDetector.CELL)
            for low, high in ((x1, x2), (y1, y2))
        )
        across = (torch.arange(cells) - column) * FashionDetector.CELL / max((x2 - x1 + 1) / 6, 1)
        down = (torch.arange(cells) - row) * FashionDetector.CELL / max((y2 - y1 + 1) / 6, 1)
        blob = torch.exp(-(across**2 + down[:, None] ** 2) / 2)
        kind = GARMENTS.index(name)
        heat[kind] = torch.maximum(heat[kind], blob)
        x, y = float(place[column]), float(place[row])
        edges[:, row, column] = torch.tensor([x - x1, y - y1, x2 - x, y2 - y])
        middles[row, column] = True
    return heat, edges, middles


def _inside(image: Tensor, box: Sequence[float]) -> Tensor:
    """(3, H, W) -> (H, W), True in the box."""
    rows, columns = (torch.arange(side, device=image.device) for side in image.shape[1:])
    x1, y1, x2, y2 = box[:4]
    return ((rows >= y1 - 0.5) & (rows <= y2 + 0.5))[:, None] & (
        (columns >= x1 - 0.5) & (columns <= x2 + 0.5)
    )


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, outputs, stride=2), _conv(outputs, outputs))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layers = (
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
    return nn.Sequential(*layers)
