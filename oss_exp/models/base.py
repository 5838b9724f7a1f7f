"""The contract of a model family: a bound velocity in canonical time, and pixels.

Legend: B samples, M rows (any multiple of B), *E event dims.
"""

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
    """A trained (or exact) diffusion model behind canonical time.

    A new family is one file, one yaml and one test.

    Attributes:
        name: Name in tables and files.
        path: Translates the network's clock.
        event_shape: *E, the shape of one sample.
        num_classes: Conditions are 0 to num_classes - 1; None if there are no classes.
        guidance: Guidance that applies where none is passed.
        fingerprint: SHA-256 of the weights. With `name` it ties a step schedule to the model
            that it was searched on.
    """

    name: str
    path: GaussianPath
    event_shape: tuple[int, ...]
    num_classes: int | None
    guidance: Guidance
    fingerprint: str

    @property
    def needs_classes(self) -> bool:
        """Tell whether every sample needs a class, as guidance does."""
        return self.num_classes is not None and self.guidance.scale != 1

    @property
    def original(self) -> Model:
        """The model that this one was finetuned from, to compare pictures with; else itself."""
        return self

    @property
    def row_costs(self) -> dict[float, float]:
        """Network rows that a row of x cost at each time so far; empty where calls do not tell.

        A resumed run adds those of the run before.
        """
        return {}

    @abc.abstractmethod
    def velocity(self, condition: Tensor | None, guidance: Guidance | None = None) -> BoundVelocity:
        """Bind the condition and the guidance, and return v(x (M, *E), t (M,)).

        Args:
            condition: Class indices (B,), whatever else a model takes (B, ...), or None.
            guidance: None for the model's own.
        """

    @abc.abstractmethod
    def decode(self, x0: Tensor) -> Tensor:
        """Decode clean samples.

        Args:
            x0: Clean samples (B, *E).

        Returns:
            Pixels in [0, 1]: images (B, C, H, W) or videos (B, C, F, H, W). Models of audio return
            waveforms (B, C, samples).
        """

    def native(self, times: Tensor) -> dict[str, Any]:
        """Return a schedule's times in the clock of the model's own samplers, for its file.

        Infinite times are null.
        """
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
        """Sample x0 (B, *E) with a solver along a step schedule.

        Args:
            solver: The solver.
            steps: The step schedule.
            noise: States (B, *E) at `steps.start_time`.
            condition: See `velocity`.
            group: Index (B,) of each sample's mean among those of the schedule's start.
            watch: Receives the prediction of x0 at every step, if the model's steps predict whole
                samples.
        """
        return sample(solver, self.velocity(condition), noise, steps, group, watch)

    def generate(
        self, solver: Solver, steps: StepSchedule, noise: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """Sample from noise (B, *E) at `steps.start_time`, and return pixels."""
        classes = None if self.num_classes is None else condition
        return self.decode(self.sample(solver, steps, noise, condition, classes))
