"""The detector of garments reads off its maps what its training draws on them."""

import numpy as np
import pytest
import torch

from oss_exp.data.scenes import CANVAS, Wardrobe
from oss_exp.files import save_asset
from oss_exp.geneval.detectors import Detection, FashionDetector, look, targets
from oss_exp.geneval.garments import COLOURS, GARMENTS


@pytest.fixture(scope="module")
def wardrobe() -> Wardrobe:
    """A garment of each kind: rectangles of different sizes."""
    pictures = torch.full((10, 1, 32, 32), -1.0)
    for number in range(10):
        pictures[number, :, 8 - number // 2 : 25, 6 : 18 + number] = 0.9
    return Wardrobe(pictures, torch.arange(10))


def boxes_of(objects) -> list[tuple]:
    """Return (garment, box) of the objects of a scene."""
    return [(thing.garment, thing.box) for thing in objects]


def scenes(wardrobe: Wardrobe, count: int):
    """Yield scenes of any garments."""
    draw = np.random.default_rng(0)
    for _ in range(count):
        yield wardrobe.scene(wardrobe.anything(draw), draw)


def test_the_maps_of_the_training_are_read_as_their_objects(wardrobe, monkeypatch):
    detector = FashionDetector().eval()
    for image, objects in scenes(wardrobe, 60):
        heat, edges, middles = targets(boxes_of(objects), CANVAS)
        answer = (heat.clamp(1e-4, 1 - 1e-4).logit()[None], edges[None])
        monkeypatch.setattr(FashionDetector, "forward", lambda self, x, answer=answer: answer)
        (detected,) = detector.detect(image[None])

        boxes = []
        for name, detections in detected.items():
            boxes += [(name, *detection.box[:4]) for detection in detections]
        expected = [(thing.garment, *map(float, thing.box)) for thing in objects]
        assert int(middles.sum()) == len(objects)
        assert sorted(boxes) == sorted(expected)
        for thing in objects:
            (detection,) = [
                detection
                for detection in detected[thing.garment]
                if detection.box[:4] == tuple(map(float, thing.box))
            ]
            x1, y1, x2, y2 = thing.box
            assert detector.colour(image, thing.garment, detection) == thing.colour
            assert int(detection.mask.sum()) == (x2 - x1 + 1) * (y2 - y1 + 1)


def train(detector: FashionDetector, image: torch.Tensor, objects) -> None:
    """Take 60 steps on one scene."""
    optimizer = torch.optim.AdamW(detector.parameters(), 3e-3)
    batch = [image, *targets(boxes_of(objects), CANVAS)]
    batch = [tensor.expand(4, *tensor.shape) for tensor in batch]
    for _ in range(60):
        optimizer.zero_grad()
        loss = detector.loss(*batch)
        loss.backward()
        optimizer.step()


@pytest.mark.slow
def test_training_on_one_scene_finds_it(wardrobe):
    wish = {"tag": "x", "include": [{"class": "bag", "count": 1}, {"class": "boot", "count": 1}]}
    other = {"tag": "x", "include": [{"class": "shirt", "count": 1}]}
    image, objects = wardrobe.scene(wish, np.random.default_rng(1))
    torch.manual_seed(0)
    detector = FashionDetector()

    train(detector, image, objects)
    (detected,) = detector.eval().detect(image[None])

    assert set(detected) == {"bag", "boot"}
    for thing in objects:
        (detection,) = detected[thing.garment]
        assert detection.box[:4] == pytest.approx(thing.box, abs=2)
    assert look(detector, image, detected, wish).correct
    assert look(detector, image, detected, other).reasons == ("expected shirt>=1, found 0",)


def test_colours_are_told_apart_in_any_brightness():
    detector = FashionDetector()
    everything = Detection((0, 0, 7, 7, 1), torch.ones(8, 8, dtype=torch.bool))
    for name, colour in COLOURS.items():
        for brightness in (0.3, 1.0):
            image = brightness * torch.tensor(colour)[:, None, None].expand(3, 8, 8)
            assert detector.colour(image, "bag", everything) == name


def test_files_of_other_weights_are_refused(tmp_path):
    save_asset(tmp_path / "other.safetensors", {"weight": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="has not the layers of FashionDetector"):
        FashionDetector.from_asset(tmp_path / "other.safetensors")


def test_saved_weights_are_a_detector(tmp_path):
    save_asset(tmp_path / "saved.safetensors", FashionDetector().state_dict(), {})
    assert FashionDetector.from_asset(tmp_path / "saved.safetensors").fingerprint


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (1, 3, 60, 64), (3, 64, 64)])
def test_images_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="RGB images whose sides are multiples of 16"):
        FashionDetector().detect(torch.zeros(shape))


def test_there_are_ten_garments():
    assert len(GARMENTS) == 10
