"""A Gaussian mixture whose probability-flow ODE is exact: a real, tiny diffusion model without a network.

Each component has covariance U diag(extra) U^T + floor I (Tipping & Bishop's probabilistic PCA, 1999). Noising keeps
that form, so E[x0 | x_t], E[eps | x_t] and the velocity are closed form at every t, the ends 0 and 1 included.
Legend: M rows, C components, R rank, D = prod(event_shape).
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
    """Of a mixture's file: the name of the model, and the shape of its samples."""

    name: Name
    event_shape: tuple[PositiveInt, ...]


class GaussianMixture(Model):
    """weights (C,), means (C, D), basis (C, D, R) orthonormal, extra (C, R) >= 0, floor (C,) > 0, labels (C,) class.

    Guidance mixes the exact velocities of a class and of all classes.
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
        self.name, self.fingerprint, self.guidance, self.micro_batch = (
            name,
            fingerprint,
            guidance,
            micro_batch,
        )
        self.num_classes = int(labels.max()) + 1
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
        """`file`: a path, or the name of a file shipped with the package. ValueError if its bytes were changed."""
        path = find_asset(file, "mixture file")
        tensors, record = load_asset(path, "mixture", MixtureProvenance)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        count, dim, rank = (
            shapes.get("basis", ()) if len(shapes.get("basis", ())) == 3 else (0, 0, 0)
        )
        wanted = {"means": (count, dim), "basis": (count, dim, rank), "extra": (count, rank)}
        wanted |= dict.fromkeys(("weights", "floor", "labels"), (count,))
        if shapes != wanted or 0 in (count, dim) or math.prod(record.event_shape) != dim:
            raise ValueError(
                f"{path} holds no mixture of samples of shape {record.event_shape}; take another file"
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
        """Full covariances (C, D, D), one class a component: rank D - 1 over the smallest eigenvalue."""
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
        if condition is not None and not bool(torch.isin(condition, self.labels).all()):
            known = self.labels.unique().tolist()
            raise ValueError(f"classes must be among {known}, got {condition.unique().tolist()}")
        return (guidance or self.guidance).bind(self._velocity, condition, self.micro_batch)

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Samples (count, *E) of the mixture itself and their classes (count,)."""
        require_range(at_least=1, at_most=10_000_000, count=count)
        require_range(at_least=0, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        component = torch.multinomial(
            self.log_weights.exp(), count, replacement=True, generator=generator
        )
        (_, rank), dim = self.extra.shape, self.means.shape[1]
        inside = torch.randn(count, rank, generator=generator) * self.extra[component].sqrt()
        basis = self.flat_basis.unflatten(1, (-1, rank))  # (D, C, R)
        x = (
            self.means[component]
            + torch.randn(count, dim, generator=generator) * self.floor[component, None].sqrt()
        )
        for c in component.unique():
            x[component == c] += inside[component == c] @ basis[:, c].T
        return x.unflatten(1, self.event_shape), self.labels[component]

    def decode(self, x0: Tensor) -> Tensor:
        return ((x0 + 1) / 2).clamp(0, 1)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t = x], x (M, *E), t (M,): x - t v."""
        return x - rowwise(t, x) * self._velocity(
            x, t, torch.full((len(x),), NO_CLASS, device=x.device)
        )

    def _velocity(self, x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        """E[eps | x] - E[x0 | x] for x_t = alpha x0 + sigma eps, without a difference that cancels as t -> 0.

        classes (M,): whose components, NO_CLASS for all.
        """
        flat, (count, rank) = x.flatten(1), self.extra.shape
        alpha, sigma = (1 - t).to(x)[:, None], t.to(x)[:, None]  # (M, 1)
        noise = (
            alpha**2 * self.floor + sigma**2
        )  # (M, C): variance outside the component's subspace
        spread = noise[..., None] + alpha[..., None] ** 2 * self.extra  # (M, C, R): inside it
        # Deviations from each component's mean, in its subspace and in full length.
        inside = (flat @ self.flat_basis).unflatten(1, (count, rank)) - alpha[
            ..., None
        ] * self.projected_means
        length = (
            flat.square().sum(1, keepdim=True)
            - 2 * alpha * (flat @ self.means.T)
            + alpha**2 * self.mean_norms
        )
        # Responsibilities.
        energy = length / noise + (inside.square() * (1 / spread - 1 / noise[..., None])).sum(-1)
        log_volume = flat.shape[1] * noise.log() + (spread / noise[..., None]).log().sum(-1)
        logits = self.log_weights - 0.5 * (energy + log_volume)
        classes = classes[:, None]
        logits = logits.masked_fill((self.labels != classes) & (classes != NO_CLASS), -math.inf)
        share = self.responsibilities(logits)
        # sigma C^-1 y - mu - alpha Sigma C^-1 y, averaged over components with y = x - alpha mu.
        outside = (sigma - alpha * self.floor) / noise  # (M, C)
        gain = (
            sigma[..., None] - alpha[..., None] * (self.floor[:, None] + self.extra)
        ) / spread - outside[..., None]
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
    """images (n, D) in [-1, 1], labels (n,) -> tensors of a GaussianMixture, float32, `clusters` components a class.

    Hard-assignment EM of a mixture of probabilistic PCAs, k-means++ start. `floor` is the variance left to every
    direction outside a component's subspace; the maximum-likelihood value (the mean of the eigenvalues left out,
    0.01-0.09 on Fashion-MNIST) shows as grain in every sample, so it is a choice. progress(done, total): classes.
    """
    if rank < 1 or clusters < 1 or not floor > 0:
        raise ValueError(
            f"need rank >= 1, clusters >= 1 and floor > 0, got {rank}, {clusters}, {floor}"
        )
    classes = labels.unique().tolist()
    parts: dict[str, list[Any]] = {
        key: [] for key in ("weights", "means", "basis", "extra", "floor", "labels")
    }
    for done, label in enumerate(classes, start=1):
        members = images[labels == label].double()
        if len(members) < clusters * (rank + 2):
            raise ValueError(
                f"class {label} has {len(members)} images, too few for {clusters} clusters of rank {rank}; "
                f"use clusters * (rank + 2) <= {len(members)}"
            )
        assignment = _kmeans(members, clusters, seed)
        if bool((assignment.bincount(minlength=clusters) < rank + 2).any()):
            raise ValueError(
                f"class {label}: a cluster has fewer than {rank + 2} images; use fewer clusters or a lower rank"
            )
        for _ in range(iterations):
            fits = [
                _probabilistic_pca(members[assignment == c], rank, floor) for c in range(clusters)
            ]
            share = torch.bincount(assignment, minlength=clusters).double() / len(members)
            scores = torch.stack([_log_density(members, *f) for f in fits], dim=1) + share.log()
            changed = scores.argmax(1)
            if bool((changed == assignment).all()) or bool(
                (changed.bincount(minlength=clusters) < rank + 2).any()
            ):
                break
            assignment = changed
        for c in range(clusters):
            cluster = members[assignment == c]
            values = (len(cluster) / len(images), *_probabilistic_pca(cluster, rank, floor), label)
            for key, value in zip(parts, values, strict=True):
                parts[key].append(torch.as_tensor(value))
        progress(done, len(classes))
    tensors = {key: torch.stack(values) for key, values in parts.items()}
    return {key: tensor if key == "labels" else tensor.float() for key, tensor in tensors.items()}


def _kmeans(x: Tensor, clusters: int, seed: int) -> Tensor:
    from scipy.cluster.vq import kmeans2

    if clusters == 1:
        return torch.zeros(len(x), dtype=torch.long)
    _, assignment = kmeans2(x.numpy(), clusters, minit="++", seed=seed, iter=50)
    return torch.from_numpy(assignment).long()


def _probabilistic_pca(x: Tensor, rank: int, floor: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    return mean, vectors[:, -rank:], (values[-rank:] - floor).clamp(min=0), x.new_tensor(floor)


def _log_density(x: Tensor, mean: Tensor, basis: Tensor, extra: Tensor, floor: Tensor) -> Tensor:
    y = x - mean
    energy = y.square().sum(1) / floor + (
        (y @ basis).square() * (1 / (floor + extra) - 1 / floor)
    ).sum(1)
    return -0.5 * (energy + x.shape[1] * floor.log() + (1 + extra / floor).log().sum())
