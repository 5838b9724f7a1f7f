"""What generated images are compared with: mean, covariance and features of real ones, in one .npz file.

Three layouts are read: EDM's (`mu`, `sigma`), ADM's (the same, with `mu_s` and `sigma_s` beside them) and ours, from
`write_statistics`, which also tells how many images of how many channels and which extractor, and keeps features.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oss_exp.files import find_asset, load_arrays, write_atomically

KEPT = 50_000  # features in a file, at most: as many images as FID, precision and recall are usually reported with
PUBLISHED = ("mu", "sigma")
NUMBERS, WHOLE, TEXT = "f", "iu", "U"  # numpy's kinds of dtypes
OURS = {
    "mu": NUMBERS,
    "sigma": NUMBERS,
    "n": WHOLE,
    "channels": WHOLE,
    "extractor": TEXT,
    "features": NUMBERS,
}
WIDEST = 8192  # features of an image; Inception-V3 has 2048
REMEDY = "make it again with oss_exp.evaluation.statistics.write_statistics"


def check_pixels(images: Tensor, what: str) -> None:
    """ValueError unless images (B, C, H, W), B >= 1, are in [0, 1]; a NaN is not."""
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{what} must be in [0, 1], decoded and clipped, got values from {low:g} to {high:g}"
        )


def gram(features: Tensor) -> Tensor:
    """features (B, F) -> (F+1, F+1) float64: sums of products, sums and the count. Adds up over batches and ranks."""
    rows = nn.functional.pad(features.double(), (0, 1), value=1.0)
    return rows.T @ rows


def moments(total: Tensor) -> tuple[np.ndarray, np.ndarray, int]:
    """Summed `gram` -> mean (F,), unbiased covariance (F, F) and the number of rows, at least 2."""
    sums = total.cpu().numpy()
    count = round(float(sums[-1, -1]))
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {count}")
    if not np.isfinite(sums).all():
        raise ValueError(
            "the extractor's features are not all finite; check its precision and the images"
        )
    mu = sums[-1, :-1] / count
    return mu, (sums[:-1, :-1] - count * np.outer(mu, mu)) / (count - 1), count


def frechet(
    mu: np.ndarray, sigma: np.ndarray, other_mu: np.ndarray, other_sigma: np.ndarray
) -> float:
    """Squared Frechet distance of two Gaussians, mu (F,) and sigma (F, F) float64, as torch-fidelity computes it."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    one, other = {"mu": mu, "sigma": sigma}, {"mu": other_mu, "sigma": other_sigma}
    return fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID]


def fingerprint(extractor: nn.Module) -> str:
    """An extractor's class and a hash of its weights, such as "InceptionV3 0f1e2d3c4b5a"."""
    digest = hashlib.sha256()
    for name, tensor in sorted(extractor.state_dict().items()):
        if tensor.is_floating_point():
            digest.update(name.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
    return f"{type(extractor).__name__} {digest.hexdigest()[:12]}"


@dataclass(frozen=True)
class Reference:
    """Statistics of real images. Published files have neither n, features nor extractor; their images are RGB."""

    path: Path
    mu: np.ndarray  # (F,) float64
    sigma: np.ndarray  # (F, F) float64
    channels: int = 3
    extractor: str | None = None  # fingerprint
    n: int | None = None
    features: np.ndarray | None = None  # (min(n, KEPT), F) float16

    @classmethod
    def load(cls, path: str | Path) -> Reference:
        """FileNotFoundError, ValueError: what is missing, damaged or not a statistic, and what to do."""
        path = find_asset(path, "statistics")
        arrays = load_arrays(path, "statistics", REMEDY, OURS)
        missing = [
            key for key in (OURS if "features" in arrays else PUBLISHED) if key not in arrays
        ]
        if missing and "arr_0" in arrays:
            raise ValueError(
                f"{path} holds images (arr_0), as ADM's sample batches do, and no statistics: make these of them, "
                "channels first and divided by 255, with oss_exp.evaluation.statistics.write_statistics"
            )
        if missing:
            found = ", ".join([*arrays][:10]) or "nothing"
            raise ValueError(f"{path} has no {' and no '.join(missing)}, only {found}; {REMEDY}")
        _check(path, arrays)
        mu, sigma = arrays["mu"], arrays["sigma"]
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape or len(mu) > WIDEST:
            raise ValueError(
                f"{path}: mu must be (F,) and sigma (F, F), F at most {WIDEST}, got {mu.shape!s:.80} and "
                f"{sigma.shape!s:.80}; {REMEDY}"
            )
        mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
        if "features" not in arrays:
            return cls(path, mu, sigma)
        features = arrays["features"]
        if features.ndim != 2 or features.shape[1] != len(mu):
            raise ValueError(
                f"{path}: features must be (n, {len(mu)}), got {features.shape}; {REMEDY}"
            )
        return cls(
            path,
            mu,
            sigma,
            int(arrays["channels"]),
            str(arrays["extractor"]),
            int(arrays["n"]),
            features=features,
        )

    def check_extractor(self, extractor: nn.Module) -> None:
        """ValueError where the statistics are known to come from another network."""
        found = fingerprint(extractor)
        if self.extractor not in (None, found):
            raise ValueError(
                f"{self.path} was made with {self.extractor}, but the extractor is {found}: features of different "
                f"networks do not compare; load those weights, or {REMEDY}"
            )

    def check_features(self, features: Tensor, channels: int) -> None:
        """ValueError where generated images cannot be compared: features (B, F) of images with so many channels."""
        if channels != self.channels:
            kind = {1: "grey", 3: "RGB"}
            raise ValueError(
                f"{self.path} is of {kind.get(self.channels, self.channels)} images, the generated ones are "
                f"{kind.get(channels, channels)} ({channels} channels); take statistics of the model's own kind of data"
            )
        if features.ndim != 2 or features.shape[1] != len(self.mu):
            raise ValueError(
                f"{self.path} has {len(self.mu)} features an image, the extractor gives {tuple(features.shape[1:])}; "
                f"take the extractor of the statistics, or {REMEDY}"
            )


def write_statistics(
    path: str | Path, extractor: nn.Module, batches: Iterable[Tensor]
) -> Reference:
    """Statistics of batches of images (B, C, H, W) in [0, 1] into one .npz, which keeps the first KEPT features too."""
    total, kept, channels = torch.zeros((), dtype=torch.float64), [], set()
    for images in batches:
        check_pixels(images, f"images for {path}")
        with torch.no_grad():
            features = extractor(images)
        total = total + gram(features)
        kept.append(features[: max(0, KEPT - sum(map(len, kept)))].half().cpu())
        channels.add(images.shape[1])
    if len(channels) != 1:
        raise ValueError(
            f"statistics for {path} need images, all of as many channels; got {sorted(channels)}"
        )
    mu, sigma, count = moments(total)
    features = torch.cat(kept).numpy()
    if not np.isfinite(features).all():
        raise ValueError(
            f"features for {path} exceed float16 (65504); scale the extractor's output down"
        )
    arrays = {
        "mu": mu,
        "sigma": sigma,
        "n": count,
        "channels": channels.pop(),
        "extractor": fingerprint(extractor),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, features=features)
    write_atomically(path, buffer.getvalue())
    return Reference.load(path)


def _check(path: Path, arrays: dict[str, Any]) -> None:
    """ValueError where an array is of another type than its name says, or not finite."""
    for key, kinds in OURS.items():
        array = arrays.get(key)
        if array is None:
            continue
        if array.dtype.kind not in kinds or (kinds != NUMBERS and array.ndim != 0):
            wanted = {NUMBERS: "real numbers", WHOLE: "a whole number", TEXT: "text"}[kinds]
            shown = f"{array.dtype} of shape {array.shape}"
            raise ValueError(f"{path}: {key} must be {wanted}, got {shown:.80}; {REMEDY}")
        if kinds == NUMBERS and not np.isfinite(array).all():
            raise ValueError(f"{path}: {key} has NaN or infinite values; {REMEDY}")
