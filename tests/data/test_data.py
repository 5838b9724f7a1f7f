"""Samples are functions of (seed, index); image files are read whole or refused."""

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


def items(loader):
    return {
        int(i): n for batch in loader for i, n in zip(batch["index"], batch["noise"], strict=True)
    }


def test_a_sample_depends_on_seed_and_index_alone():
    few, many = (
        items(noise_data(batch_size=1).test_dataloader()),
        items(noise_data(eval_samples=9).test_dataloader()),
    )
    assert all(many[i].equal(noise) for i, noise in few.items())
    other = items(noise_data(seed=8).test_dataloader())
    assert not any(other[i].equal(noise) for i, noise in few.items())


def test_search_and_held_out_are_disjoint_and_independent():
    data = noise_data(search_samples=500, eval_samples=500, event_shape=(64,))
    search, per_sample = (items(loader) for loader in data.predict_dataloader())
    held_out = items(data.test_dataloader())
    assert not search.keys() & held_out.keys()
    assert per_sample.keys() == {HELD_OUT, HELD_OUT + 1}
    assert all(held_out[i].equal(noise) for i, noise in per_sample.items())
    a, b = torch.stack(list(search.values())), torch.stack(list(held_out.values()))
    n = a.numel()
    assert abs(float((a * b).mean())) < 4 / n**0.5
    assert abs(float(a.mean())) < 4 / n**0.5
    assert abs(float(a.var()) - 1) < 6 / n**0.5


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
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        noise_data(**changes)


@pytest.mark.parametrize("layout", ["gz", "torchvision"])
def test_fashion_mnist_files(tmp_path, layout):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 28, 28), np.uint8), np.arange(5, dtype=np.uint8)
    if layout == "gz":
        write_fashion(tmp_path, images, labels, zipped=True)
    else:
        write_fashion(tmp_path / "FashionMNIST" / "raw", images, labels)
    loaded, classes = fashion_mnist(str(tmp_path))
    assert loaded.shape == (5, 1, 28, 28)
    assert torch.equal(((loaded[:, 0] + 1) * 127.5).round().byte(), torch.from_numpy(images))
    assert classes.tolist() == [0, 1, 2, 3, 4]


def test_broken_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"set images\.root"):
        fashion_mnist(str(tmp_path))
    images, labels = np.zeros((3, 28, 28), np.uint8), np.zeros(3, np.uint8)
    write_fashion(tmp_path, images, labels[:2], zipped=True)
    with pytest.raises(ValueError, match="3 images but 2 labels"):
        fashion_mnist(str(tmp_path))
    write_fashion(tmp_path, images, labels, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        fashion_mnist(str(tmp_path))


def test_digits():
    images, labels = digits(None)
    assert images.shape == (1797, 1, 8, 8)
    assert float(images.min()) == -1
    assert float(images.max()) == 1
    assert labels.unique().tolist() == list(range(10))


def test_cached_latents(tmp_path):
    latents, labels = torch.randn(5, 4, 2, 2).half(), torch.arange(5, dtype=torch.int32)
    save_file({"latents": latents, "labels": labels}, tmp_path / "l.safetensors")
    found, classes = cached_latents(str(tmp_path / "l.safetensors"))
    assert torch.equal(found, latents.float())
    assert torch.equal(classes, labels.long())


def test_latents_that_cannot_be_used_are_refused(tmp_path):
    path = tmp_path / "l.safetensors"
    with pytest.raises(FileNotFoundError, match="does not exist; it holds"):
        cached_latents(str(path))
    save_file({"latents": torch.zeros(5, 4, 2, 2), "labels": torch.zeros(4)}, path)
    with pytest.raises(
        ValueError, match=r"has labels \(4,\), latents|has latents \(5, 4, 2, 2\), labels"
    ):
        cached_latents(str(path))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is truncated"):
        cached_latents(str(path))


def test_fashion_mnist_grows_a_black_frame_and_has_a_test_split(tmp_path):
    for prefix, count in (("train", 3), ("t10k", 2)):
        write_fashion(tmp_path, np.full((count, 28, 28), 255), [0] * count, prefix)
    images, labels = fashion_mnist(str(tmp_path), split="test", size=32)
    assert images.shape == (2, 1, 32, 32)
    assert len(labels) == 2
    assert (images[:, :, 2:-2, 2:-2] == 1).all()
    assert images.sum() == 2 * (784 - (1024 - 784))
    for size, words in (
        (26, "size must be from 28 to 1024"),
        (31, "size must be an even number"),
        (10**9, "size"),
    ):
        with pytest.raises(ValueError, match=words):
            fashion_mnist(str(tmp_path), size=size)
    with pytest.raises(ValueError, match="split must be one of train, test"):
        fashion_mnist(str(tmp_path), split="validation")


def test_mixture_samples():
    images, labels = mixture_samples("mixture_digits.safetensors", count=30, seed=0)
    assert images.shape == (30, 1, 8, 8)
    assert labels.shape == (30,)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """torchvision's Fashion-MNIST, from a folder in the place of the internet."""
    folder = tmp_path / "mirror"
    for prefix, count in (("train", 3), ("t10k", 2)):
        write_fashion(folder, np.full((count, 28, 28), 255), [1] * count, prefix, zipped=True)
    sums = [
        (file.name, hashlib.md5(file.read_bytes()).hexdigest()) for file in sorted(folder.iterdir())
    ]
    server = HTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder))
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(FashionMNIST, "resources", sums)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield
    server.shutdown()
    server.server_close()


def test_fashion_mnist_is_downloaded_where_it_is_missing_and_asked_for(
    tmp_path, mirror, monkeypatch
):
    root = tmp_path / "data"
    with pytest.raises(
        FileNotFoundError, match=r"no train-images-idx3-ubyte.* with images\.download=true"
    ):
        fashion_mnist(root)
    assert fashion_mnist(root, download=True)[0].shape == (3, 1, 28, 28)
    assert fashion_mnist(root, "test")[1].tolist() == [1, 1]  # now it is there
    monkeypatch.setattr(FashionMNIST, "mirrors", [])
    assert len(ColouredFashion(root, download=True)) == 3 * 8
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError,
        match=r"Fashion-MNIST could not be downloaded into .*file.*: .*; set images\.root",
    ):
        fashion_mnist(tmp_path / "file", download=True)


def test_no_more_is_unpacked_than_a_header_says(tmp_path):
    write_fashion(tmp_path, np.zeros((3, 28, 28)), [0] * 3)
    for count, words in (
        (2**31 - 1, "no IDX file"),
        (0, "no IDX file"),
        (2, "not the 2 items of its header"),
    ):
        data = struct.pack(">4i", 2051, count, 28, 28) + bytes(1 << 20)
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(data))
        (tmp_path / "train-images-idx3-ubyte").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=rf"train-images-idx3-ubyte\.gz .*{words}"):
            fashion_mnist(tmp_path)
    write_fashion(tmp_path, np.zeros((3, 28, 28)), [0] * 3)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(
        (tmp_path / "train-images-idx3-ubyte").read_bytes()
    )
    with pytest.raises(
        ValueError, match="train-labels-idx1-ubyte is truncated or no IDX file of labels"
    ):
        fashion_mnist(tmp_path)


def test_labels_of_latents_are_classes(tmp_path):
    path = tmp_path / "l.safetensors"
    for labels in (torch.tensor([-2, 0]), torch.tensor([0.5, 1.0])):
        save_file({"latents": torch.zeros(2, 4, 2, 2), "labels": labels}, path)
        with pytest.raises(
            ValueError, match="labels must be whole numbers from 0 on, or -1 for no class"
        ):
            cached_latents(path)
