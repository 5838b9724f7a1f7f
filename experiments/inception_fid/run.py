"""FID between sets of real CIFAR-10 images, where others have numbers: is our Inception-V3 that of the literature?

python -m experiments.inception_fid.run --inception default_1.pt --cifar10 FOLDER [--cache FOLDER]

Features are kept in the cache, a file for every thousand images, so an interrupted run goes on where it was; the table
grows row by row.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from experiments.common import OUTPUTS, keep, table
from oss_exp.data.cifar10 import cifar10
from oss_exp.evaluation.features import InceptionV3
from oss_exp.evaluation.statistics import fingerprint, frechet, gram, moments
from oss_exp.files import write_atomically

CHUNK, BATCH = 1000, 50
PAIRS = {  # two sets of images, and their FID elsewhere
    "2,000 train, 2,000 test": (("train", 0, 2000), ("test", 0, 2000), "around 30 [1]"),
    "2,000 train, another 2,000": (("train", 0, 2000), ("train", 2000, 4000), ""),
    "5,000 train, 5,000 test": (("train", 0, 5000), ("test", 0, 5000), ""),
    "5,000 train, another 5,000": (("train", 0, 5000), ("train", 5000, 10_000), ""),
    "10,000 train, 10,000 test": (("train", 0, 10_000), ("test", 0, 10_000), ""),
    "50,000 train, 10,000 test": (("train", 0, 50_000), ("test", 0, 10_000), "3.1 [2]"),
    "25,000 train, the other 25,000": (("train", 0, 25_000), ("train", 25_000, 50_000), ""),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inception", required=True)
    parser.add_argument("--cifar10", required=True)
    parser.add_argument("--cache", type=Path, default=OUTPUTS / "inception_fid")
    options = parser.parse_args()
    extractor = InceptionV3(options.inception)
    folder = options.cache / fingerprint(extractor).replace(" ", "_")
    images = {split: cifar10(options.cifar10, split)[0] for split in ("train", "test")}
    rows = []
    for name, (*sets, elsewhere) in PAIRS.items():
        one, other = (
            features(extractor, images[split], split, first, last, folder)
            for split, first, last in sets
        )
        rows.append(
            [name, f"{fid(one, other):.3f}", f"{fid_of_torchmetrics(one, other):.3f}", elsewhere]
        )
        keep(
            __file__,
            "table.md",
            table(["real CIFAR-10 images", "FID", "torchmetrics", "elsewhere"], rows),
        )


@torch.no_grad()
def features(
    extractor: nn.Module, images: Tensor, split: str, first: int, last: int, folder: Path
) -> Tensor:
    """images (n, 3, 32, 32) in [-1, 1] -> (last - first, 2048) float32, from the cache where they are there."""
    parts = []
    for start in track(range(first, last, CHUNK), f"{split} {first} to {last}"):
        path = folder / f"{split}_{start:05d}.npy"
        if not path.exists():
            chunk = (images[start : start + CHUNK] + 1) / 2
            buffer = io.BytesIO()
            np.save(buffer, torch.cat([extractor(batch) for batch in chunk.split(BATCH)]).numpy())
            write_atomically(path, buffer.getvalue())
        parts.append(torch.from_numpy(np.load(path)))
    return torch.cat(parts)


def fid(one: Tensor, other: Tensor) -> float:
    """Features (n, F) and (m, F)."""
    (mu, sigma, _), (other_mu, other_sigma, _) = (
        moments(sum(map(gram, x.split(CHUNK)))) for x in (one, other)
    )
    return frechet(mu, sigma, other_mu, other_sigma)


def fid_of_torchmetrics(one: Tensor, other: Tensor) -> float:
    """The same from the same features."""
    identity = nn.Identity()
    identity.num_features = one.shape[1]
    metric = FrechetInceptionDistance(identity)
    metric.update(one, real=True)
    metric.update(other, real=False)
    return metric.compute().item()


if __name__ == "__main__":
    main()
