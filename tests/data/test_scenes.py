"""Scenes show what is wished, by GenEval's own rules, and nothing else."""

from collections import Counter

import numpy as np
import pytest
import torch
from helpers import write_fashion

from oss_exp.data.captioned import SIDE
from oss_exp.data.images import fashion_mnist
from oss_exp.data.scenes import LINES, FashionScenes, Wardrobe, listed, plural, wishes
from oss_exp.files import find_asset
from oss_exp.geneval.detectors import FashionDetector
from oss_exp.geneval.garments import COLOURS, GARMENTS
from oss_exp.geneval.rules import TASKS, judge, read_metadata
from oss_exp.tasks.fit_detector import ceiling

WISHES = wishes()


@pytest.fixture(scope="module")
def wardrobe() -> Wardrobe:
    """Two garments of each kind: rectangles of grey, of sizes of their own."""
    pictures = torch.full((20, 1, 32, 32), -1.0)
    for number in range(20):
        height, width = 10 + number % 7 * 2, 24 - number % 5 * 3
        top, left = 16 - height // 2, 16 - width // 2
        pictures[number, :, top : top + height, left : left + width] = 0.2 + number % 4 * 0.25
    return Wardrobe(pictures, torch.arange(20) % 10)


@pytest.mark.parametrize("task", TASKS)
def test_a_scene_is_what_was_wished(task, wardrobe):
    draw = np.random.default_rng(0)
    for number in draw.permutation(len(WISHES[task]))[:40]:
        wish = WISHES[task][number]
        picture, objects = wardrobe.scene(wish, draw)
        found = {
            name: [(*each.box, 0.99) for each in objects if each.garment == name]
            for name in GARMENTS
        }
        colours = {(*each.box, 0.99): each.colour for each in objects}
        verdict = judge(wish, found, lambda name, box, colours=colours: colours[box])
        assert verdict.correct, (wish["prompt"], verdict.reasons)
        assert len(objects) == sum(clause["count"] for clause in wish["include"])

        rest = picture.clone()
        for each in objects:
            x1, y1, x2, y2 = each.box
            patch = picture[:, y1 : y2 + 1, x1 : x2 + 1]
            brightest = patch.flatten(1)[:, patch.sum(0).argmax()]
            expected = torch.tensor(COLOURS[each.colour])
            torch.testing.assert_close(brightest / brightest.max(), expected / expected.max())
            rest[:, y1 : y2 + 1, x1 : x2 + 1] = 0
        assert not rest.any()


def test_anything_is_one_to_four_garments(wardrobe):
    draw = np.random.default_rng(0)
    counts = Counter(len(wardrobe.scene(wardrobe.anything(draw), draw)[1]) for _ in range(100))
    assert set(counts) == {1, 2, 3, 4}


def test_the_list_has_genevals_numbers_and_is_what_is_shipped():
    records = listed(0)
    assert Counter(record["tag"] for record in records) == LINES
    assert sum(LINES.values()) == 553
    for task in TASKS:
        prompts = Counter(record["prompt"] for record in records if record["tag"] == task)
        assert max(prompts.values()) - min(prompts.values()) <= 1
        assert len(prompts) == min(LINES[task], len(WISHES[task]))
    assert records == read_metadata(find_asset("fashion_geneval.jsonl", "prompts"))
    assert listed(1) != records


def test_prompts_are_english_enough():
    assert [plural(name) for name in ("dress", "trousers", "bag")] == [
        "dresses",
        "trousers",
        "bags",
    ]
    prompts = {task: [wish["prompt"] for wish in known] for task, known in WISHES.items()}
    assert "an orange boot and a red bag" in prompts["color_attr"]
    assert "four dresses" in prompts["counting"]
    assert "a bag left of a boot" in prompts["position"]
    everything = [prompt for known in prompts.values() for prompt in known]
    assert len(set(everything)) == len(everything)


def test_items_are_functions_of_their_number(tmp_path):
    pixels = (torch.arange(20)[:, None, None] + torch.zeros(20, 28, 28)).byte() + 100
    write_fashion(tmp_path, pixels, [i % 10 for i in range(20)])
    images, again = (FashionScenes(str(tmp_path), "train") for _ in range(2))
    assert len(images) == 400
    for i in (7, 300, 12):
        (x0, number), (same, caption) = images[i], again[i]
        assert torch.equal(x0, same)
        assert number == caption
        assert images.captions[number] in {wish["prompt"] for wish in WISHES[TASKS[i % 6]]}
        assert x0.shape == (3, 64, 64)
        assert x0.min() == -1


@pytest.mark.slow
def test_the_shipped_detector_reads_scenes_of_garments_that_it_never_saw(garments):
    """30 garments of each kind; of the 1,000 of the whole test split, 77 % of the scenes are read right."""
    found = ceiling(
        FashionDetector.from_asset(), Wardrobe(*fashion_mnist(garments, "test", SIDE)), seed=1
    )
    assert found["overall"].mean == pytest.approx(0.8317, abs=2e-3)
