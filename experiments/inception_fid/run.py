"""FID between sets of real CIFAR-10 images, to compare our Inception-V3 with published numbers.

python -m experiments.inception_fid.run --inception default_1.pt --cifar10 FOLDER [--cache FOLDER]

Features are cached, a file for every thousand images, so that an interrupted run continues where
it stopped. The table is written row by row.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from experiments.common import OUTPUTS, command_line, keep, table
from oss_exp.data.cifar10 import cifar10
from oss_exp.evaluation.features import InceptionV3
from oss_exp.evaluation.statistics import fingerprint, frechet, gram, moments
from oss_exp.files import write_atomically

CHUNK = 1000  # images a cache file
BATCH = 50
PAIRS = {  # two sets of images, and their FID elsewhere
    "2,000 train, 2,000 test": (("train", 0, 2000), ("test", 0, 2000), "around 30 [1]"),
    "2,000 train, another 2,000": (("train", 0, 2000), ("train", 2000, 4000), ""),
    "5,000 train, 5,000 test": (("train", 0, 5000), ("test", 0, 5000), ""),
    "5,000 train, another 5,000": (("train", 0, 5000), ("train", 5000, 10_000), ""),
    "10,000 train, 10,000 test": (("train", 0, 10_000), ("test", 0, 10_000), ""),
    "50,000 train, 10,000 test": (("train", 0, 50_000), ("test", 0, 10_000), "3.1 [2]"),
    "25,000 train, the other 25,000": (("train", 0, 25_000), ("train", 25_000, 50_000), ""),
}


HEADER = ["real CIFAR-10 images", "FID", "torchmetrics", "elsewhere"]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--inception", required=True)
    parser.add_argument("--cifar10", required=True)
    parser.add_argument("--cache", type=Path, default=OUTPUTS / "inception_fid")
    options = parser.parse_args()

    # Network and images.
    extractor = InceptionV3(options.inception)
    folder = options.cache / fingerprint(extractor).replace(" ", "_")
    images = {split: cifar10(options.cifar10, split)[0] for split in ("train", "test")}

    # One row a pair of sets.
    rows = []
    for name, (one_set, other_set, elsewhere) in PAIRS.items():
        one = features(extractor, images[one_set[0]], *one_set, folder)
        other = features(extractor, images[other_set[0]], *other_set, folder)
        numbers = [f"{fid(one, other):.3f}", f"{fid_of_torchmetrics(one, other):.3f}"]
        rows.append([name, *numbers, elsewhere])
        keep(__file__, "table.md", table(HEADER, rows))


@torch.no_grad()
def features(
    extractor: nn.Module, images: Tensor, split: str, first: int, last: int, folder: Path
) -> Tensor:
    """Return the features of images `first` to `last`, from the cache where they are there.

    Args:
        extractor: Network from (n, 3, 32, 32) in [0, 1] to (n, 2048).
        images: All images of the split (n, 3, 32, 32) in [-1, 1].
        split: Name of the split, for the cache.
        first: First image, a multiple of CHUNK.
        last: One past the last image.
        folder: Folder of the cache.

    Returns:
        (last - first, 2048) float32.
    """
    parts = []
    for start in track(range(first, last, CHUNK), f"{split} {first} to {last}"):
        path = folder / f"{split}_{start:05d}.npy"
        if not path.exists():
            chunk = (images[start : start + CHUNK] + 1) / 2
            outputs = [extractor(batch) for batch in chunk.split(BATCH)]
            buffer = io.BytesIO()
            np.save(buffer, torch.cat(outputs).numpy())
            write_atomically(path, buffer.getvalue())
        parts.append(torch.from_numpy(np.load(path)))
    return torch.cat(parts)


def fid(one: Tensor, other: Tensor) -> float:
    """Return the FID between features (n, F) and (m, F)."""
    mu, sigma, _ = moments(sum(map(gram, one.split(CHUNK))))
    other_mu, other_sigma, _ = moments(sum(map(gram, other.split(CHUNK))))
    return frechet(mu, sigma, other_mu, other_sigma)


def fid_of_torchmetrics(one: Tensor, other: Tensor) -> float:
    """Return the FID between the same features by torchmetrics."""
    identity = nn.Identity()
    identity.num_features = one.shape[1]
    metric = FrechetInceptionDistance(identity)
    metric.update(one, real=True)
    metric.update(other, real=False)
    return metric.compute().item()


if __name__ == "__main__":
    main()
