"""Statistics of real images, which generated images are compared with.

They are a mean, a covariance and features, stored in one .npz file. Three layouts are
read: EDM's (`mu`, `sigma`), ADM's (the same with `mu_s` and `sigma_s`), and that of
`write_statistics`, which also records the number of images, their channels, the
extractor and single features.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oss_exp.files import find_asset, load_arrays, write_atomically

MAX_FEATURES = 50_000  # rows in a file; FID, precision and recall usually use this many images
WIDEST = 8192  # features of an image; Inception-V3 has 2048
REMEDY = "make it again with oss_exp.evaluation.statistics.write_statistics"

NUMBERS, WHOLE, TEXT = "f", "iu", "U"  # numpy's kinds of dtypes
PUBLISHED = ("mu", "sigma")
OURS = {
    "mu": NUMBERS,
    "sigma": NUMBERS,
    "n": WHOLE,
    "channels": WHOLE,
    "extractor": TEXT,
    "features": NUMBERS,
}


def check_pixels(images: Tensor, what: str) -> None:
    """Raise ValueError unless all pixels are in [0, 1]; NaN is not.

    Args:
        images: Shape (B, C, H, W), B >= 1.
        what: The images' name in the message.
    """
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{what} must be in [0, 1], decoded and clipped, got values from {low:g} to {high:g}"
        )


def gram(features: Tensor) -> Tensor:
    """Return the sums from which mean and covariance follow.

    The result can be summed over batches and ranks.

    Args:
        features: Shape (B, F).

    Returns:
        Shape (F+1, F+1), float64: sums of products, and in the last row sums and the
        count.
    """
    rows = nn.functional.pad(features.double(), (0, 1), value=1.0)
    return rows.T @ rows


def moments(total: Tensor) -> tuple[np.ndarray, np.ndarray, int]:
    """Return mean (F,), unbiased covariance (F, F) and number of rows of a summed `gram`.

    Raises:
        ValueError: If there are fewer than 2 rows, or a feature is not finite.
    """
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
    """Return the squared Frechet distance of two Gaussians, as torch-fidelity computes it.

    Args:
        mu: Mean of the first, shape (F,), float64.
        sigma: Its covariance, shape (F, F), float64.
        other_mu: Mean of the second.
        other_sigma: Its covariance.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    one = {"mu": mu, "sigma": sigma}
    other = {"mu": other_mu, "sigma": other_sigma}
    return fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID]


def fingerprint(extractor: nn.Module) -> str:
    """Return an extractor's class and a hash of its weights: "InceptionV3 0f1e2d3c4b5a"."""
    digest = hashlib.sha256()
    for name, tensor in sorted(extractor.state_dict().items()):
        if tensor.is_floating_point():
            digest.update(name.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
    return f"{type(extractor).__name__} {digest.hexdigest()[:12]}"


@dataclass(frozen=True)
class Reference:
    """The statistics of real images.

    Published files have neither n, features nor extractor; their images are RGB.

    Attributes:
        path: The file.
        mu: Mean of the features, shape (F,), float64.
        sigma: Their covariance, shape (F, F), float64.
        channels: Channels of the images.
        extractor: Fingerprint of the extractor.
        n: Number of images.
        features: The first features, shape (min(n, MAX_FEATURES), F), float16.
    """

    path: Path
    mu: np.ndarray
    sigma: np.ndarray
    channels: int = 3
    extractor: str | None = None
    n: int | None = None
    features: np.ndarray | None = None

    @classmethod
    def load(cls, path: str | Path) -> Reference:
        """Read statistics from a file.

        Args:
            path: A path, or the name of a shipped file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or does not hold statistics.
        """
        path = find_asset(path, "statistics")
        arrays = load_arrays(path, "statistics", REMEDY, OURS)
        _check_names(path, arrays)
        _check_types(path, arrays)

        # Mean and covariance.
        mu, sigma = arrays["mu"], arrays["sigma"]
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape or len(mu) > WIDEST:
            raise ValueError(
                f"{path}: mu must be (F,) and sigma (F, F), F at most {WIDEST}, "
                f"got {mu.shape!s:.80} and {sigma.shape!s:.80}; {REMEDY}"
            )
        mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
        if "features" not in arrays:
            return cls(path, mu, sigma)

        # Single features, in our own files.
        features = arrays["features"]
        if features.ndim != 2 or features.shape[1] != len(mu):
            raise ValueError(
                f"{path}: features must be (n, {len(mu)}), got {features.shape}; {REMEDY}"
            )
        return cls(
            path,
            mu,
            sigma,
            channels=int(arrays["channels"]),
            extractor=str(arrays["extractor"]),
            n=int(arrays["n"]),
            features=features,
        )

    def check_extractor(self, extractor: nn.Module) -> None:
        """Raise ValueError if the statistics are known to come from another network."""
        current = fingerprint(extractor)
        if self.extractor not in (None, current):
            raise ValueError(
                f"{self.path} was made with {self.extractor}, but the extractor is {current}: "
                "features of different networks do not compare; load those weights, "
                f"or {REMEDY}"
            )

    def check_features(self, features: Tensor, channels: int) -> None:
        """Raise ValueError if generated images cannot be compared with the real ones.

        Args:
            features: Features of the generated images, shape (B, F).
            channels: Channels of the generated images.
        """
        if channels != self.channels:
            kind = {1: "grey", 3: "RGB"}
            raise ValueError(
                f"{self.path} is of {kind.get(self.channels, self.channels)} images, "
                f"the generated ones are {kind.get(channels, channels)} ({channels} channels); "
                "take statistics of the model's own kind of data"
            )
        if features.ndim != 2 or features.shape[1] != len(self.mu):
            raise ValueError(
                f"{self.path} has {len(self.mu)} features an image, "
                f"the extractor gives {tuple(features.shape[1:])}; "
                f"take the extractor of the statistics, or {REMEDY}"
            )


def write_statistics(
    path: str | Path,
    extractor: nn.Module,
    batches: Iterable[Tensor],
    call: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__,
) -> Reference:
    """Write the statistics of images to an .npz file, with the first MAX_FEATURES features.

    Args:
        path: The file to write.
        extractor: Network from images (B, C, H, W) to features (B, F).
        batches: Batches of images (B, C, H, W) in [0, 1], all with the same channels.
        call: Returns the extractor's features of a batch, for example from a log.

    Returns:
        The statistics, read back from the file.

    Raises:
        ValueError: If the images are not in [0, 1], differ in channels, are fewer than
            2, or have features that float16 cannot hold.
    """
    total = torch.zeros((), dtype=torch.float64)
    rows: list[Tensor] = []
    channels = set()

    # Sums and features of every batch.
    for images in batches:
        check_pixels(images, f"images for {path}")
        with torch.no_grad():
            features = call(extractor, images)
        total = total + gram(features)
        room = max(0, MAX_FEATURES - sum(map(len, rows)))
        rows.append(features[:room].half().cpu())
        channels.add(images.shape[1])
    if len(channels) != 1:
        raise ValueError(
            f"statistics for {path} need images, all of as many channels; got {sorted(channels)}"
        )

    # Moments.
    mu, sigma, count = moments(total)
    features = torch.cat(rows).numpy()
    if not np.isfinite(features).all():
        raise ValueError(
            f"features for {path} exceed float16 (65504); scale the extractor's output down"
        )

    # File.
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


def _check_names(path: Path, arrays: dict[str, Any]) -> None:
    """Raise ValueError if an array is missing."""
    expected = OURS if "features" in arrays else PUBLISHED
    missing = [key for key in expected if key not in arrays]
    if missing and "arr_0" in arrays:
        raise ValueError(
            f"{path} holds images (arr_0), as ADM's sample batches do, and no statistics: "
            "make these of them, channels first and divided by 255, "
            "with oss_exp.evaluation.statistics.write_statistics"
        )
    if missing:
        names = ", ".join([*arrays][:10]) or "nothing"
        raise ValueError(f"{path} has no {' and no '.join(missing)}, only {names}; {REMEDY}")


def _check_types(path: Path, arrays: dict[str, Any]) -> None:
    """Raise ValueError if an array has another type than its name requires, or is not finite."""
    for key, kinds in OURS.items():
        array = arrays.get(key)
        if array is None:
            continue

        # Dtype; what is not an array of numbers is a single value.
        if array.dtype.kind not in kinds or (kinds != NUMBERS and array.ndim != 0):
            expected = {NUMBERS: "real numbers", WHOLE: "a whole number", TEXT: "text"}[kinds]
            actual = f"{array.dtype} of shape {array.shape}"
            raise ValueError(f"{path}: {key} must be {expected}, got {actual:.80}; {REMEDY}")

        # Values.
        if kinds == NUMBERS and not np.isfinite(array).all():
            raise ValueError(f"{path}: {key} has NaN or infinite values; {REMEDY}")
