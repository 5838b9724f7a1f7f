"""GenEval's networks on transformers, small and with random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from oss_exp.evaluation.metrics import CLIPScore
from oss_exp.files import find_asset
from oss_exp.geneval.coco import GREY, TEMPLATES, COCODetector
from oss_exp.geneval.detectors import Detection, look
from oss_exp.geneval.rules import COLOURS, Rules
from oss_exp.models.tiny.parts import clip_bytes


def save_segmenter(folder: Path) -> None:
    """Save a small Mask2Former with random weights, and its processor."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        num_labels=80,
        num_queries=12,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        encoder_feedforward_dim=16,
    )
    size = {"shortest_edge": 64, "longest_edge": 96}
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size=size, size_divisor=32).save_pretrained(folder)


def save_clip(folder: Path) -> None:
    """Save a small CLIP with random weights, and its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer, ends = clip_bytes(77)
    common = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {**common, "vocab_size": 514, "max_position_embeddings": 77, **ends}
    vision = {**common, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """The arguments of a COCODetector of small networks with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("coco")
    save_segmenter(folder / "detector")
    save_clip(folder / "clip")
    return {
        "detector": str(folder / "detector"),
        "clip": str(folder / "clip"),
        "names": "geneval_objects.txt",
    }


@pytest.fixture(scope="module")
def detector(folders) -> COCODetector:
    """The detector, which also reports what its random networks are not sure of."""
    result = COCODetector(**folders)
    result.rules = Rules(threshold=0.0)
    return result


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 48, 60, generator=torch.Generator().manual_seed(0))


def box_of(mask: torch.Tensor) -> list[int]:
    """Return left, top, right and bottom of a mask."""
    rows, columns = mask.nonzero().T
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def objects_by_hand(detector: COCODetector, image: torch.Tensor) -> list[tuple]:
    """Return (name, box, score) of the 100 likeliest pairs of query and class, sorted."""
    inputs = detector.processor(images=[(image * 255).round().byte()], return_tensors="pt")
    assert inputs["pixel_values"].shape[2:] == (64, 96)  # 48 x 60, stretched to multiples of 32
    answer = detector.network(**inputs)
    masks = F.interpolate(answer.masks_queries_logits, (64, 96), mode="bilinear")
    masks = F.interpolate(masks, (48, 60), mode="bilinear")[0]
    classes = answer.class_queries_logits[0].softmax(-1)[:, :80]
    least = classes.flatten().sort(descending=True).values[99]

    objects = []
    for logits, probabilities in zip(masks, classes, strict=True):
        mask = logits > 0
        if mask.any():
            certainty = float(logits.sigmoid()[mask].mean())
            for name, probability in zip(detector.names, probabilities, strict=True):
                if probability >= least:
                    objects.append((name, box_of(mask), float(probability) * certainty))
    return sorted(objects)


@torch.no_grad()
def test_objects_are_the_likeliest_pairs_with_the_boxes_of_their_masks(detector, images):
    for image, objects in zip(images, detector.detect(images), strict=True):
        boxes = []
        for name, detections in objects.items():
            boxes += [(name, list(detection.box[:4]), detection.box[4]) for detection in detections]
        boxes.sort()

        expected = objects_by_hand(detector, image)
        assert [box[:2] for box in boxes] == [box[:2] for box in expected]
        scores = [box[2] for box in expected]
        assert [box[2] for box in boxes] == pytest.approx(scores, rel=1e-5)


def likelihoods(detector: COCODetector, crop: torch.Tensor, name: str) -> list[float]:
    """Return the cosine of every colour's mean text to a crop of an image."""
    clip = detector.clip
    pixels = clip.processor(images=(crop * 255).round().byte(), return_tensors="pt")
    answer = clip.network.get_image_features(pixel_values=pixels["pixel_values"])
    feature = F.normalize(answer.pooler_output, dim=-1)[0]

    cosines = []
    for colour in COLOURS:
        texts = [form.format(colour=colour, name=name) for form in TEMPLATES]
        assert texts[0] == f"a photo of a {colour} {name}"
        tokens = clip.processor(text=texts, return_tensors="pt", padding=True)
        text = clip.network.get_text_features(**tokens).pooler_output
        mean = F.normalize(F.normalize(text, dim=-1).mean(0), dim=0)
        cosines.append(float(feature @ mean))
    return cosines


def test_a_colour_is_the_nearest_of_ten_texts_to_the_object(detector, images):
    mask = torch.zeros(48, 60, dtype=torch.bool)
    mask[10:20, 5:40] = True
    cow = Detection((5.0, 10.0, 40.0, 20.0, 0.9), mask)

    cosines = likelihoods(detector, images[0, :, 10:20, 5:40], "cow")

    assert detector.colour(images[0], "cow", cow) == COLOURS[int(np.argmax(cosines))]


def test_the_surroundings_of_an_object_are_grey_for_its_colour(detector, images):
    hidden = Detection((0.0, 0.0, 60.0, 48.0, 0.9), torch.zeros(48, 60, dtype=torch.bool))
    grey = torch.full_like(images[1], GREY)
    expected = detector.colour(grey, "cow", hidden)
    assert detector.colour(images[0], "cow", hidden) == expected


def test_a_detected_object_of_another_colour_is_a_wrong_one(detector, images):
    objects = detector.detect(images)[0]
    name = next(iter(objects))
    wish = {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": ""}
    clause = {"class": name, "count": 1, "color": "no such"}
    coloured = {"tag": "colors", "include": [clause], "prompt": ""}

    assert look(detector, images[0], objects, wish).correct
    (reason,) = look(detector, images[0], objects, coloured).reasons
    assert reason.startswith(f"expected no such {name}>=1, found 0 no such; and 1 ")


def test_clip_score_is_a_hundred_cosines(folders, images):
    metric = CLIPScore(folders["clip"])
    prompts = ["a cow", "two boots on a table " * 30]  # the second is cut off
    metric.update(images, images, torch.full((2,), -1), prompts)

    clip = metric.clip
    inputs = clip.processor(
        images=list((images * 255).round().byte()),
        text=prompts,
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=77,
    )
    cosines = clip.network(**inputs).logits_per_image.diag() / clip.network.logit_scale.exp()
    expected = float(100 * cosines.clamp(min=0).mean())
    assert metric.compute()["clip_score"] == pytest.approx(expected, rel=1e-4)


def test_clip_score_needs_prompts(folders, images):
    metric = CLIPScore(folders["clip"])
    with pytest.raises(ValueError, match="clip_score needs prompts"):
        metric.update(images, images, torch.full((2,), -1))


def test_names_are_in_cocos_order(detector):
    """The network counts its classes in that order, which is that of GenEval's metadata."""
    names = find_asset("geneval_objects.txt", "names").read_text().splitlines()
    assert detector.names == names
    assert (names[0], names[1], names[15], names[79]) == ("person", "bicycle", "cat", "toothbrush")
    assert len(names) == 80


@pytest.mark.parametrize("key", ["detector", "clip"])
def test_a_network_that_cannot_be_opened_is_named(key, folders, tmp_path):
    with pytest.raises(ValueError, match=rf"task\.detector\.{key}=.*nowhere cannot be opened"):
        COCODetector(**folders | {key: str(tmp_path / "nowhere")})


def test_another_number_of_names_is_refused(folders, tmp_path):
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"has 80 classes, .*two\.txt has 2 names"):
        COCODetector(**folders | {"names": str(tmp_path / "two.txt")})


def test_the_shipped_prompts_have_tags():
    lines = find_asset("fashion_geneval.jsonl", "prompts").read_text().splitlines()
    assert json.loads(lines[0])["tag"]
