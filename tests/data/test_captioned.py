"""Garments with captions, and latents with captions from a file."""

import json

import pytest
import torch
from safetensors.torch import save_file

from experiments.scenes_pipeline import binding
from oss_exp.data.captioned import (
    MOVES,
    CaptionedLatents,
    ColouredFashion,
    MovingFashion,
)
from oss_exp.data.prompts import read_prompts
from oss_exp.files import find_asset
from oss_exp.geneval.garments import COLOURS, GARMENTS
from oss_exp.geneval.rules import TASKS


@pytest.mark.parametrize(
    ("kind", "file"), [(ColouredFashion, "coloured"), (MovingFashion, "moving")]
)
def test_every_caption_is_among_the_shipped_prompts(kind, file, fashion):
    images = kind(str(fashion), "train")
    prompts = read_prompts(find_asset(f"{file}_fashion.txt", "prompts"))
    assert sorted(prompts) == sorted(images.captions)
    assert len(images) == 2 * images.items_each
    with pytest.raises(IndexError):
        images[len(images)]


def test_a_garment_has_the_colour_of_its_caption(fashion):
    images = ColouredFashion(str(fashion), "train")
    for i in range(len(images)):
        x0, number = images[i]
        article, colour, garment = images.captions[number].split()
        assert (article == "an") == (colour == "orange")
        assert garment == ("bag", "trousers")[i // len(COLOURS)]
        brightest = torch.tensor(COLOURS[colour]) * (200 / 255 if i < len(COLOURS) else 1)
        torch.testing.assert_close((x0.amax((1, 2)) + 1) / 2, brightest)
        assert x0.shape == (3, 32, 32)


def movement(weight: torch.Tensor) -> tuple[float, float, float]:
    """Return how far a video's (F, H, W) centre moves across and down, and how its mass grows."""
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    mass = weight.sum((1, 2))
    across = (weight * columns).sum((1, 2)) / mass
    down = (weight * rows).sum((1, 2)) / mass
    return float(across[-1] - across[0]), float(down[-1] - down[0]), float(mass[-1] / mass[0])


def test_a_garment_moves_as_its_caption_says(fashion):
    images = MovingFashion(str(fashion), "train")
    for i in range(len(images)):
        x0, number = images[i]
        garment, _, move = images.captions[number].partition(" ")
        travel, lift, growth = movement((x0[0] + 1) / 2)
        expected = MOVES[move]

        assert garment == ("bag", "trousers")[i // len(MOVES)]
        assert travel == pytest.approx(16 * expected[0], abs=1)
        assert lift == pytest.approx(16 * expected[1], abs=1)
        assert growth == pytest.approx(expected[2] ** 2, rel=0.25)


def test_a_moving_garment_stays_in_the_picture(fashion):
    for x0, _ in MovingFashion(str(fashion), "train"):
        weight = (x0[0] + 1) / 2
        edges = [weight[:, 0], weight[:, -1], weight[:, :, 0], weight[:, :, -1]]
        assert float(torch.cat(edges, dim=1).max()) < 0.5


def test_a_video_is_a_function_of_its_number(fashion):
    images = MovingFashion(str(fashion), "train")
    again = MovingFashion(str(fashion), "train")
    for i in range(len(images)):
        assert torch.equal(images[i][0], again[i][0])


def test_the_fingerprint_is_of_garments_and_kind(fashion):
    coloured = ColouredFashion(str(fashion), "train")
    moving = MovingFashion(str(fashion), "train")
    again = MovingFashion(str(fashion), "train")
    assert coloured.fingerprint != moving.fingerprint == again.fingerprint
    assert len(GARMENTS) == 10


# ----------------------------------------------------------------------------------------------
# Latents
# ----------------------------------------------------------------------------------------------

CAPTIONS = json.dumps(["a bag", "two boots"])


def write_latents(path, labels=(0, 1, 1), captions=CAPTIONS, shape=(4, 2, 2)) -> torch.Tensor:
    """Write a file of captioned latents; return the latents."""
    tensors = {"latents": torch.randn(len(labels), *shape).half(), "labels": torch.tensor(labels)}
    save_file(tensors, path, None if captions is None else {"captions": captions})
    return tensors["latents"]


@pytest.mark.parametrize("shape", [(4, 2, 2), (4, 3, 2, 2)], ids=["pictures", "videos"])
def test_captioned_latents_are_those_of_the_file(tmp_path, shape):
    latents = write_latents(tmp_path / "l.safetensors", shape=shape)
    images = CaptionedLatents(str(tmp_path / "l.safetensors"))
    assert images.captions == ["a bag", "two boots"]
    assert [label for _, label in images] == [0, 1, 1]
    for item, expected in zip(images, latents, strict=True):
        assert torch.equal(item[0], expected.float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"captions": None}, "captions"),
        ({"captions": '{"a": 1}'}, "captions"),
        ({"labels": (0, 2)}, "has 2 captions and labels from 0 to 2"),
        ({"labels": (-1, 1)}, "labels from -1"),
    ],
)
def test_captions_that_do_not_fit_are_refused(tmp_path, settings, message):
    write_latents(tmp_path / "l.safetensors", **settings)
    with pytest.raises(ValueError, match=message):
        CaptionedLatents(str(tmp_path / "l.safetensors"))


def test_binding_keeps_all_scenes_of_two_garments_and_those_of_one_task_twice(tmp_path):
    count = 6 * len(TASKS)
    latents = write_latents(tmp_path / "l", range(count), json.dumps(["a scene"] * count))
    binding.main(tmp_path / "l", tmp_path / "once", None)
    binding.main(tmp_path / "l", tmp_path / "twice", "color_attr")
    once, twice = CaptionedLatents(tmp_path / "once"), CaptionedLatents(tmp_path / "twice")

    tasks = [*TASKS] * 6  # they take turns
    pairs = [i for i in range(count) if tasks[i] in ("two_object", "position", "color_attr")]
    thirds = [*range(len(TASKS)), *range(3 * len(TASKS), 4 * len(TASKS))]
    again = [i for i in range(count) if tasks[i] == "color_attr"]
    assert once.labels.tolist() == sorted({*pairs, *thirds})
    assert twice.labels.tolist() == [*once.labels.tolist(), *again]
    assert torch.equal(twice.latents.half(), latents[twice.labels])
