"""GenEval's detector and colour classifier on transformers: Mask2Former on COCO, and CLIP.

The public program runs the same networks on mmdet 2 and open_clip. Instances are read off the network's answers here as
mmdet does, for transformers' own reading passes all masks through 384 x 384 pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oss_exp.evaluation.clip import CLIP, as_uint8, open_pretrained
from oss_exp.files import find_asset, sha256
from oss_exp.geneval.detectors import Seen
from oss_exp.geneval.rules import COLOURS, Rules
from oss_exp.models.checkpoints.weights import digest

TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
GREY = 0x99 / 255  # of what is not the object


class COCODetector(nn.Module):
    """Mask2Former (Cheng et al. 2022, arXiv 2112.01527) and CLIP (Radford et al. 2021, arXiv 2103.00020).

    detector, clip: folders or hub ids; GenEval's are facebook/mask2former-swin-small-coco-instance and
                    openai/clip-vit-large-patch14.
    names:          a file with the name of each of the detector's classes, one a line, by a path or as it is shipped.
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
        self.processor = open_pretrained(AutoImageProcessor, detector, "task.detector.detector")
        self.network = open_pretrained(
            Mask2FormerForUniversalSegmentation, detector, "task.detector.detector"
        )
        self.clip = CLIP(clip, "task.detector.clip")
        if (count := self.network.config.num_labels) != len(self.names):
            raise ValueError(
                f"task.detector.detector={detector} has {count} classes, {names} has {len(self.names)} names; choose a "
                "detector of COCO's instances"
            )
        self.fingerprint = sha256(
            " ".join(digest(each.state_dict()) for each in (self.network, self.clip)).encode()
        )
        self.texts: dict[str, Tensor] = {}  # of each class, the ten colours' features (10, D)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[dict[str, list[Seen]]]:
        """The 100 likeliest pairs of a query and a class; a score is the class's times the mask's mean."""
        return [self._instances(image) for image in images]

    @torch.no_grad()
    def colour(self, image: Tensor, name: str, seen: Seen) -> str:
        """The likeliest by CLIP of the object on grey, cut out."""
        height, width = image.shape[1:]
        x1, y1, x2, y2 = (round(edge) for edge in seen.box[:4])
        alone = torch.where(seen.mask, image, image.new_tensor(GREY))
        cut = alone[
            :, max(y1, 0) : max(min(y2, height), y1 + 1), max(x1, 0) : max(min(x2, width), x1 + 1)
        ]
        return COLOURS[int((self.clip.images([cut]) @ self._texts(name).T).argmax())]

    def _instances(self, image: Tensor) -> dict[str, list[Seen]]:
        inputs = self.processor(images=[as_uint8(image)], return_tensors="pt").to(image.device)
        answer = self.network(**inputs)
        seen, (height, width) = inputs["pixel_values"].shape[2:], image.shape[1:]
        inside = inputs["pixel_mask"][0].bool()
        rows, columns = int(inside.any(1).sum()), int(inside.any(0).sum())  # the rest is padding
        masks = F.interpolate(
            answer.masks_queries_logits, tuple(seen), mode="bilinear", align_corners=False
        )
        masks = F.interpolate(
            masks[..., :rows, :columns], (height, width), mode="bilinear", align_corners=False
        )[0]
        classes = answer.class_queries_logits[0].softmax(-1)[:, :-1]
        scores, pairs = classes.flatten().topk(min(100, classes.numel()))
        found: dict[str, list[Seen]] = {}
        for score, pair in zip(scores.tolist(), pairs.tolist(), strict=True):
            if score <= self.rules.threshold:  # the mask's mean is at most 1
                continue
            query, kind = divmod(pair, classes.shape[1])
            mask = masks[query] > 0
            if not bool(mask.any()):
                continue
            score *= float(masks[query].sigmoid()[mask].mean())
            if score > self.rules.threshold:
                (top, bottom), (left, right) = (
                    (int(each[0]), int(each[-1]) + 1)
                    for each in (mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
                )
                box = (float(left), float(top), float(right), float(bottom), score)
                found.setdefault(self.names[kind], []).append(Seen(box, mask))
        return found

    def _texts(self, name: str) -> Tensor:
        if name not in self.texts:
            prompts = [
                form.format(colour=colour, name=name) for colour in COLOURS for form in TEMPLATES
            ]
            each = self.clip.texts(prompts).unflatten(0, (len(COLOURS), -1))
            self.texts[name] = F.normalize(each.mean(1), dim=-1)
        return self.texts[name]
