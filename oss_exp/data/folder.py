"""Images of users: files of any size in folders, some of them not images.

Folders become classes, in the order of their numbers where they are numbered.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from oss_exp.checks import require_choice, require_range
from oss_exp.image_files import ENDINGS, Background, read_image
from oss_exp.models.guidance import NO_CLASS

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
NUMBERED = re.compile(r"(.*?)(\d+)(\D*)")
LONGEST = 8  # longest side in shorter sides; what lies beyond is cut off before resizing

log = logging.getLogger(__name__)


class ImageFolder(Dataset):
    """Images (C, size, size) in [-1, 1] with labels, read when they are needed.

    Args:
        root: The folder.
        size: Side of the images in pixels.
        channels: 1 for grey images, 3 for RGB.
        background: What shows through transparent images.

    Attributes:
        classes: Names of the folders, by label; empty where images lie in the root
            itself.
        samples: Path and label of each image; the label is NO_CLASS without classes.
    """

    def __init__(self, root: Path, size: int, channels: int, background: Background):
        self.channels = channels
        self.background: Background = background
        self.resize = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])
        self.classes, self.samples = _classes_and_images(root)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path, label = self.samples[i]
        image = read_image(path, self.channels, self.background)
        height, width = image.shape[1:]
        most = LONGEST * min(height, width)
        if max(height, width) > most:
            image = v2.functional.center_crop(image, [min(height, most), min(width, most)])
        image = self.resize(image)
        return v2.functional.to_dtype(image, torch.float32, scale=True) * 2 - 1, label


def image_folder(
    root: str | Path, size: int = 32, channels: Literal[1, 3] = 3, background: Background = "white"
) -> Dataset:
    """Return the images of a folder as a data set of (C, size, size) in [-1, 1] and a label.

    Args:
        root: A folder with a folder of images for each class, or with images.
        size: Side in pixels: the shorter side is resized to it, then the middle is cut
            out.
        channels: 1 for grey images, 3 for RGB.
        background: What shows through transparent images.

    Raises:
        FileNotFoundError: If there is no folder, or there are no images.
        ValueError: If the folders are splits such as "train", not classes.
    """
    require_choice((1, 3), channels=channels)
    require_choice(get_args(Background), background=background)
    require_range(at_least=1, at_most=4096, size=size)
    path = Path(root).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"root={root} is no folder; give one that has a folder of images for each class"
        )
    return ImageFolder(path, size, channels, background)


# --------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------


def _classes_and_images(root: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Return the names of the classes, and path and label of each image."""
    # Images in folders, and beside them.
    names = []
    for entry in os.scandir(root):
        if entry.is_dir() and not _is_hidden(entry.name):
            names.append(entry.name)
    folders = in_order(names)
    images = {}
    for name in folders:
        images[name] = list(_files(root / name, deep=True, others=Counter()))
    others: Counter[str] = Counter()
    loose = list(_files(root, deep=False, others=others))

    # No classes.
    if not any(images.values()):
        if not loose:
            for name in folders:
                list(_files(root / name, deep=True, others=others))
            raise FileNotFoundError(_no_images(root, others))
        return [], [(path, NO_CLASS) for path in loose]

    # Folders that are not classes.
    splits = [name for name in folders if name.casefold() in SPLITS]
    if len(splits) == len(folders) or len(splits) > 1:
        raise ValueError(
            f"root={root} has the splits {', '.join(splits)} and no classes; "
            f"choose one, as root={root / splits[0]}"
        )

    # Folders and images that are not used.
    empty = [name for name in folders if not images[name]]
    if empty:
        text = "%s: no images in the folder of class %s, whose number stays free"
        log.warning(text, root, ", ".join(empty[:5]))
    if loose:
        log.warning("%s: %d images beside the folders of classes are left out", root, len(loose))

    samples = []
    for label, name in enumerate(folders):
        samples += [(path, label) for path in images[name]]
    return folders, samples


def _no_images(root: Path, others: Counter[str]) -> str:
    """Return the error message for a folder whose files have these endings."""
    counts = []
    for ending, count in others.most_common(4):
        counts.append(f"{count} {ending or 'without ending'}")
    files = f" (other files: {', '.join(counts)})" if counts else ""
    return (
        f"root={root} has no images, neither in folders of classes nor in itself{files}; "
        f"an image ends in {', '.join(ENDINGS)}"
    )


def in_order(names: list[str]) -> list[str]:
    """Sort names by their number where they differ by nothing else (2 before 10), else as text."""
    matches = [match for match in map(NUMBERED.fullmatch, names) if match]
    if len(matches) == len(names) and len({(match[1], match[3]) for match in matches}) == 1:
        matches.sort(key=lambda match: (int(match[2]), match[0]))
        return [match[0] for match in matches]
    return sorted(names)


def _files(folder: Path, deep: bool, others: Counter[str]) -> Iterator[str]:
    """Yield the paths of the images in a folder.

    Args:
        folder: The folder.
        deep: Whether folders below it are read too.
        others: Gets the number of other files, by ending.
    """
    visited: set[tuple[int, int]] = set()  # a link may lead back
    for place, below, files in os.walk(folder, followlinks=True):
        # Folders below, in place, as os.walk reads them.
        below[:] = sorted(name for name in below if deep and not _is_hidden(name))
        status = os.stat(place)
        identity = (status.st_dev, status.st_ino)
        if identity in visited:
            below.clear()
            continue
        visited.add(identity)

        # Files.
        for name in sorted(files):
            ending = os.path.splitext(name)[1].casefold()
            if _is_hidden(name):
                continue
            if ending in ENDINGS:
                yield os.path.join(place, name)
            else:
                others[ending[:20]] += 1


def _is_hidden(name: str) -> bool:
    """Return whether a file browser, a notebook or an archive made this file, not the user."""
    return name.startswith(".") or name == "__MACOSX"
