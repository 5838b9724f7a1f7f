"""The shipped classifier of Fashion-MNIST as a feature extractor, and its training."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from helpers import run_cli, write_fashion
from torch.utils.data import Dataset
from torchmetrics.image.fid import FrechetInceptionDistance

from oss_exp.data.images import fashion_mnist
from oss_exp.evaluation.classifier import ASSET, FashionFeatures, register
from oss_exp.files import ASSETS
from oss_exp.tasks.fit_classifier import accuracy, augment, pixels


@pytest.fixture(scope="module")
def network() -> FashionFeatures:
    """The shipped classifier."""
    return FashionFeatures.from_asset()


@pytest.fixture(scope="module")
def clothes(garments) -> tuple[torch.Tensor, torch.Tensor]:
    """300 images of the test split (300, 1, 32, 32) in [0, 1] in random order, and their labels."""
    images, labels = pixels(fashion_mnist(garments, "test", 32))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


def noise(count: int) -> torch.Tensor:
    """Return images of noise (count, 1, 32, 32) in [0, 1]."""
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(0))


class Bytes(Dataset):
    """Images as torch-fidelity reads them: (3, 32, 32) uint8."""

    def __init__(self, images: torch.Tensor):
        self.images = (images * 255).round().byte()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.images[i].expand(3, -1, -1)


def fidelity(one: torch.Tensor, other: torch.Tensor, **settings) -> dict[str, float]:
    """Return torch-fidelity's metrics of two sets of images with our features."""
    defaults = {
        "fid": True,
        "kid": True,
        "prc": True,
        "isc": True,
        "cuda": False,
        "save_cpu_ram": True,
        "cache": False,
        "kid_subset_size": len(one) // 2,
        "verbose": False,
    }
    return torch_fidelity.calculate_metrics(
        input1=Bytes(one),
        input2=Bytes(other),
        feature_extractor=register(),
        **(defaults | settings),
    )


RECORD = json.loads((ASSETS / ASSET).with_suffix(".json").read_text())


def test_the_shipped_network_classifies_the_test_split(network, clothes):
    share = accuracy(network, *clothes)
    assert share == 0.93
    # 0.03: two standard errors of 300 images.
    assert share == pytest.approx(RECORD["test_accuracy"], abs=0.03)


def test_the_shipped_network_is_small_and_frozen(network):
    assert sum(p.numel() for p in network.parameters()) <= 500_000
    assert (ASSETS / ASSET).stat().st_size <= 2e6
    assert not any(p.requires_grad for p in network.parameters())


def test_the_shipped_network_has_a_name_a_fingerprint_and_sizes(network):
    assert network.name == "fashion_features"
    assert network.fingerprint == RECORD["sha256"]
    assert (network.channels, network.size) == (1, 32)
    assert (network.num_features, network.num_classes) == (64, 10)


def test_features_of_an_image_depend_on_it_alone_even_in_training_mode(network):
    images = noise(5)
    features = network(images)
    assert features.shape == (5, 64)
    assert network.logits(images).shape == (5, 10)

    torch.nn.Sequential(network).train()
    torch.testing.assert_close(network.features(images[1:2]), features[1:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.head(features), network.logits(images))


def test_images_without_their_frame_get_it(network):
    small = noise(2)[..., 2:30, 2:30]
    assert torch.equal(network(small), network(torch.nn.functional.pad(small, [2] * 4)))


def test_images_keep_their_gradient(network):
    images = noise(2).requires_grad_()
    network(images).sum().backward()
    assert bool((images.grad != 0).any())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (noise(2)[..., 1:31, 1:31], r"28 x 28 or 32 x 32 .* got \(2, 1, 30, 30\); average colours"),
        (noise(2).expand(-1, 3, -1, -1), r"got \(2, 3, 32, 32\); average colours"),
        (noise(2)[0], r"got \(1, 32, 32\)"),
        (noise(2).round() * 2 - 1, r"pixels in \[0, 1\], got torch\.float32 from -1 to 1"),
        (noise(2) * torch.nan, "from nan to nan"),
        (noise(2).round().byte(), r"floating-point pixels .* got torch\.uint8 from 0 to 1"),
    ],
)
def test_other_images_are_refused(network, images, message):
    with pytest.raises(ValueError, match=message):
        network(images)


def test_a_damaged_file_is_refused(tmp_path):
    for suffix in (".safetensors", ".json"):
        shutil.copy((ASSETS / ASSET).with_suffix(suffix), tmp_path)
    path = tmp_path / ASSET
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match=r"classifier .* is damaged or was replaced"):
        FashionFeatures.from_asset(path)


def test_a_file_of_other_layers_is_refused():
    message = r"mixture_digits\.safetensors has not the layers of FashionFeatures"
    with pytest.raises(ValueError, match=message):
        FashionFeatures.from_asset("mixture_digits.safetensors")


def test_an_absent_file_is_refused():
    message = r"neither a path that exists nor a shipped file \(.*fashion_features"
    with pytest.raises(FileNotFoundError, match=message):
        FashionFeatures.from_asset("no.safetensors")


@pytest.fixture(scope="module")
def measured(clothes) -> dict[str, tuple[torch.Tensor, dict[str, float]]]:
    """Three sets of images and their metrics: like the reference, blurred, and of one class."""
    images, classes = clothes
    reference = images[:150]
    same = images[150:]
    blurred = torch.nn.functional.avg_pool2d(same, 3, stride=1, padding=1).mul(255).round() / 255
    sets = {"same": same, "blurred": blurred, "shoes": images[classes == 9]}
    return {name: (x, fidelity(x, reference, kid_subset_size=25)) for name, x in sets.items()}


def test_torchmetrics_and_torch_fidelity_agree_on_fid(network, clothes, measured):
    for images, metrics in measured.values():
        fid = FrechetInceptionDistance(feature=network, normalize=True, input_img_size=(1, 32, 32))
        fid.update(clothes[0][:150], real=True)
        fid.update(images, real=False)
        expected = metrics["frechet_inception_distance"]
        assert float(fid.compute()) == pytest.approx(expected, rel=1e-4)


def test_the_features_order_images_by_their_faults(measured):
    same, blurred, shoes = (metrics for _, metrics in measured.values())
    fid = "frechet_inception_distance"
    kid = "kernel_inception_distance_mean"

    assert 2 * same[fid] < blurred[fid] < shoes[fid] / 10
    assert abs(same[kid]) < blurred[kid] < shoes[kid]
    assert shoes["recall"] < 0.2 < 0.5 < same["recall"]  # one class of ten
    assert shoes["inception_score_mean"] < 1.5 < 6 < same["inception_score_mean"]


def test_torch_fidelity_caches_by_the_weights(tmp_path, network):
    fidelity(noise(8), noise(8), cache=True, cache_root=str(tmp_path), input1_cache_name="noise")
    names = {path.name for path in tmp_path.iterdir()}
    assert f"noise-oss-exp-fashion-{network.fingerprint[:12]}-features-logits.pt" in names


def test_torch_fidelity_takes_a_weights_path_and_no_other_precision(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"classifier no\.safetensors is neither"):
        fidelity(noise(8), noise(8), feature_extractor_weights_path="no.safetensors")
    message = "runs in float32, got feature_extractor_internal_dtype='float64'"
    with pytest.raises(ValueError, match=message):
        fidelity(noise(8), noise(8), feature_extractor_internal_dtype="float64")


@pytest.fixture
def bright() -> torch.Tensor:
    """Images without black pixels."""
    torch.manual_seed(0)
    return torch.rand(200, 1, 8, 8) + 0.1


def test_without_augmentation_images_stay_as_they_are(bright):
    assert torch.equal(augment(bright, 0, 0), bright)


def test_augmented_images_are_shifted_in_every_direction(bright):
    shifted = augment(bright, 1, 0)
    windows = torch.nn.functional.pad(bright, [1] * 4).unfold(2, 8, 1).unfold(3, 8, 1).flatten(2, 3)
    match = (windows == shifted[:, :, None]).flatten(3).all(3).flatten(1)  # (200, 9)
    assert bool((match.sum(1) == 1).all())
    assert bool(match.any(0).all())


def test_half_of_the_augmented_images_have_a_hole(bright):
    holes = (augment(bright, 0, 3) == 0).flatten(1).sum(1)
    assert 60 < int((holes > 0).sum()) < 140
    assert int(holes.max()) == 9


def write_files(folder: Path, count: int) -> None:
    """Write squares whose brightness is their class as Fashion-MNIST's four files."""
    for split in ("train", "t10k"):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 4:24, 4:24] = 25 * labels[:, None, None]
        write_fashion(folder, images, labels, split, zipped=True)


@pytest.mark.slow
def test_the_command_trains_and_saves_a_classifier(tmp_path, monkeypatch):
    write_files(tmp_path, 320)
    monkeypatch.chdir(tmp_path)
    command = [
        "task=fit_classifier",
        f"images.root={tmp_path}",
        "task.batch_size=32",
        "task.output=small.safetensors",
        "task.epochs=3",
    ]
    run_cli(*command)

    # Its record.
    record = json.loads((tmp_path / "small.json").read_text())
    assert record["test_accuracy"] > 0.3  # three times the accuracy of a guess
    assert record["made_by"] == " ".join(["oss-exp", *command])
    assert record["data"]["train_images"] == 320

    # Its weights, also of a second training.
    network = FashionFeatures.from_asset(tmp_path / "small.safetensors")
    images = pixels(fashion_mnist(str(tmp_path), "test", 32))
    assert accuracy(network, *images) == record["test_accuracy"]
    run_cli(*command)
    assert json.loads((tmp_path / "small.json").read_text())["sha256"] == record["sha256"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task.epochs=0", "task.epochs must be a whole number of at least 1, got 0"),
        ("task.learning_rate=1e38", "the loss is nan in epoch 2; lower task.learning_rate"),
        ("images.size=30", r"28 x 28 or 32 x 32 .* got \(320, 1, 30, 30\)"),
    ],
)
def test_wrong_settings_end_with_one_message(tmp_path, monkeypatch, capsys, setting, message):
    write_files(tmp_path, 320)
    monkeypatch.chdir(tmp_path)
    command = ["task=fit_classifier", f"images.root={tmp_path}"]
    with pytest.raises(SystemExit):
        run_cli(*command, "task.epochs=2", "task.batch_size=320", setting)
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "fashion_features.safetensors").exists()
