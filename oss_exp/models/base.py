"""What every model family gives the rest of the program: a bound velocity in canonical time, and pixels."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor, nn

from oss_exp.models.guidance import Guidance
from oss_exp.noise import GaussianPath
from oss_exp.provenance import native_times
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Solver, Watch, sample
from oss_exp.velocity import BoundVelocity


class Model(nn.Module, abc.ABC):
    """A trained (or exact) diffusion model behind canonical time. A new family is one file, one yaml and one test.

    path:        translates the network's clock. event_shape: *E, one sample's shape.
    num_classes: conditions 0 .. num_classes-1, or None when there are none; guidance: its own.
    fingerprint: SHA-256 of the weights; `name` and it tie a step schedule to the model it was searched on.
    """

    name: str
    path: GaussianPath
    event_shape: tuple[int, ...]
    num_classes: int | None
    guidance: Guidance
    fingerprint: str

    @property
    def needs_classes(self) -> bool:
        """Guidance needs a class for every sample."""
        return self.num_classes is not None and self.guidance.scale != 1

    @property
    def original(self) -> Model:
        """What it was finetuned from, where it was: the model whose pictures its own are compared with."""
        return self

    @abc.abstractmethod
    def velocity(self, condition: Tensor | None, guidance: Guidance | None = None) -> BoundVelocity:
        """condition (B,) class indices, or (B, ...) what else a model takes, or None -> v(x (M, *E), t (M,)).

        It is bound, and guidance (None: its own) with it.
        """

    @abc.abstractmethod
    def decode(self, x0: Tensor) -> Tensor:
        """x0 (B, *E) -> pixels in [0, 1]: (B, C, H, W), or (B, C, F, H, W) for videos; or waveforms (B, C, samples)."""

    def native(self, times: Tensor) -> dict[str, Any]:
        """Return a schedule's times in the clock of the model's own samplers, for its file; infinite ones are null."""
        return native_times(self.path, times)

    def sample(
        self,
        solver: Solver,
        steps: StepSchedule,
        noise: Tensor,
        condition: Tensor | None = None,
        group: Tensor | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """noise (B, *E) at steps.start_time, group (B,) which of the schedule's means is each sample's -> x0.

        watch: told of every step's prediction of x0, by a model whose steps predict whole samples.
        """
        return sample(solver, self.velocity(condition), noise, steps, group, watch)

    def generate(
        self, solver: Solver, steps: StepSchedule, noise: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """noise (B, *E) at steps.start_time -> pixels."""
        classes = None if self.num_classes is None else condition
        return self.decode(self.sample(solver, steps, noise, condition, classes))
