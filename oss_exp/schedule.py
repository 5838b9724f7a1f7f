"""The step schedule: the few canonical times at which a student calls the network, how it starts and how it steps.

This is what every strategy returns, what a sampler runs and what is published as JSON with its provenance.
Legend: B samples, K network calls, G conditions, *E event dims. Times are canonical (1 noise, 0 data), float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from oss_exp.files import load_tensors, read_record, save_asset, write_atomically
from oss_exp.tensors import rowwise

Start = Literal["free", "pinned", "analytic"]

FORMAT, VERSION = "oss_exp/step_schedule", 2


@dataclass(frozen=True, eq=False)
class StepSchedule:
    """K + 1 strictly decreasing times ending at 0; the network is called at the first K of them.

    times:      (K+1,), or (B, K+1) when every sample has its own (then `samples` names the B sample indices).
    start:      how the first state comes from the initial noise z, which lives at `start_time` (the teacher's first
                node): `pinned` starts there; `free` uses z unchanged as the state at a later first time (OSS paper,
                Alg. 1); `analytic` first jumps to times[0] without a network call, along the line from z to `mean`.
    mean:       (G, *E) mean clean sample of each of G conditions at pure noise; only for `analytic` and for weights.
    orders:     (K,) or (B, K) order of each step, where a search chose them; None: the solver's own.
    weights:    (K, P) fitted coefficients of each step, over x, noise, mean and the predictions of x0, newest first
                (see `solvers.sampling.FittedSteps`); None: a solver's.
    provenance: what made it: model and weights hash, teacher, solver, strategy, search samples, versions.
    Raises ValueError when the times are not finite, in [0, 1], strictly decreasing and closed by 0.
    """

    times: Tensor
    start: Start = "pinned"
    start_time: float = 1.0
    mean: Tensor | None = None
    samples: tuple[int, ...] | None = None
    orders: Tensor | None = None
    weights: Tensor | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        times = torch.as_tensor(self.times, dtype=torch.float64).clone()  # nobody else's to change
        object.__setattr__(self, "times", times)
        shown = f"got {times.tolist()}" if times.numel() < 64 else f"got a tensor of shape {tuple(times.shape)}"
        if times.ndim not in (1, 2) or times.shape[-1] < 2:
            raise ValueError(f"a step schedule needs at least two times, {shown}")
        if not bool(times.isfinite().all()):
            raise ValueError(f"step times must be finite numbers, {shown}")
        if not bool((times.diff(dim=-1) < 0).all()):
            raise ValueError(f"step times must strictly decrease (noise to data), {shown}")
        if bool((times[..., -1] != 0).any()):
            raise ValueError(f"the last step time must be 0 (clean data), {shown}")
        if not 0 < self.start_time <= 1 or bool((times[..., 0] > self.start_time).any()):
            raise ValueError(f"step times must not exceed start_time={self.start_time} (at most 1), {shown}")
        if self.start not in get_args(Start):
            raise ValueError(f"start must be one of {', '.join(get_args(Start))}, got {self.start!r}")
        if (self.mean is None) == (self.start == "analytic" or self.weights is not None):
            kind = f"start={self.start!r} with{'out' if self.weights is None else ''} weights"
            raise ValueError(f"{kind} {'needs a' if self.mean is None else 'takes no'} mean")
        if (self.samples is None) != (times.ndim == 1) or (times.ndim == 2 and len(self.samples) != len(times)):
            raise ValueError("times of shape (B, K+1) need the B indices of their samples, times of shape (K+1,) none")

        steps = times.shape[-1] - 1
        if self.orders is not None:
            orders = torch.as_tensor(self.orders).clone()
            object.__setattr__(self, "orders", orders)
            if orders.is_floating_point() or orders.shape != times[..., 1:].shape or bool((orders < 1).any()):
                raise ValueError(f"the {steps} steps need whole orders of at least 1, got {orders.tolist()}")
            if bool((orders > torch.arange(1, steps + 1)).any()):
                raise ValueError(f"a step's order cannot exceed the calls made so far, got {orders.tolist()}")
        if self.weights is not None:
            weights = torch.as_tensor(self.weights, dtype=torch.float64).clone()
            object.__setattr__(self, "weights", weights)
            if weights.ndim != 2 or len(weights) != steps or weights.shape[1] < 4 or not bool(weights.isfinite().all()):
                raise ValueError(
                    f"the {steps} steps need a row of at least 4 finite weights each, got {weights.tolist()}"
                )
            if times.ndim == 2 or self.orders is not None:
                raise ValueError("fitted weights are for all samples and take no orders")

    @property
    def num_steps(self) -> int:
        """K, the number of jumps that call the network."""
        return self.times.shape[-1] - 1

    def about(self, section: str) -> Mapping[str, Any]:
        """A section of the provenance, such as "model" or "strategy"; empty where there is none."""
        found = self.provenance.get(section)
        return found if isinstance(found, Mapping) else {}

    def initial_state(self, noise: Tensor, group: Tensor | None = None) -> Tensor:
        """noise (B, *E) at start_time, group (B,) condition of each sample (default all 0) -> state at times[0]."""
        if self.start != "analytic":
            return noise
        return analytic_jump(noise, self.mean_of(noise, group), self.start_time, self.times[..., 0].to(noise.device))

    def mean_of(self, noise: Tensor, group: Tensor | None = None) -> Tensor:
        """The mean of each sample's condition, (B, *E) like the noise."""
        wanted, found = tuple(noise.shape[1:]), tuple(self.mean.shape[1:])
        if found != wanted:
            raise ValueError(f"the schedule's mean has shape {found}, the noise {wanted}; plan it for this model")
        conditions = 1 if group is None else int(group.max()) + 1
        if conditions > len(self.mean) or (group is None and len(self.mean) > 1):
            raise ValueError(
                f"the schedule has means for {len(self.mean)} condition(s), the run "
                f"{'has no conditions' if group is None else f'asks for condition {conditions - 1}'}; "
                "plan it with the same classes (data.classes)"
            )
        return self.mean.to(noise)[torch.zeros(len(noise), dtype=torch.long) if group is None else group]

    def rows(self, samples: list[int]) -> StepSchedule:
        """The per-sample schedule cut to these sample indices, in their order."""
        position = {sample: row for row, sample in enumerate(self.samples or ())}
        if missing := [sample for sample in samples if sample not in position]:
            raise ValueError(f"the schedule has no times of its own for samples {missing[:5]}")
        kept = [position[s] for s in samples]
        orders = None if self.orders is None else self.orders[kept]
        return replace(self, times=self.times[kept], samples=tuple(samples), orders=orders)

    def save(self, path: str | Path) -> Path:
        """Write JSON (and, for an analytic start, `<name>.mean.safetensors` first), each file whole or not at all."""
        path = Path(path)
        record: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "num_steps": self.num_steps,
            "start": self.start,
            "start_time": self.start_time,
            "times": self.times.tolist(),
            "orders": None if self.orders is None else self.orders.tolist(),
            "weights": None if self.weights is None else self.weights.tolist(),
            "samples": None if self.samples is None else list(self.samples),
            "mean": None,
            "provenance": dict(self.provenance),
        }
        if self.mean is not None:
            mean_path = path.with_suffix(".mean.safetensors")
            digest = save_asset(mean_path, {"mean": self.mean.cpu()}, {"made_by": path.name})
            record["mean"] = {"file": mean_path.name, "sha256": digest}
        return write_atomically(path, json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> StepSchedule:
        """Read what `save` wrote. FileNotFoundError or ValueError names the file, the fault and the remedy."""
        path = Path(path)
        record = read_record(path, "step schedule", FORMAT, VERSION)
        try:
            mean = None
            if record["mean"] is not None:
                mean_path = path.with_name(record["mean"]["file"])
                mean = load_tensors(mean_path, record["mean"]["sha256"], "mean of a step schedule")["mean"]
            provenance = record["provenance"]
            if not isinstance(provenance, dict) or not isinstance(record["start_time"], (int, float)):
                raise ValueError("provenance must be an object and start_time a number")
            return cls(
                times=torch.tensor(record["times"], dtype=torch.float64),
                start=record["start"],
                start_time=record["start_time"],
                mean=mean,
                samples=None if record["samples"] is None else tuple(record["samples"]),
                orders=None if record["orders"] is None else torch.tensor(record["orders"]),
                weights=None if record["weights"] is None else torch.tensor(record["weights"], dtype=torch.float64),
                provenance=provenance,
            )
        except KeyError as error:
            raise ValueError(f"step schedule {path} lacks the field {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"step schedule {path}: {error}") from None


def analytic_jump(noise: Tensor, mean: Tensor, start_time: float, t: Tensor) -> Tensor:
    """The Euler jump from the noise at start_time to t when the clean prediction is `mean`, (B, *E) each; t () or (B,).

    x_t = (t / t_N) z + (1 - t / t_N) mean: what a network call at pure noise, which can only answer the mean, gives.
    """
    ratio = rowwise(t / start_time, noise)
    return ratio * noise + (1 - ratio) * mean
