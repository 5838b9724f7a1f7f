"""Images as people have them: files in folders, of any size, some of them not images at all.

Folders become classes, in the order of their numbers where they are numbered. Legend: C channels.
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
LONGEST = 8  # times the shorter side: what lies beyond is cut off before anything is resized

log = logging.getLogger(__name__)


class ImageFolder(Dataset):
    """Items (C, size, size) in [-1, 1], label.

    samples: (path, label) of every item. classes: names of the folders, by label; none where images lie in the root
    itself: their label is NO_CLASS.
    """

    def __init__(self, root: Path, size: int, channels: int, background: Background):
        self.channels = channels
        self.background: Background = background
        self.resize = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])
        self.classes, self.samples = _listed(root)

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
    """Images in one folder a class, root/<class>/<image>, or without classes in root itself.

    Items are (C, size, size) in [-1, 1] and a label. The shorter side is resized to `size`, then the middle is cut out;
    channels 1 (grey) or 3 (RGB); background: what shows through transparent images. Files are read when needed.
    """
    require_choice((1, 3), channels=channels)
    require_choice(get_args(Background), background=background)
    require_range(at_least=1, at_most=4096, size=size)
    if not (path := Path(root).expanduser()).is_dir():
        raise FileNotFoundError(
            f"root={root} is no folder; give one that has a folder of images for each class"
        )
    return ImageFolder(path, size, channels, background)


# --------------------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------------------


def _listed(root: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """The names of the classes, and (path, label) of every image."""
    folders = in_order(
        [entry.name for entry in os.scandir(root) if entry.is_dir() and not _hidden(entry.name)]
    )
    images = {name: _images(root / name) for name in folders}
    others: Counter[str] = Counter()
    loose = [(path, NO_CLASS) for path in _files(root, deep=False, others=others)]
    if not any(images.values()):
        if loose:
            return [], loose
        for name in folders:
            list(_files(root / name, deep=True, others=others))
        seen = ", ".join(
            f"{count} {ending or 'without ending'}" for ending, count in others.most_common(4)
        )
        raise FileNotFoundError(
            f"root={root} has no images, neither in folders of classes nor in itself"
            f"{f' (other files: {seen})' * bool(seen)}; an image ends in {', '.join(ENDINGS)}"
        )

    splits = [name for name in folders if name.casefold() in SPLITS]
    if len(splits) == len(folders) or len(splits) > 1:
        raise ValueError(
            f"root={root} has the splits {', '.join(splits)} and no classes; choose one, as root={root / splits[0]}"
        )
    if empty := [name for name in folders if not images[name]]:
        log.warning(
            "%s: no images in the folder of class %s, whose number stays free",
            root,
            ", ".join(empty[:5]),
        )
    if loose:
        log.warning("%s: %d images beside the folders of classes are left out", root, len(loose))
    return folders, [(path, label) for label, name in enumerate(folders) for path in images[name]]


def in_order(names: list[str]) -> list[str]:
    """Names by their number where they differ by nothing else (2 before 10), else as text."""
    numbered = [match for match in map(NUMBERED.fullmatch, names) if match]
    if len(numbered) == len(names) and len({(match[1], match[3]) for match in numbered}) == 1:
        return [match[0] for match in sorted(numbered, key=lambda match: (int(match[2]), match[0]))]
    return sorted(names)


def _images(folder: Path) -> list[str]:
    return list(_files(folder, deep=True, others=Counter()))


def _files(folder: Path, deep: bool, others: Counter[str]) -> Iterator[str]:
    """Paths of the images in a folder and, where `deep`, below it; others: counts endings of files that are none."""
    seen: set[tuple[int, int]] = set()  # a link may lead back
    for place, below, files in os.walk(folder, followlinks=True):
        status = os.stat(place)
        below[:] = sorted(name for name in below if deep and not _hidden(name))
        if (key := (status.st_dev, status.st_ino)) in seen:
            below.clear()
            continue
        seen.add(key)
        for name in sorted(name for name in files if not _hidden(name)):
            ending = os.path.splitext(name)[1].casefold()
            if ending in ENDINGS:
                yield os.path.join(place, name)
            else:
                others[ending[:20]] += 1


def _hidden(name: str) -> bool:
    """What file browsers, notebooks and archives leave beside the user's own files."""
    return name.startswith(".") or name == "__MACOSX"
