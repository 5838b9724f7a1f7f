"""GenEval's networks on transformers, small and with random weights: from a folder to verdicts."""

import json

import pytest
import torch
from torch.nn import functional as F

from oss_exp.evaluation.metrics import CLIPScore
from oss_exp.files import find_asset
from oss_exp.geneval.coco import GREY, TEMPLATES, COCODetector
from oss_exp.geneval.detectors import Detection, look
from oss_exp.geneval.rules import COLOURS, Rules
from oss_exp.models.tiny.parts import clip_bytes


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("coco")
    swin = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, num_labels=80, num_queries=12, hidden_dim=32, feature_size=32, mask_feature_size=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, encoder_feedforward_dim=16,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder / "detector")
    Mask2FormerImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 96}, size_divisor=32
    ).save_pretrained(folder / "detector")
    tokenizer, ends = clip_bytes(77)
    text = {
        "vocab_size": 514,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
    } | ends
    text |= {"num_attention_heads": 2, "max_position_embeddings": 77}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision |= {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(
        folder / "clip"
    )
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder / "clip")
    return {
        "detector": str(folder / "detector"),
        "clip": str(folder / "clip"),
        "names": "geneval_objects.txt",
    }


@pytest.fixture(scope="module")
def detector(folders) -> COCODetector:
    made = COCODetector(**folders)
    made.rules = Rules(threshold=0.0)  # random networks are never sure
    return made


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 48, 60, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_objects_are_the_likeliest_pairs_with_the_boxes_of_their_masks(detector, images):
    """By hand, from the network's own answers on the same pixels."""
    found = detector.detect(images)
    for image, objects in zip(images, found, strict=True):
        inputs = detector.processor(images=[(image * 255).round().byte()], return_tensors="pt")
        assert inputs["pixel_values"].shape[2:] == (64, 96)  # 48 x 60, stretched to multiples of 32
        answer = detector.network(**inputs)
        masks = F.interpolate(answer.masks_queries_logits, (64, 96), mode="bilinear")
        masks = F.interpolate(masks, (48, 60), mode="bilinear")[0]
        classes = answer.class_queries_logits[0].softmax(-1)[:, :80]
        expected = []
        for query, row in enumerate(classes):
            mask = masks[query] > 0
            if mask.any():
                rows, columns = mask.nonzero().T
                box = [
                    int(columns.min()),
                    int(rows.min()),
                    int(columns.max()) + 1,
                    int(rows.max()) + 1,
                ]
                certain = float(masks[query].sigmoid()[mask].mean())
                expected += [
                    (float(p), detector.names[kind], box, certain) for kind, p in enumerate(row)
                ]
        likeliest = sorted(classes.flatten().tolist())[-100:]
        expected = sorted(
            (name, box, p * certain) for p, name, box, certain in expected if p >= likeliest[0]
        )
        seen = sorted(
            (name, list(each.box[:4]), each.box[4]) for name, own in objects.items() for each in own
        )
        assert [each[:2] for each in seen] == [each[:2] for each in expected]
        assert [each[2] for each in seen] == pytest.approx([each[2] for each in expected], rel=1e-5)


def test_a_colour_is_the_nearest_of_ten_texts_to_the_object_on_grey(detector, images):
    mask = torch.zeros(48, 60, dtype=torch.bool)
    mask[10:20, 5:40] = True
    found = detector.colour(images[0], "cow", Detection((5.0, 10.0, 40.0, 20.0, 0.9), mask))
    cut = images[0, :, 10:20, 5:40]
    clip = detector.clip
    vision = clip.processor(images=(cut * 255).round().byte(), return_tensors="pt")["pixel_values"]
    own = F.normalize(clip.network.get_image_features(pixel_values=vision).pooler_output, dim=-1)
    likely = []
    for colour in COLOURS:
        texts = [form.format(colour=colour, name="cow") for form in TEMPLATES]
        assert texts[0] == f"a photo of a {colour} cow"
        tokens = clip.processor(text=texts, return_tensors="pt", padding=True)
        each = F.normalize(clip.network.get_text_features(**tokens).pooler_output, dim=-1).mean(0)
        likely.append(float(own[0] @ F.normalize(each, dim=0)))
    assert found == COLOURS[max(range(10), key=likely.__getitem__)]
    hidden = Detection((0.0, 0.0, 60.0, 48.0, 0.9), torch.zeros_like(mask))  # nothing but grey
    assert detector.colour(images[0], "cow", hidden) == detector.colour(
        torch.full_like(images[1], GREY), "cow", hidden
    )


def test_a_verdict_comes_out(detector, images):
    seen = detector.detect(images)
    name = next(iter(seen[0]))
    wanted = {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": ""}
    assert look(detector, images[0], seen[0], wanted).correct
    coloured = {
        "tag": "colors",
        "include": [{"class": name, "count": 1, "color": "no such"}],
        "prompt": "",
    }
    (reason,) = look(detector, images[0], seen[0], coloured).reasons
    assert reason.startswith(f"expected no such {name}>=1, found 0 no such; and 1 ")


def test_clip_score_is_a_hundred_cosines(folders, images):
    metric = CLIPScore(folders["clip"])
    prompts = ["a cow", "two boots on a table " * 30]  # the second is cut off
    metric.update(images, images, torch.full((2,), -1), prompts)
    clip = metric.clip
    pixels = clip.processor(images=list((images * 255).round().byte()), return_tensors="pt")[
        "pixel_values"
    ]
    tokens = clip.processor(
        text=prompts, return_tensors="pt", padding=True, truncation=True, max_length=77
    )
    answer = clip.network(pixel_values=pixels, **tokens)
    cosines = answer.logits_per_image.diag() / clip.network.logit_scale.exp()
    assert metric.compute()["clip_score"] == pytest.approx(
        float(100 * cosines.clamp(min=0).mean()), rel=1e-4
    )
    with pytest.raises(ValueError, match="clip_score needs prompts"):
        metric.update(images, images, torch.full((2,), -1))


def test_names_are_in_cocos_order(detector):
    """As in the metadata of GenEval; the network counts its classes in that order."""
    names = find_asset("geneval_objects.txt", "names").read_text().splitlines()
    assert detector.names == names
    assert (names[0], names[1], names[15], names[79]) == ("person", "bicycle", "cat", "toothbrush")
    assert len(names) == 80


def test_what_cannot_be_opened_is_said(folders, tmp_path):
    with pytest.raises(ValueError, match=r"task\.detector\.detector=.*nowhere cannot be opened"):
        COCODetector(**folders | {"detector": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match=r"task\.detector\.clip=.*nowhere cannot be opened"):
        COCODetector(**folders | {"clip": str(tmp_path / "nowhere")})
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"has 80 classes, .*two\.txt has 2 names"):
        COCODetector(**folders | {"names": str(tmp_path / "two.txt")})
    assert json.loads((find_asset("fashion_geneval.jsonl", "prompts")).read_text().splitlines()[0])[
        "tag"
    ]
