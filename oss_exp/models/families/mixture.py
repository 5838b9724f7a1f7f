"""Define a Gaussian mixture whose probability-flow ODE is exact: a tiny model without a network.

Each component has covariance U diag(extra) U^T + floor I (probabilistic PCA, Tipping &
Bishop 1999). Noise keeps that form, so E[x0 | x_t], E[eps | x_t] and the velocity are
closed form at every t, the ends 0 and 1 included.
Shapes: M rows, C components, R rank, D = prod(event_shape).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from oss_exp.checks import Name, require_range
from oss_exp.files import Provenance, find_asset, load_asset
from oss_exp.models.base import Model
from oss_exp.models.guidance import NO_CLASS, UNGUIDED, Guidance
from oss_exp.noise import FlowPath, GaussianPath
from oss_exp.tensors import rowwise
from oss_exp.velocity import BoundVelocity


class MixtureProvenance(Provenance):
    """The record in a mixture's file: name of the model, and shape of its samples."""

    name: Name
    event_shape: tuple[PositiveInt, ...]


class GaussianMixture(Model):
    """A mixture of Gaussians, with a class for each component.

    Guidance mixes the exact velocities of a class and of all classes.

    Args:
        weights: Weights (C,) of the components.
        means: Means (C, D).
        basis: Orthonormal bases U (C, D, R).
        extra: Variances (C, R) >= 0 inside of U, beyond the floor.
        floor: Variances (C,) > 0 in every direction.
        labels: Classes (C,) of the components.
        event_shape: Shape of a sample.
        name: Name of the model.
        fingerprint: Hash of its file.
        guidance: Guidance of the model.
        micro_batch: Rows that are evaluated at a time.
    """

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        basis: Tensor,
        extra: Tensor,
        floor: Tensor,
        labels: Tensor,
        event_shape: tuple[int, ...],
        name: str,
        fingerprint: str,
        guidance: Guidance,
        micro_batch: int,
    ):
        super().__init__()
        require_range(at_least=1, micro_batch=micro_batch)

        self.path: GaussianPath = FlowPath(shift=1.0, time_scale=1.0)
        self.event_shape = tuple(event_shape)
        self.name = name
        self.fingerprint = fingerprint
        self.guidance = guidance
        self.micro_batch = micro_batch
        self.num_classes = int(labels.max()) + 1

        # Buffers.
        count, dim, rank = basis.shape
        flat_basis = basis.permute(1, 0, 2).reshape(dim, count * rank)
        buffers = {
            "log_weights": (weights / weights.sum()).log(),
            "means": means,
            "flat_basis": flat_basis,
            "projected_means": torch.einsum("cd,cdr->cr", means, basis),
            "mean_norms": means.square().sum(1),
            "extra": extra,
            "floor": floor,
            "labels": labels,
        }
        for key, tensor in buffers.items():
            self.register_buffer(key, tensor)
        self.responsibilities = nn.Softmax(dim=-1)  # a layer, so that its output can be looked at

    @classmethod
    def from_asset(
        cls,
        file: str | Path = "mixture_fashion.safetensors",
        guidance: Guidance = UNGUIDED,
        micro_batch: int = 1024,
    ) -> GaussianMixture:
        """Load a mixture.

        Args:
            file: A path, or the name of a file that is shipped with the package.
            guidance: Guidance of the model.
            micro_batch: Rows that are evaluated at a time.

        Raises:
            ValueError: The file was changed, or holds no mixture.
        """
        path = find_asset(file, "mixture file")
        tensors, record = load_asset(path, "mixture", MixtureProvenance)

        # Shapes.
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        basis = shapes.get("basis", ())
        count, dim, rank = basis if len(basis) == 3 else (0, 0, 0)
        expected = {"means": (count, dim), "basis": (count, dim, rank), "extra": (count, rank)}
        expected |= dict.fromkeys(("weights", "floor", "labels"), (count,))
        if shapes != expected or 0 in (count, dim) or math.prod(record.event_shape) != dim:
            raise ValueError(
                f"{path} holds no mixture of samples of shape {record.event_shape}; "
                "take another file"
            )

        return cls(
            **tensors,
            event_shape=record.event_shape,
            name=record.name,
            fingerprint=record.sha256,
            guidance=guidance,
            micro_batch=micro_batch,
        )

    @classmethod
    def from_covariances(
        cls, weights: Tensor, means: Tensor, covariances: Tensor, event_shape: tuple[int, ...]
    ):
        """Build a mixture from full covariances (C, D, D), each component a class of its own.

        The rank is D - 1, over the smallest eigenvalue. Weights (C,), means (C, D).
        """
        values, vectors = torch.linalg.eigh(covariances)  # ascending
        floor = values[:, 0]

        return cls(
            weights,
            means,
            vectors[:, :, 1:],
            values[:, 1:] - floor[:, None],
            floor,
            torch.arange(len(weights)),
            event_shape=event_shape,
            name="covariances",
            fingerprint="",
            guidance=UNGUIDED,
            micro_batch=1024,
        )

    def velocity(self, condition: Tensor | None, guidance: Guidance | None = None) -> BoundVelocity:
        """Return the exact velocity of the samples' classes (B,), or of all classes."""
        if condition is not None and not bool(torch.isin(condition, self.labels).all()):
            labels = self.labels.unique().tolist()
            raise ValueError(f"classes must be among {labels}, got {condition.unique().tolist()}")
        return (guidance or self.guidance).bind(self._velocity, condition, self.micro_batch)

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return samples (count, *E) of the mixture, and their classes (count,)."""
        require_range(at_least=1, at_most=10_000_000, count=count)
        require_range(at_least=0, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        weights = self.log_weights.exp()
        component = torch.multinomial(weights, count, replacement=True, generator=generator)

        # Coordinates in the component's subspace, and noise around it.
        rank, dim = self.extra.shape[1], self.means.shape[1]
        spread = self.extra[component].sqrt()
        floor = self.floor[component, None].sqrt()
        inside = torch.randn(count, rank, generator=generator) * spread
        x = self.means[component] + torch.randn(count, dim, generator=generator) * floor

        # Their sum.
        basis = self.flat_basis.unflatten(1, (-1, rank))  # (D, C, R)
        for c in component.unique():
            x[component == c] += inside[component == c] @ basis[:, c].T
        return x.unflatten(1, self.event_shape), self.labels[component]

    def decode(self, x0: Tensor) -> Tensor:
        """Return pixels in [0, 1] of samples in [-1, 1]."""
        return ((x0 + 1) / 2).clamp(0, 1)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """Return E[x0 | x_t = x] = x - t v, for x (M, *E) and t (M,)."""
        classes = torch.full((len(x),), NO_CLASS, device=x.device)
        return x - rowwise(t, x) * self._velocity(x, t, classes)

    def _velocity(self, x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        """Return v = E[eps | x] - E[x0 | x], without a difference that cancels as t -> 0.

        Args:
            x: States (M, *E), x_t = alpha x0 + sigma eps.
            t: Times (M,).
            classes: Classes (M,) whose components count, NO_CLASS for all.
        """
        flat = x.flatten(1)
        count, rank = self.extra.shape
        alpha, sigma = (1 - t).to(x)[:, None], t.to(x)[:, None]  # (M, 1)

        # Variances outside of each component's subspace and inside it.
        noise = alpha**2 * self.floor + sigma**2  # (M, C)
        spread = noise[..., None] + alpha[..., None] ** 2 * self.extra  # (M, C, R)

        # Deviations from each component's mean, in its subspace and in full length.
        projected = (flat @ self.flat_basis).unflatten(1, (count, rank))
        inside = projected - alpha[..., None] * self.projected_means
        square = flat.square().sum(1, keepdim=True)
        length = square - 2 * alpha * (flat @ self.means.T) + alpha**2 * self.mean_norms

        # Responsibilities.
        energy = length / noise + (inside.square() * (1 / spread - 1 / noise[..., None])).sum(-1)
        log_volume = flat.shape[1] * noise.log() + (spread / noise[..., None]).log().sum(-1)
        logits = self.log_weights - 0.5 * (energy + log_volume)
        classes = classes[:, None]
        logits = logits.masked_fill((self.labels != classes) & (classes != NO_CLASS), -math.inf)
        share = self.responsibilities(logits)

        # sigma C^-1 y - mu - alpha Sigma C^-1 y, averaged over components with y = x - alpha mu.
        outside = (sigma - alpha * self.floor) / noise  # (M, C)
        variance = self.floor[:, None] + self.extra
        gain = (sigma[..., None] - alpha[..., None] * variance) / spread - outside[..., None]
        v = (share * outside).sum(1, keepdim=True) * flat
        v = v - (share * (1 + alpha * outside)) @ self.means
        v = v + (share[..., None] * gain * inside).flatten(1) @ self.flat_basis.T
        return v.unflatten(1, x.shape[1:])


def fit(
    images: Tensor,
    labels: Tensor,
    clusters: int,
    rank: int,
    floor: float,
    seed: int,
    iterations: int,
    progress: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """Fit a mixture by hard-assignment EM of probabilistic PCAs with a k-means++ start.

    Args:
        images: Images (n, D) in [-1, 1].
        labels: Their classes (n,).
        clusters: Components of a class.
        rank: Rank of a component.
        floor: Variance of every direction outside a component's subspace. The
            maximum-likelihood value (the mean of the other eigenvalues, 0.01 to 0.09 on
            Fashion-MNIST) shows as grain in every sample, so it is a choice.
        seed: Seed of the start.
        iterations: Largest number of iterations.
        progress: Called with the number of finished classes and of all classes.

    Returns:
        Tensors of a GaussianMixture, float32.

    Raises:
        ValueError: A class or a cluster has too few images.
    """
    if rank < 1 or clusters < 1 or not floor > 0:
        raise ValueError(
            f"need rank >= 1, clusters >= 1 and floor > 0, got {rank}, {clusters}, {floor}"
        )
    classes = labels.unique().tolist()
    names = ("weights", "means", "basis", "extra", "floor", "labels")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for number, label in enumerate(classes, start=1):
        # Clusters.
        members = images[labels == label].double()
        if len(members) < clusters * (rank + 2):
            raise ValueError(
                f"class {label} has {len(members)} images, too few for {clusters} clusters of rank "
                f"{rank}; use clusters * (rank + 2) <= {len(members)}"
            )
        assignment = _kmeans(members, clusters, seed)
        if _has_small_cluster(assignment, clusters, rank):
            raise ValueError(
                f"class {label}: a cluster has fewer than {rank + 2} images; "
                "use fewer clusters or a lower rank"
            )
        assignment = _reassign(members, assignment, clusters, rank, floor, iterations)

        # Components.
        for c in range(clusters):
            cluster = members[assignment == c]
            component = _probabilistic_pca(cluster, rank, floor)
            values = (len(cluster) / len(images), *component, label)
            for name, value in zip(names, values, strict=True):
                columns[name].append(torch.as_tensor(value))

        progress(number, len(classes))

    tensors = {name: torch.stack(values) for name, values in columns.items()}
    return {name: t if name == "labels" else t.float() for name, t in tensors.items()}


def _reassign(
    x: Tensor, assignment: Tensor, clusters: int, rank: int, floor: float, iterations: int
) -> Tensor:
    """Return the clusters (n,) of points x (n, D) after some iterations of EM."""
    for _ in range(iterations):
        share = torch.bincount(assignment, minlength=clusters).double() / len(x)
        densities = []
        for c in range(clusters):
            component = _probabilistic_pca(x[assignment == c], rank, floor)
            densities.append(_log_density(x, *component))
        scores = torch.stack(densities, dim=1) + share.log()
        update = scores.argmax(1)
        if bool((update == assignment).all()) or _has_small_cluster(update, clusters, rank):
            break
        assignment = update
    return assignment


def _has_small_cluster(assignment: Tensor, clusters: int, rank: int) -> bool:
    """Return whether a cluster has too few points for its rank."""
    return bool((assignment.bincount(minlength=clusters) < rank + 2).any())


def _kmeans(x: Tensor, clusters: int, seed: int) -> Tensor:
    """Return the clusters (n,) of points x (n, D)."""
    from scipy.cluster.vq import kmeans2

    if clusters == 1:
        return torch.zeros(len(x), dtype=torch.long)
    _, assignment = kmeans2(x.numpy(), clusters, minit="++", seed=seed, iter=50)
    return torch.from_numpy(assignment).long()


def _probabilistic_pca(x: Tensor, rank: int, floor: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean (D,), basis (D, R), extra (R,) and floor () of points x (n, D)."""
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    return mean, vectors[:, -rank:], (values[-rank:] - floor).clamp(min=0), x.new_tensor(floor)


def _log_density(x: Tensor, mean: Tensor, basis: Tensor, extra: Tensor, floor: Tensor) -> Tensor:
    """Return the log density (n,) of points x (n, D), without its constant."""
    y = x - mean
    inside = (y @ basis).square() * (1 / (floor + extra) - 1 / floor)
    energy = y.square().sum(1) / floor + inside.sum(1)
    return -0.5 * (energy + x.shape[1] * floor.log() + (1 + extra / floor).log().sum())
