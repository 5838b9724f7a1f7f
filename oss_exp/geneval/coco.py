"""GenEval's detector and colour classifier on transformers: Mask2Former on COCO, and CLIP.

The public program runs the same networks on mmdet 2 and open_clip. Instances are
derived from the network's outputs as mmdet does it, because transformers' own
post-processing resizes all masks to 384 x 384 pixels.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oss_exp.evaluation.clip import CLIP, as_uint8, open_pretrained
from oss_exp.files import find_asset, sha256
from oss_exp.geneval.detectors import Detection
from oss_exp.geneval.rules import COLOURS, Box, Rules
from oss_exp.models.checkpoints.weights import digest

TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
GREY = 0x99 / 255  # the pixels around a cut-out object


class COCODetector(nn.Module):
    """GenEval's detector: Mask2Former for objects, CLIP for their colours.

    Cheng et al. 2022, arXiv 2112.01527, and Radford et al. 2021, arXiv 2103.00020.

    Args:
        detector: Folder or hub id of Mask2Former; the default is GenEval's.
        clip: Folder or hub id of CLIP; the default is GenEval's.
        names: A file with the name of each of the detector's classes, one a line: a
            path or the name of a shipped file.
    """

    rules = Rules()

    def __init__(
        self,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        names: str | Path = "geneval_objects.txt",
    ):
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        super().__init__()
        self.names = find_asset(names, "names of classes").read_text().splitlines()

        # Networks.
        setting = "task.detector.detector"
        self.processor = open_pretrained(AutoImageProcessor, detector, setting)
        self.network = open_pretrained(Mask2FormerForUniversalSegmentation, detector, setting)
        self.clip = CLIP(clip, "task.detector.clip")
        count = self.network.config.num_labels
        if count != len(self.names):
            raise ValueError(
                f"task.detector.detector={detector} has {count} classes, "
                f"{names} has {len(self.names)} names; choose a detector of COCO's instances"
            )

        digests = f"{digest(self.network.state_dict())} {digest(self.clip.state_dict())}"
        self.fingerprint = sha256(digests.encode())
        self.texts: dict[str, Tensor] = {}  # class -> features (10, D) of the colours
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[dict[str, list[Detection]]]:
        """Return the objects of each image by class.

        Candidates are the 100 likeliest pairs of a query and a class. A score is the
        class's probability times the mean of the mask.

        Args:
            images: Shape (B, 3, H, W), in [0, 1].
        """
        return [self._instances(image) for image in images]

    @torch.no_grad()
    def colour(self, image: Tensor, name: str, seen: Detection) -> str:
        """Return the colour that CLIP finds likeliest for the object, cut out on grey."""
        height, width = image.shape[1:]
        x1, y1, x2, y2 = map(round, seen.box[:4])
        rows = slice(max(y1, 0), max(min(y2, height), y1 + 1))
        columns = slice(max(x1, 0), max(min(x2, width), x1 + 1))

        object_on_grey = torch.where(seen.mask, image, image.new_tensor(GREY))
        features = self.clip.images([object_on_grey[:, rows, columns]])
        return COLOURS[int((features @ self._colour_features(name).T).argmax())]

    def _instances(self, image: Tensor) -> dict[str, list[Detection]]:
        masks, classes = self._predict(image)
        scores, pairs = classes.flatten().topk(min(100, classes.numel()))
        objects: dict[str, list[Detection]] = {}
        for score, pair in zip(scores.tolist(), pairs.tolist(), strict=True):
            if score <= self.rules.threshold:  # the mask's mean is at most 1
                continue

            # Mask of the query.
            query, kind = divmod(pair, classes.shape[1])
            mask = masks[query] > 0
            if not bool(mask.any()):
                continue

            # Score of the object.
            score *= float(masks[query].sigmoid()[mask].mean())
            if score > self.rules.threshold:
                detection = Detection(_box(mask, score), mask)
                objects.setdefault(self.names[kind], []).append(detection)
        return objects

    def _predict(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return mask logits (queries, H, W) and class probabilities (queries, classes)."""
        inputs = self.processor(images=[as_uint8(image)], return_tensors="pt").to(image.device)
        output = self.network(**inputs)

        # Part of the input that is not padding.
        inside = inputs["pixel_mask"][0].bool()
        rows = int(inside.any(1).sum())
        columns = int(inside.any(0).sum())

        # Masks in the image's pixels.
        padded = _resized(output.masks_queries_logits, inputs["pixel_values"].shape[2:])
        masks = _resized(padded[..., :rows, :columns], image.shape[1:])[0]
        return masks, output.class_queries_logits[0].softmax(-1)[:, :-1]

    def _colour_features(self, name: str) -> Tensor:
        """Return the features (10, D) of a class in each colour, averaged over the templates."""
        if name not in self.texts:
            prompts = []
            for colour, template in product(COLOURS, TEMPLATES):
                prompts.append(template.format(colour=colour, name=name))
            features = self.clip.texts(prompts).unflatten(0, (len(COLOURS), -1))
            self.texts[name] = F.normalize(features.mean(1), dim=-1)
        return self.texts[name]


def _resized(masks: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(masks, tuple(size), mode="bilinear", align_corners=False)


def _box(mask: Tensor, score: float) -> Box:
    """Return the bounding box of a mask (H, W), its ends exclusive."""
    rows = mask.any(1).nonzero()[:, 0]
    columns = mask.any(0).nonzero()[:, 0]
    x1, y1 = float(columns[0]), float(rows[0])
    x2, y2 = float(columns[-1] + 1), float(rows[-1] + 1)
    return x1, y1, x2, y2, score
