"""Noises are functions of seed and index; files of images are read whole or refused."""

import gzip
import hashlib
import struct
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from threading import Thread

import numpy as np
import pytest
import torch
from helpers import write_fashion
from safetensors.torch import save_file
from torchvision.datasets import FashionMNIST

from oss_exp.data.captioned import ColouredFashion
from oss_exp.data.images import cached_latents, digits, fashion_mnist, mixture_samples
from oss_exp.data.noise import HELD_OUT, NoiseData, NoiseDataset


def noise_data(**changes) -> NoiseData:
    """Return data of small counts, with changed settings."""
    settings = {
        "event_shape": (1, 4, 4),
        "num_classes": 3,
        "seed": 7,
        "search_samples": 6,
        "eval_samples": 5,
        "per_sample": 2,
        "batch_size": 4,
        "classes": None,
    }
    return NoiseData(**(settings | changes))


def items(loader) -> dict[int, torch.Tensor]:
    """Return the noise of every sample by its index."""
    result = {}
    for batch in loader:
        result |= dict(zip(batch["index"].tolist(), batch["noise"], strict=True))
    return result


def test_a_sample_depends_on_seed_and_index_alone():
    few = items(noise_data(batch_size=1).test_dataloader())
    many = items(noise_data(eval_samples=9).test_dataloader())
    other = items(noise_data(seed=8).test_dataloader())
    for i, noise in few.items():
        assert many[i].equal(noise)
        assert not other[i].equal(noise)


def test_search_and_held_out_samples_are_disjoint():
    data = noise_data(search_samples=500, eval_samples=500, event_shape=(64,))
    search, per_sample = (items(loader) for loader in data.predict_dataloader())
    held_out = items(data.test_dataloader())

    assert not search.keys() & held_out.keys()
    assert per_sample.keys() == {HELD_OUT, HELD_OUT + 1}
    assert all(held_out[i].equal(noise) for i, noise in per_sample.items())


def test_search_and_held_out_noises_are_independent_and_normal():
    data = noise_data(search_samples=500, eval_samples=500, event_shape=(64,))
    search = torch.stack([*items(data.predict_dataloader()[0]).values()])
    held_out = torch.stack([*items(data.test_dataloader()).values()])

    n = search.numel()
    assert abs(float((search * held_out).mean())) < 4 / n**0.5
    assert abs(float(search.mean())) < 4 / n**0.5
    assert abs(float(search.var()) - 1) < 6 / n**0.5


def test_classes_cycle_through_the_list():
    labels = [item["label"] for item in NoiseDataset(0, 0, 5, (1,), [2, 0])]
    assert labels == [2, 0, 2, 0, 2]
    assert noise_data(classes="all").classes == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search_samples": 0}, r"search_samples must be from 1 to .*, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"classes": [3]}, "from 0 to 2"),
        ({"classes": []}, "from 0 to 2"),
        ({"classes": "auto"}, 'null, "all" or a list'),
        ({"classes": [0], "num_classes": None}, "the model has no classes"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        noise_data(**changes)


@pytest.mark.parametrize("layout", ["gz", "torchvision"])
def test_both_layouts_of_fashion_mnist_are_read(tmp_path, layout):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 28, 28), np.uint8)
    labels = np.arange(5, dtype=np.uint8)
    if layout == "gz":
        write_fashion(tmp_path, images, labels, zipped=True)
    else:
        write_fashion(tmp_path / "FashionMNIST" / "raw", images, labels)

    loaded, classes = fashion_mnist(str(tmp_path))

    assert loaded.shape == (5, 1, 28, 28)
    assert torch.equal(((loaded[:, 0] + 1) * 127.5).round().byte(), torch.from_numpy(images))
    assert classes.tolist() == [0, 1, 2, 3, 4]


def test_missing_files_are_refused_with_what_to_set(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"set images\.root"):
        fashion_mnist(str(tmp_path))


def test_images_and_labels_of_different_numbers_are_refused(tmp_path):
    write_fashion(tmp_path, np.zeros((3, 28, 28)), [0] * 2, zipped=True)
    with pytest.raises(ValueError, match="3 images but 2 labels"):
        fashion_mnist(str(tmp_path))


def test_truncated_images_are_refused(tmp_path):
    write_fashion(tmp_path, np.zeros((3, 28, 28)), [0] * 3, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        fashion_mnist(str(tmp_path))


def test_digits_are_images_from_minus_one_to_one_in_ten_classes():
    images, labels = digits(None)
    assert images.shape == (1797, 1, 8, 8)
    assert float(images.min()) == -1
    assert float(images.max()) == 1
    assert labels.unique().tolist() == list(range(10))


def test_cached_latents_are_those_of_the_file(tmp_path):
    latents = torch.randn(5, 4, 2, 2).half()
    labels = torch.arange(5, dtype=torch.int32)
    save_file({"latents": latents, "labels": labels}, tmp_path / "l.safetensors")

    loaded, classes = cached_latents(str(tmp_path / "l.safetensors"))

    assert torch.equal(loaded, latents.float())
    assert torch.equal(classes, labels.long())


def test_latents_that_cannot_be_used_are_refused(tmp_path):
    path = tmp_path / "l.safetensors"
    with pytest.raises(FileNotFoundError, match="does not exist; it holds"):
        cached_latents(str(path))

    save_file({"latents": torch.zeros(5, 4, 2, 2), "labels": torch.zeros(4)}, path)
    shapes = r"has labels \(4,\), latents|has latents \(5, 4, 2, 2\), labels"
    with pytest.raises(ValueError, match=shapes):
        cached_latents(str(path))

    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is truncated"):
        cached_latents(str(path))


@pytest.mark.parametrize("labels", [torch.tensor([-2, 0]), torch.tensor([0.5, 1.0])])
def test_labels_of_latents_are_classes(labels, tmp_path):
    path = tmp_path / "l.safetensors"
    save_file({"latents": torch.zeros(2, 4, 2, 2), "labels": labels}, path)
    message = "labels must be whole numbers from 0 on, or -1 for no class"
    with pytest.raises(ValueError, match=message):
        cached_latents(path)


@pytest.fixture
def both_splits(tmp_path):
    """A folder with three white training images and two white test images."""
    for prefix, count in (("train", 3), ("t10k", 2)):
        write_fashion(tmp_path, np.full((count, 28, 28), 255), [0] * count, prefix)
    return str(tmp_path)


def test_fashion_mnist_has_a_test_split_and_a_black_frame(both_splits):
    images, labels = fashion_mnist(both_splits, split="test", size=32)
    assert images.shape == (2, 1, 32, 32)
    assert len(labels) == 2
    assert (images[:, :, 2:-2, 2:-2] == 1).all()
    assert images.sum() == 2 * (784 - (1024 - 784))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 26}, "size must be from 28 to 1024"),
        ({"size": 31}, "size must be an even number"),
        ({"size": 10**9}, "size"),
        ({"split": "validation"}, "split must be one of train, test"),
    ],
)
def test_wrong_settings_of_fashion_mnist_are_refused(settings, message, both_splits):
    with pytest.raises(ValueError, match=message):
        fashion_mnist(both_splits, **settings)


def test_samples_of_a_mixture_are_images_with_labels():
    images, labels = mixture_samples("mixture_digits.safetensors", count=30, seed=0)
    assert images.shape == (30, 1, 8, 8)
    assert labels.shape == (30,)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder in the place of the internet, with torchvision's Fashion-MNIST."""
    folder = tmp_path / "mirror"
    for prefix, count in (("train", 3), ("t10k", 2)):
        write_fashion(folder, np.full((count, 28, 28), 255), [1] * count, prefix, zipped=True)
    files = sorted(folder.iterdir())
    sums = [(file.name, hashlib.md5(file.read_bytes()).hexdigest()) for file in files]

    server = HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder))
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(FashionMNIST, "resources", sums)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield
    server.shutdown()
    server.server_close()


def test_missing_files_are_downloaded_once_and_on_request_only(tmp_path, mirror, monkeypatch):
    root = tmp_path / "data"
    missing = r"no train-images-idx3-ubyte.* with images\.download=true"
    with pytest.raises(FileNotFoundError, match=missing):
        fashion_mnist(root)

    assert fashion_mnist(root, download=True)[0].shape == (3, 1, 28, 28)
    assert fashion_mnist(root, "test")[1].tolist() == [1, 1]

    monkeypatch.setattr(FashionMNIST, "mirrors", [])
    assert len(ColouredFashion(root, download=True)) == 3 * 8


def test_a_download_that_fails_is_an_error_with_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setattr(FashionMNIST, "mirrors", [])
    (tmp_path / "file").touch()
    message = r"Fashion-MNIST could not be downloaded into .*file.*: .*; set images\.root"
    with pytest.raises(ValueError, match=message):
        fashion_mnist(tmp_path / "file", download=True)


@pytest.mark.parametrize(
    ("count", "message"),
    [(2**31 - 1, "no IDX file"), (0, "no IDX file"), (2, "not the 2 items of its header")],
)
def test_no_more_is_unpacked_than_a_header_says(count, message, tmp_path):
    write_fashion(tmp_path, np.zeros((3, 28, 28)), [0] * 3)
    (tmp_path / "train-images-idx3-ubyte").unlink()
    data = struct.pack(">4i", 2051, count, 28, 28) + bytes(1 << 20)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(data))

    with pytest.raises(ValueError, match=rf"train-images-idx3-ubyte\.gz .*{message}"):
        fashion_mnist(tmp_path)


def test_images_in_the_place_of_labels_are_refused(tmp_path):
    write_fashion(tmp_path, np.zeros((3, 28, 28)), [0] * 3)
    images = (tmp_path / "train-images-idx3-ubyte").read_bytes()
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(images)
    message = "train-labels-idx1-ubyte is truncated or no IDX file of labels"
    with pytest.raises(ValueError, match=message):
        fashion_mnist(tmp_path)
