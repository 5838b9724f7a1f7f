"""The convention of a pipeline's network, read from the configuration of its scheduler.

Legend: M rows, *E event dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oss_exp.models.parameterization import (
    DataPrediction,
    EDMPrediction,
    FlowVelocity,
    NoisePrediction,
    Parameterization,
    VPVelocity,
)
from oss_exp.noise import CosinePath, DDPMPath, FlowPath


@dataclass(frozen=True)
class NetworkConvention:
    """The parameterization of a pipeline's network, in the signs and the clock of its loop.

    Args:
        parameterization: What the network takes and predicts, up to sign and direction of time.
        sign: Sign of the network's output, relative to what the parameterization expects.
        inverted: The clock increases while noise decreases.
    """

    parameterization: Parameterization
    sign: float = 1.0
    inverted: bool = False

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NetworkConvention:
        """Read the convention from a scheduler of diffusers.

        Raises:
            ValueError: For a scheduler that is not known, and for one whose loop is no ODE.
        """
        config = scheduler.config
        kind = type(scheduler).__name__
        prediction = config.get("prediction_type", "epsilon")

        # Schedulers without an ODE of their own.
        if kind == "OSSScheduler":
            raise ValueError(
                "the pipeline's scheduler is an OSSScheduler, a schedule's; "
                "give it the one it came with"
            )
        if "LCM" in kind or "original_inference_steps" in config:
            raise ValueError(
                f"{kind} is of consistency models, which jump to the data and add noise; "
                "that is no ODE"
            )

        # The four kinds.
        is_flow = kind.startswith("FlowMatch") or prediction == "flow_prediction"
        if is_flow or config.get("use_flow_sigmas"):
            return cls._flow(config)
        if kind.startswith("CosineDPM"):
            return cls._cosine(config, kind, prediction)
        if kind.startswith("EDM") or config.get("timestep_type") == "continuous":
            return cls._edm(config, kind, prediction)
        if hasattr(scheduler, "alphas_cumprod"):
            return cls._chain(scheduler.alphas_cumprod.double(), kind, prediction)
        raise ValueError(
            f"{kind} is not known: it is no flow matching and has no betas. Known are schedulers "
            "of flow matching, of a chain of betas (epsilon, v_prediction, sample) and of EDM"
        )

    @classmethod
    def _flow(cls, config: Any) -> NetworkConvention:
        inverted = bool(config.get("invert_sigmas", False))
        path = FlowPath(time_scale=float(config["num_train_timesteps"]))
        return cls(FlowVelocity(path), -1.0 if inverted else 1.0, inverted)

    @classmethod
    def _cosine(cls, config: Any, kind: str, prediction: str) -> NetworkConvention:
        if prediction != "v_prediction" or config["sigma_data"] != 1:
            raise ValueError(f"{kind} is known with prediction_type=v_prediction and sigma_data=1")
        time_max = config["sigma_max"] / (1 + config["sigma_max"])
        return cls(VPVelocity(CosinePath(), time_max))

    @classmethod
    def _edm(cls, config: Any, kind: str, prediction: str) -> NetworkConvention:
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"{kind} has prediction_type={prediction}; known are epsilon and v_prediction"
            )
        parameterization = EDMPrediction(
            sigma_data=float(config.get("sigma_data", 1.0)),
            sigma_min=float(config.get("sigma_min") or 0.002),
            sigma_max=float(config.get("sigma_max") or 80.0),
        )
        return cls(parameterization, -1.0 if prediction == "v_prediction" else 1.0)

    @classmethod
    def _chain(cls, alphas: Tensor, kind: str, prediction: str) -> NetworkConvention:
        """Read a chain of betas, from its cumulative products of alpha, (steps,) float64."""
        path = DDPMPath(1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]]))
        last_index = torch.tensor(len(path.betas) - 1.0, dtype=torch.float64)
        time_max = float(path.canonical(last_index))

        if prediction == "epsilon" and time_max == 1:
            raise ValueError(
                f"{kind} has a chain that ends at pure noise, where prediction_type=epsilon "
                "determines nothing; such a network predicts v"
            )

        if prediction == "epsilon":
            return cls(NoisePrediction(path, time_max))
        if prediction == "v_prediction":
            return cls(VPVelocity(path, time_max))
        if prediction == "sample":
            return cls(DataPrediction(path, 1e-4))
        raise ValueError(
            f"{kind} has prediction_type={prediction}; known are epsilon, v_prediction, sample"
        )

    def network_input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the network's input (M, *E), and the time (M,) in the loop's clock.

        Args:
            x: States x_t (M, *E).
            t: Canonical times (M,).
        """
        state, clock = self.parameterization.inputs(x, t)
        return state, self._scale() - clock if self.inverted else clock

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return v (M, *E), from the network's output (M, *E) at x_t."""
        return self.parameterization.velocity(self.sign * output, x, t)

    def canonical(self, clock: Tensor) -> Tensor:
        """Return the canonical time of a time in the loop's clock, float64."""
        clock = self._scale() - clock.double() if self.inverted else clock.double()
        if isinstance(self.parameterization, EDMPrediction):
            sigma = (4 * clock).exp()
            return sigma / (1 + sigma)
        return self.parameterization.path.canonical(clock)

    def sigma(self, t: Tensor) -> Tensor:
        """Return the noise level of a canonical time, as the scheduler counts it."""
        if isinstance(self.parameterization, FlowVelocity):
            return 1 - t if self.inverted else t
        return t / (1 - t)

    def formula(self) -> str:
        """Return numbers that identify the convention: its input and velocity at several times.

        Two conventions are the same if these are.
        """
        t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
        one = torch.ones_like(t)
        zero = 0 * one
        numbers = [
            *self.network_input(one, t),
            self.velocity(one, zero, t),
            self.velocity(zero, one, t),
        ]
        return " ".join(f"{number:.5g}" for number in torch.cat(numbers).tolist())

    def _scale(self) -> float:
        path = self.parameterization.path
        assert isinstance(path, FlowPath)
        return path.time_scale
