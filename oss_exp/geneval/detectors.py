"""Detectors of the objects that GenEval's prompts name: the protocol, and a small one for garments.

`coco.COCODetector` is the detector of the public program. A detector finds the objects
of images by class, and names their colours.
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
class Detection:
    """An object in an image.

    Attributes:
        box: x1, y1, x2, y2 in pixels, ends included, and the score.
        mask: True in the object's pixels, shape (H, W).
    """

    box: Box
    mask: Tensor


class Detector(Protocol):
    """The interface of detectors.

    Attributes:
        rules: Thresholds for the detector's scores.
        fingerprint: SHA-256 of its weights.
    """

    rules: Rules
    fingerprint: str

    def detect(self, images: Tensor) -> list[dict[str, list[Detection]]]:
        """Return the objects of each image (B, 3, H, W), in [0, 1], by class."""
        ...

    def colour(self, image: Tensor, name: str, seen: Detection) -> str:
        """Return the colour of an object of class `name` in an image (3, H, W)."""
        ...


def look(
    detector: Detector, image: Tensor, seen: Mapping[str, Sequence[Detection]], wanted: Wish
) -> Verdict:
    """Return GenEval's verdict on an image.

    Args:
        detector: The detector, which names colours where they matter.
        image: Shape (3, H, W), in [0, 1].
        seen: The detector's objects in the image, by class.
        wanted: What the image must show.
    """
    boxes: dict[str, list[Box]] = {}
    detection_of: dict[Box, Detection] = {}
    for name, detections in seen.items():
        boxes[name] = []
        for detection in detections:
            boxes[name].append(detection.box)
            detection_of[detection.box] = detection

    def colour_of(name: str, box: Box) -> str:
        return detector.colour(image, name, detection_of[box])

    return judge(wanted, boxes, colour_of, detector.rules)


class FashionDetector(Shipped):
    """A small detector of garments on black, after CenterNet (Zhou et al. 2019, arXiv 1904.07850).

    It predicts a heat map of object centres for each class, and in each cell of 4 x 4
    pixels the distances to the four edges of the object. An object is a cell that is
    hotter than its eight neighbours.

    Args:
        name: Name of the network, used in error messages.
        fingerprint: SHA-256 of the weights; empty for an untrained network.
    """

    asset = "fashion_detector.safetensors"
    task = "fit_detector"
    what = "detector"
    CELL = 4
    rules = Rules(threshold=0.3, counting_threshold=0.3)

    def __init__(self, name: str = "fashion_detector", fingerprint: str = ""):
        super().__init__(name, fingerprint)

        # A U-Net of three levels.
        self.stem = nn.Sequential(_conv(3, 24, stride=2), _conv(24, 48, stride=2), _conv(48, 48))
        self.down = nn.ModuleList([_stage(48, 64), _stage(64, 96)])
        self.up = nn.ModuleList([_conv(96 + 64, 64), _conv(64 + 48, 64)])

        # Heads.
        self.heat = nn.Conv2d(64, len(GARMENTS), 1)
        self.edges = nn.Conv2d(64, 4, 1)
        assert self.heat.bias is not None
        nn.init.constant_(self.heat.bias, -4.0)  # few cells have an object

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return heat map and edges of images (B, 3, H, W) in [0, 1].

        Returns:
            Logits of the heat, shape (B, classes, H/4, W/4), and distances from the
            centre of each cell to the left, upper, right and lower edge in pixels,
            shape (B, 4, H/4, W/4).
        """
        x = self.stem(images.float())
        levels = [x]
        for stage in self.down:
            x = stage(x)
            levels.append(x)
        for layer, finer in zip(self.up, levels[-2::-1], strict=True):
            x = layer(torch.cat([F.interpolate(x, scale_factor=2), finer], dim=1))
        return self.heat(x), F.softplus(self.edges(x)) * self.CELL

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[dict[str, list[Detection]]]:
        """Return the garments of each image (B, 3, H, W), whose sides are multiples of 16."""
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[1] != 3 or shape[2] % 16 or shape[3] % 16:
            raise ValueError(
                "the detector of garments takes RGB images whose sides are multiples of 16, "
                f"got {shape}"
            )

        # Peaks of the heat; a cell has one object at most.
        heat, edges = self(images)
        best, kind = heat.sigmoid().max(1)
        peak = (best == F.max_pool2d(best, 3, 1, 1)) & (best > self.rules.threshold)

        # Boxes around them.
        objects: list[dict[str, list[Detection]]] = [{} for _ in images]
        for number, row, column in peak.nonzero().tolist():
            left, up, right, down = edges[number, :, row, column].tolist()
            x = self._centre(column)
            y = self._centre(row)
            box = (x - left, y - up, x + right, y + down, float(best[number, row, column]))
            detection = Detection(box, _inside(images[number], box))
            name = GARMENTS[int(kind[number, row, column])]
            objects[number].setdefault(name, []).append(detection)
        return objects

    def colour(self, image: Tensor, name: str, seen: Detection) -> str:
        """Return the colour nearest to the mean of the bright pixels in the box."""
        brightness = image.amax(0)
        mask = seen.mask & (brightness > 0.2 * brightness.amax())
        return nearest_colours((image * mask).sum((1, 2))[None])[0]

    def loss(self, images: Tensor, heat: Tensor, edges: Tensor, middles: Tensor) -> Tensor:
        """Return CenterNet's focal loss plus the mean error of the edges, in cells.

        Args:
            images: Shape (B, 3, H, W), in [0, 1].
            heat: Target heat, shape (B, classes, h, w), 1 at a centre and less around.
            edges: Target distances of the edges in pixels, shape (B, 4, h, w).
            middles: True in the cells with a centre, shape (B, h, w).
        """
        logits, distances = self(images)
        score = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)

        # Focal loss of the heat, CenterNet eq. (1).
        centre = heat == 1
        positive = ((1 - score) ** 2 * score.log())[centre].sum()
        negative = ((1 - heat) ** 4 * score**2 * (1 - score).log())[~centre].sum()

        # Error of the edges.
        error = (distances.float() - edges).abs().mean(1)[middles].sum() / self.CELL
        return (error - positive - negative) / centre.sum().clamp(min=1)

    @classmethod
    def _centre(cls, cell: int) -> float:
        """Return the coordinate in pixels of a cell's centre."""
        return cls.CELL * (cell + 0.5) - 0.5


def nearest_colours(mean: Tensor) -> list[str]:
    """Return the names of the colours nearest by direction to colours (n, 3) of any brightness."""
    palette = torch.tensor(list(COLOURS.values())).to(mean)
    closest = (F.normalize(mean, dim=1) @ F.normalize(palette, dim=1).T).argmax(1)
    names = list(COLOURS)
    return [names[i] for i in closest]


def targets(
    objects: Sequence[tuple[str, Sequence[float]]], side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `FashionDetector` should predict for an image.

    The heat of an object is a Gaussian whose standard deviation is a sixth of its size.

    Args:
        objects: Classes and boxes (x1, y1, x2, y2) in pixels.
        side: Side of the square image in pixels.

    Returns:
        Heat (classes, h, w), edges (4, h, w) and centres (h, w), as
        `FashionDetector.loss` takes them for a batch.
    """
    cell = FashionDetector.CELL
    cells = side // cell
    heat = torch.zeros(len(GARMENTS), cells, cells)
    edges = torch.zeros(4, cells, cells)
    middles = torch.zeros(cells, cells, dtype=torch.bool)
    centres = cell * (torch.arange(cells) + 0.5) - 0.5

    for name, (x1, y1, x2, y2) in objects:
        column = int(((x1 + x2 + 1) / 2) // cell)
        row = int(((y1 + y2 + 1) / 2) // cell)

        # Heat around the object's cell.
        across = (torch.arange(cells) - column) * cell / max((x2 - x1 + 1) / 6, 1)
        down = (torch.arange(cells) - row) * cell / max((y2 - y1 + 1) / 6, 1)
        blob = torch.exp(-(across**2 + down[:, None] ** 2) / 2)
        kind = GARMENTS.index(name)
        heat[kind] = torch.maximum(heat[kind], blob)

        # Edges seen from the centre of that cell.
        x, y = float(centres[column]), float(centres[row])
        edges[:, row, column] = torch.tensor([x - x1, y - y1, x2 - x, y2 - y])
        middles[row, column] = True
    return heat, edges, middles


def _inside(image: Tensor, box: Sequence[float]) -> Tensor:
    """Return a mask (H, W) of an image (3, H, W), True in the box."""
    x1, y1, x2, y2 = box[:4]
    rows = torch.arange(image.shape[1], device=image.device)
    columns = torch.arange(image.shape[2], device=image.device)
    in_rows = (rows >= y1 - 0.5) & (rows <= y2 + 0.5)
    in_columns = (columns >= x1 - 0.5) & (columns <= x2 + 0.5)
    return in_rows[:, None] & in_columns


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, outputs, stride=2), _conv(outputs, outputs))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
