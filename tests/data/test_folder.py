"""Folders of images: which files are read, what their pixels become, and broken ones."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from oss_exp.data.folder import image_folder, in_order
from oss_exp.image_files import BrokenImage, read_image
from oss_exp.models.guidance import NO_CLASS

RAMP = np.linspace(0, 1, 32)[None].repeat(32, 0)  # dark on the left, bright on the right


def save(path, values=None, **more):
    """Save a small image, grey unless it has other values; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full((4, 4), 128, np.uint8) if values is None else values
    Image.fromarray(array).save(path, **more)
    return path


def labels(root) -> list[tuple[str, int]]:
    """Return the relative path and the label of every image."""
    samples = image_folder(root, 4, 1).samples
    return [(os.path.relpath(path, root), label) for path, label in samples]


# ------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------


def test_items_are_the_middle_square_of_the_shorter_side(tmp_path):
    for name, size, colour in [("cat", (20, 10), (255, 0, 0)), ("dog", (10, 30), (51, 51, 51))]:
        (tmp_path / name).mkdir()
        Image.new("RGB", size, colour).save(tmp_path / name / "1.PNG", "png")

    data = image_folder(str(tmp_path), size=8, channels=3)

    red, first = data[0]
    grey, second = data[1]
    assert (first, second, len(data)) == (0, 1, 2)
    torch.testing.assert_close(red, torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 8, 8))
    torch.testing.assert_close(grey, torch.full((3, 8, 8), 51 / 127.5 - 1))
    assert image_folder(str(tmp_path), size=8, channels=1)[1][0].shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["10", "2", "0", "1"], ["0", "1", "2", "10"]),
        (["class_10", "class_9"], ["class_9", "class_10"]),
        (["010", "9"], ["9", "010"]),
        (["n10", "n9", "cat"], ["cat", "n10", "n9"]),
        (["a10", "b9"], ["a10", "b9"]),
        (["v1.10", "v1.9"], ["v1.9", "v1.10"]),
    ],
)
def test_numbered_classes_are_in_the_order_of_their_numbers(names, expected, tmp_path):
    assert in_order(names) == expected
    for name in names:
        save(tmp_path / name / "x.png")
    assert labels(tmp_path) == [(f"{name}/x.png", label) for label, name in enumerate(expected)]


IMAGES = [
    "a/0.png",
    "b/deep/0.jpeg",
    ".ipynb_checkpoints/0.png",
    "__MACOSX/a/0.png",
    "b/.thumbs/0.png",
]
OTHER_FILES = ["a/._0.png", "a/Thumbs.db", "a/captions.txt", ".DS_Store"]


def test_files_of_operating_systems_are_no_classes_and_no_images(tmp_path):
    for name in IMAGES:
        save(tmp_path / name)
    for name in OTHER_FILES:
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    os.symlink(tmp_path, tmp_path / "b" / "back")  # an endless path

    paths = [(path, label) for path, label in labels(tmp_path) if "back" not in path]
    assert paths == [("a/0.png", 0), ("b/deep/0.jpeg", 1)]


def test_a_class_without_images_keeps_its_number_and_is_named(tmp_path, caplog):
    save(tmp_path / "a" / "0.png")
    (tmp_path / "b").mkdir()
    save(tmp_path / "c" / "0.png")
    save(tmp_path / "preview.png")
    with caplog.at_level(logging.WARNING):
        assert labels(tmp_path) == [("a/0.png", 0), ("c/0.png", 2)]
    assert "no images in the folder of class b" in caplog.text
    assert "1 images beside the folders of classes are left out" in caplog.text


def test_images_without_folders_have_no_class(tmp_path):
    for name in ("1.png", "0.WEBP", "2.tiff"):
        save(tmp_path / name)
    (tmp_path / "notes").mkdir()
    assert labels(tmp_path) == [("0.WEBP", NO_CLASS), ("1.png", NO_CLASS), ("2.tiff", NO_CLASS)]


@pytest.mark.parametrize(
    "names", [["train", "val"], ["Train"], ["training", "test", "annotations"]]
)
def test_splits_are_no_classes(names, tmp_path):
    for name in names:
        save(tmp_path / name / "a" / "0.png")
    splits = r"has the splits .* and no classes; choose one, as root=.*[tT]"
    with pytest.raises(ValueError, match=splits):
        image_folder(tmp_path)
    assert len(image_folder(tmp_path / names[0])) == 1


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train", "plane"):
        save(tmp_path / name / "0.png")
    assert labels(tmp_path) == [("plane/0.png", 0), ("train/0.png", 1)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 4}, "channels must be one of 1, 3, got 4"),
        ({"background": "red"}, "background must be one of white, black, got 'red'"),
    ],
)
def test_wrong_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        image_folder(tmp_path, **settings)


def test_an_absent_folder_is_refused():
    with pytest.raises(FileNotFoundError, match="root=/nowhere is no folder"):
        image_folder("/nowhere", 8, 3)


def test_a_folder_without_images_is_refused_with_its_other_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.heic").touch()
    message = r"has no images, neither .* \(other files: 1 \.heic\)"
    with pytest.raises(FileNotFoundError, match=message):
        image_folder(tmp_path, 8, 3)


# ------------------------------------------------------------------------------------------------
# Pixels
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("16.png", (RAMP * 65535).astype(np.uint16)),
        ("16.tif", (RAMP * 65535).astype(np.uint16)),
        ("big endian.tif", (RAMP * 65535).astype(">u2")),
        ("32.tif", (RAMP * 65535).astype(np.int32)),
        ("floats.tif", RAMP.astype(np.float32)),
        ("8.png", (RAMP * 255).astype(np.uint8)),
    ],
)
def test_a_ramp_runs_from_black_to_white_at_every_depth(name, values, channels, tmp_path):
    data = image_folder(save(tmp_path / name, values).parent, 32, channels)
    expected = torch.from_numpy(RAMP).float().expand(channels, -1, -1) * 2 - 1
    torch.testing.assert_close(data[0][0], expected, rtol=0, atol=2 / 255)


@pytest.mark.parametrize(
    "values", [RAMP * 255, RAMP - 0.5, RAMP * np.nan], ids=["bytes", "negative", "nan"]
)
def test_floats_of_another_range_are_refused(values, tmp_path):
    with pytest.raises(BrokenImage, match=r"x\.tif cannot be read: floats must be from 0 to 1"):
        read_image(save(tmp_path / "x.tif", values.astype(np.float32)), 1, "white")


def transparent(kind: str) -> Image.Image:
    """Return an image that is all transparent, with black under it."""
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    if kind == "palette":
        image = image.convert("RGB").quantize(2)
        image.info["transparency"] = image.getpixel((0, 0))
    elif kind == "grey":
        image = image.convert("LA")
    elif kind == "key colour":
        image = image.convert("RGB")
        image.info["transparency"] = (0, 0, 0)
    return image


@pytest.mark.parametrize("kind", ["colours", "grey", "palette", "key colour"])
@pytest.mark.parametrize(("background", "value"), [("white", 255), ("black", 0)])
def test_the_background_shows_through_transparent_images(kind, background, value, tmp_path):
    image = transparent(kind)
    image.save(tmp_path / "x.png", transparency=image.info.get("transparency"))
    for channels in (1, 3):
        assert read_image(tmp_path / "x.png", channels, background).unique().tolist() == [value]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_the_camera_says(orientation, tmp_path):
    upright = (np.arange(12).reshape(3, 4) * 20).astype(np.uint8)
    stored = {  # EXIF 2.3, table of tag 274: the file of an upright scene
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation

    path = save(tmp_path / "x.png", np.ascontiguousarray(stored), exif=exif)

    assert read_image(path, 1, "white")[0].tolist() == upright.tolist()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_data_does_not_break_an_image(tmp_path):
    path = save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    assert read_image(path, 1, "white").unique().tolist() == [128]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_all_modes_are_read(mode, tmp_path):
    Image.new("RGB", (4, 4), "white").convert(mode).save(tmp_path / "x.tif")
    assert read_image(tmp_path / "x.tif", 1, "black").unique().tolist() == [255]


# ------------------------------------------------------------------------------------------------
# Broken images
# ------------------------------------------------------------------------------------------------


def cut(path):
    """Write an image without its end."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    path.write_bytes(save(path, noise).read_bytes()[:-200])


def huge(path):
    """Write a small file of many pixels."""
    Image.new("1", (10_000, 10_000)).save(path)


def program(path):
    """Write PostScript, which Pillow would give to Ghostscript."""
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n(x) run\n")


each_broken_image = pytest.mark.parametrize(
    "make", [cut, huge, program, Path.touch, os.mkfifo], ids=["cut", "huge", "eps", "empty", "pipe"]
)


@each_broken_image
def test_a_broken_image_is_one_line_with_its_name(make, tmp_path):
    make(tmp_path / "0.png")
    message = r"^image .*0\.png (cannot be read|is damaged|has more than|is not a file)"
    with pytest.raises(ValueError, match=message) as error:
        next(iter(DataLoader(image_folder(tmp_path, 4, 1))))
    assert "\n" not in str(error.value)


@each_broken_image
def test_a_broken_image_is_one_line_from_a_worker_too(make, tmp_path):
    make(tmp_path / "0.png")
    with pytest.raises(BrokenImage) as error:
        image_folder(tmp_path, 4, 1)[0]

    # A loader raises it again, with the traceback of its worker as the argument.
    info = (type(error.value), error.value, error.tb)
    with pytest.raises(BrokenImage) as again:
        ExceptionWrapper(info, "in DataLoader worker process 0").reraise()

    assert "Traceback" in again.value.args[0]
    assert str(again.value) == str(error.value)


def test_a_thin_image_is_not_enlarged_as_a_whole(tmp_path):
    """It would be 64 x 64 x 4,000,000 pixels."""
    Image.new("L", (4_000_000, 1), 255).save(tmp_path / "0.png")
    assert image_folder(tmp_path, 64, 1)[0][0].unique().tolist() == [1]
