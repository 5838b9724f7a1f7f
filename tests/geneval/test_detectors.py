"""The detector of garments: what it is taught is what is read off it."""

import numpy as np
import pytest
import torch

from oss_exp.data.scenes import CANVAS, Wardrobe
from oss_exp.files import save_asset
from oss_exp.geneval.detectors import Detection, FashionDetector, look, targets
from oss_exp.geneval.garments import COLOURS, GARMENTS


@pytest.fixture(scope="module")
def wardrobe() -> Wardrobe:
    pictures = torch.full((10, 1, 32, 32), -1.0)
    for number in range(10):
        pictures[number, :, 8 - number // 2 : 25, 6 : 18 + number] = 0.9
    return Wardrobe(pictures, torch.arange(10))


def test_what_it_is_taught_is_what_is_read(wardrobe, monkeypatch):
    """Boxes, classes and number of any scene come back exactly from the maps that training aims at."""
    draw, detector = np.random.default_rng(0), FashionDetector().eval()
    for _ in range(60):
        image, objects = wardrobe.scene(wardrobe.anything(draw), draw)
        heat, edges, middles = targets([(each.garment, each.box) for each in objects], CANVAS)
        assert int(middles.sum()) == len(objects)
        certain = heat.clamp(1e-4, 1 - 1e-4)[None]
        monkeypatch.setattr(
            FashionDetector, "forward", lambda self, x, a=certain, b=edges: (a.logit(), b[None])
        )
        (found,) = detector.detect(image[None])
        boxes = sorted((name, *seen.box[:4]) for name, own in found.items() for seen in own)
        assert boxes == sorted((each.garment, *map(float, each.box)) for each in objects)
        for each in objects:
            (seen,) = [
                seen for seen in found[each.garment] if seen.box[:4] == tuple(map(float, each.box))
            ]
            assert detector.colour(image, each.garment, seen) == each.colour
            x1, y1, x2, y2 = each.box
            assert int(seen.mask.sum()) == (x2 - x1 + 1) * (y2 - y1 + 1)


@pytest.mark.slow
def test_training_on_one_scene_finds_it(wardrobe):
    draw = np.random.default_rng(1)
    wish = {"tag": "x", "include": [{"class": "bag", "count": 1}, {"class": "boot", "count": 1}]}
    image, objects = wardrobe.scene(wish, draw)
    maps = [each[None] for each in targets([(each.garment, each.box) for each in objects], CANVAS)]
    torch.manual_seed(0)
    detector = FashionDetector()
    optimizer = torch.optim.AdamW(detector.parameters(), 3e-3)
    batch = image.expand(4, -1, -1, -1), *(each.expand(4, *each.shape[1:]) for each in maps)
    for _ in range(60):
        optimizer.zero_grad()
        loss = detector.loss(*batch)
        loss.backward()
        optimizer.step()
    (found,) = detector.eval().detect(image[None])
    assert set(found) == {"bag", "boot"}
    for each in objects:
        (seen,) = found[each.garment]
        assert seen.box[:4] == pytest.approx(each.box, abs=2)
    assert look(detector, image, found, wish).correct
    other = {"tag": "x", "include": [{"class": "shirt", "count": 1}]}
    assert look(detector, image, found, other).reasons == ("expected shirt>=1, found 0",)


def test_colours_are_told_apart_in_any_brightness():
    detector, mask = FashionDetector(), torch.ones(8, 8, dtype=torch.bool)
    for name, colour in COLOURS.items():
        for brightness in (0.3, 1.0):
            image = brightness * torch.tensor(colour)[:, None, None].expand(3, 8, 8)
            assert detector.colour(image, "bag", Detection((0, 0, 7, 7, 1), mask)) == name


def test_files_and_images_of_another_kind_are_refused(tmp_path):
    save_asset(tmp_path / "d.safetensors", {"weight": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="has not the layers of FashionDetector"):
        FashionDetector.from_asset(tmp_path / "d.safetensors")
    save_asset(tmp_path / "e.safetensors", FashionDetector().state_dict(), {})
    assert FashionDetector.from_asset(tmp_path / "e.safetensors").fingerprint
    for shape in ((1, 1, 64, 64), (1, 3, 60, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match="RGB images whose sides are multiples of 16"):
            FashionDetector().detect(torch.zeros(shape))
    assert len(GARMENTS) == 10
