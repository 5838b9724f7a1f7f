"""Run step schedules in the pipelines of diffusers.

A list of sigmas cannot hold a schedule's orders, fitted steps or analytic start; this
scheduler takes every step as numbers: a weighted sum of the current state, the first
state, a mean and all clean samples predicted so far. `oss-exp task=export
exporter=oss_scheduler` writes such a schedule. The file needs torch, diffusers and
safetensors, and nothing else of oss_exp, so that it can lie beside any script.

Times t are those of flow matching, x_t = (1 - t) x0 + t eps.
Shapes: B samples, M rows (a multiple of B), K steps, G conditions, *E the dimensions of
a latent.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

if TYPE_CHECKING:
    from oss_exp.schedule import StepSchedule

FORMAT = "oss_exp/scheduler"
VERSION = 1
LIMIT = 1 << 24  # bytes of a schedule's file
MEAN_LIMIT = 1 << 29  # bytes of its mean
LAST_RATIO = 4096.0  # sigma / alpha of t = 1, as in diffusers
PREDICTIONS = ("flow_prediction", "epsilon", "v_prediction", "sample")
DTYPES = ("float32", "bfloat16", "float16")  # any other dtype is one of quantised weights

# Fields of a scheduler's config that say how its network was trained.
BETAS = ("beta_schedule", "beta_start", "beta_end", "trained_betas")
CHAIN = ("prediction_type", "num_train_timesteps", "rescale_betas_zero_snr", "snr_shift_scale")
CLOCK = ("use_flow_sigmas", "invert_sigmas", "timestep_type", "sigma_data")
SHIFT = ("shift", "use_dynamic_shifting", "time_shift_type")
SHIFT_BY_SIZE = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
TRAINING = (*CHAIN, *BETAS, *CLOCK, *SHIFT, *SHIFT_BY_SIZE)

# Fields of a schedule's file that are arguments of OSSScheduler.
REQUIRED = ("times", "weights", "start", "start_time")
SCHEDULE = (*REQUIRED, "range", "strength", "num_inference_steps", "begin_index")


class OSSScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler of diffusers that runs one step schedule.

    Use it as `pipe.scheduler = OSSScheduler.from_schedule("x.json",
    pipe.scheduler.config)` and `pipe(..., num_inference_steps=K)`. Where several means
    are stored, set `condition` (B,), the index of each sample's mean, before the
    pipeline is called. Each step computes the state from the noise and the predictions,
    so changes that a callback makes to the latents are lost.

    Args:
        times: K + 1 decreasing times t, the last 0.
        weights: K rows over (x, first state, mean, newest x0, older x0, ...). The sum
            is the state at the next time.
        start: "pinned" or "free": the noise is the first state. "analytic": the first
            state is a jump away from it, see `begin`.
        start_time: The noise is start_time * eps.
        prediction_type, num_train_timesteps, beta_schedule, beta_start, beta_end,
            trained_betas, rescale_betas_zero_snr, snr_shift_scale, use_flow_sigmas,
            invert_sigmas, sigma_data: How the network was trained, with the names and
            defaults of diffusers.
        timestep_type: The same; "arctan" is the clock of
            CosineDPMSolverMultistepScheduler.
        shift, use_dynamic_shifting, time_shift_type, base_shift, max_shift,
            base_image_seq_len, max_image_seq_len: Constants that pipelines read to
            compute their shift.
        strength: Strength that the pipeline is called with, for a schedule that begins
            at an image.
        num_inference_steps: Number of steps that it is called with then.
        begin_index: Number of `timesteps` that it cuts off then, before the schedule's
            first.
        extra_call: Whether to spend one more network call, whose answer is not used, on
            turning the noise into the first state. For pipelines that take no `latents`
            and do not read init_noise_sigma, such as DiTPipeline.
        range: Certificate of task=certify: where the schedule was measured to hold.
            Calls outside it are warned of, once each. The scheduler sees the network's
            dtype and the latents' shape; tell `check_range` the rest.
        mean: Mean clean latents (G, *E), in the pipeline's layout (packed for
            FluxPipeline).

    Raises:
        ValueError: The network's training is unknown, or its clock does not reach the
            first time.
    """

    config_name = "scheduler_config.json"
    ignore_for_config = ["mean"]  # noqa: RUF012  (as diffusers has it)
    _compatibles = []  # noqa: RUF012
    order = 1

    @register_to_config
    def __init__(
        self,
        times: Sequence[float] = (1.0, 0.0),
        weights: Sequence[Sequence[float]] = ((0.0, 0.0, 0.0, 1.0),),
        start: str = "pinned",
        start_time: float = 1.0,
        prediction_type: str | None = None,
        num_train_timesteps: int = 1000,
        beta_schedule: str | None = None,
        beta_start: float | None = None,
        beta_end: float | None = None,
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float | None = None,
        use_flow_sigmas: bool = False,
        invert_sigmas: bool = False,
        timestep_type: str = "discrete",
        sigma_data: float | None = None,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        strength: float | None = None,
        num_inference_steps: int | None = None,
        begin_index: int = 0,
        extra_call: bool = False,
        range: Mapping[str, Any] | None = None,
        mean: Tensor | None = None,
    ):
        self.times = list(times)
        self.weights = list(map(list, weights))
        self.mean = mean
        self.condition: Tensor | None = None
        self.warned: set[str] = set()  # each warning is given once

        # How the network was trained.
        chain = beta_schedule is not None or trained_betas is not None or sigma_data is not None
        self.prediction = prediction_type or (
            "epsilon" if chain and not use_flow_sigmas else "flow_prediction"
        )
        self.prediction = {"original_sample": "sample"}.get(self.prediction, self.prediction)
        if self.prediction not in PREDICTIONS:
            raise ValueError(
                f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {prediction_type!r}"
            )
        self.flow = self.prediction == "flow_prediction"
        if use_flow_sigmas and not self.flow:
            raise ValueError(
                f"use_flow_sigmas=True with prediction_type={self.prediction} is no flow network "
                "of diffusers' pipelines; give from_schedule prediction_type='flow_prediction' "
                "where it predicts the velocity"
            )

        # Clock.
        continuous = timestep_type == "continuous" and self.prediction == "v_prediction"
        self.by_log = not self.flow and (continuous or sigma_data is not None)  # a clock of sigma
        self.ratios = None if self.flow or self.by_log else self._ratios()
        self.time_max = 1.0
        if self.ratios is not None and not rescale_betas_zero_snr:
            self.time_max = float(self.ratios[-1] / (1 + self.ratios[-1]))
        blind = self.by_log or (self.prediction == "epsilon" and self.time_max == 1)
        if self.times[0] == 1 and blind:
            raise ValueError(
                "the schedule begins at t = 1, where sigma is infinite and this network's answer "
                "says nothing; plan it on a noise_schedule that begins at the network's largest "
                "sigma"
            )

        # Times.
        clock = torch.tensor(list(map(self._native, self.times[:-1])), dtype=torch.float32)
        self.clock = torch.cat([clock[:1].expand(begin_index + extra_call), clock])
        self.timesteps = self.clock
        sigmas = self.times if self.flow else list(map(self._ratio, self.times))
        self.sigmas = torch.tensor(sigmas)
        self.num_inference_steps = len(self.weights)
        self.begun = False
        self.calls = len(self.timesteps)  # until set_timesteps

    @classmethod
    def from_schedule(
        cls,
        file: str | Path | StepSchedule,
        config: Mapping[str, Any] | None = None,
        extra_call: bool = False,
        **changes: Any,
    ) -> OSSScheduler:
        """Build the scheduler of a schedule.

        Args:
            file: What exporter=oss_scheduler wrote. Where oss_exp is installed, also a
                step schedule or its file.
            config: Config of the pipeline's scheduler, which says how the network was
                trained.
            extra_call: As in the constructor.
            changes: Fields to set in place of the config's.

        Raises:
            OSError, ValueError: The file cannot be run, or the config does not say
            enough.
        """
        # How the network was trained.
        fields = {**config} if config is not None else {}
        training: dict[str, Any] = {key: fields[key] for key in fields if key in TRAINING}
        training |= changes
        if str(fields.get("_class_name")).startswith("CosineDPM"):
            training = {"timestep_type": "arctan"} | training
        flow = {"shift", "num_train_timesteps"} <= {*fields}
        chain = any(training.get(key) for key in BETAS)
        if config is not None and "prediction_type" not in training and not (flow or chain):
            raise ValueError(
                "the config of the pipeline's scheduler does not say how its network was trained; "
                "if it predicts the velocity from noise to data over a clock of 0 to 1000, give "
                "from_schedule prediction_type='flow_prediction'"
            )
        if "sigma_data" in training and "sigma_schedule" not in fields:
            raise ValueError(
                "of the networks with sigma_data only those of diffusers' EDM schedulers are known"
            )

        # The schedule.
        record, mean = _read(Path(file)) if isinstance(file, str | Path) else _numbers(file)
        schedule = {key: record[key] for key in SCHEDULE if key in record}
        return cls(**schedule, **training, extra_call=extra_call, mean=mean)

    # The interface of pipelines

    @property
    def init_noise_sigma(self) -> float:
        """Return the factor of the noise; pipelines of flow networks do not read it."""
        if self.flow or self.config["start"] == "analytic" or self.config["extra_call"]:
            return 1.0
        return self._scale(self.times[0]) * self.config["start_time"]

    def begin(self, noise: Tensor) -> Tensor:
        """Return the `latents` (B, *E) to give the pipeline, from standard normal noise (B, *E)."""
        if self.config["extra_call"]:
            raise ValueError(
                "extra_call=True makes the first state itself; give the pipeline the noise, or none"
            )
        self.begun = True
        return self._first_state(noise) / self.init_noise_sigma

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Prepare a run of the schedule's own times.

        Args:
            num_inference_steps: Must be the number that the schedule is for.
            device: Device of `timesteps`.
            sigmas: Not used, except for their number where no other is given.
            mu: Shift of the pipeline, for use_dynamic_shifting.
            timesteps: Not used. Pipelines that pass both lists, such as CogView4's,
                give their network the times before the shift.
        """
        # The number of steps.
        requested = num_inference_steps
        if requested is None and sigmas is not None:
            requested = len(sigmas)
        steps, strength = len(self.weights), self.config["strength"]
        expected = self.config["num_inference_steps"] or steps
        if requested != expected:
            image = "" if strength is None else f" and strength={strength}"
            raise ValueError(
                f"the schedule has {steps} steps, {requested} were asked; "
                f"set num_inference_steps={expected}{image}"
            )

        # The first state.
        inside = self.flow and self.config["start_time"] != 1 and strength is None
        moves = self.config["start"] == "analytic" or inside
        if moves and not self.begun and not self.config["extra_call"]:
            raise ValueError(
                "the noise is not the schedule's first state: give the pipeline "
                "latents=scheduler.begin(noise), or build the scheduler with extra_call=True, "
                "which costs one more network call"
            )

        # The network's times.
        self.timesteps = self.clock.to(device)
        if self.flow and timesteps is not None and sigmas is not None:
            shift = self._shift(mu)
            fraction = self.timesteps / self.config["num_train_timesteps"]
            self.timesteps = self.timesteps / (shift - (shift - 1) * fraction)

        self.calls = self.config["begin_index"]
        self._outputs = []

    def _shift(self, mu: float | None) -> float:
        """Return the shift of the pipeline's sigmas."""
        if not self.config["use_dynamic_shifting"]:
            return self.config["shift"]
        if mu is None:
            raise ValueError("use_dynamic_shifting=True needs the mu of the pipeline's size")
        return mu if self.config["time_shift_type"] == "linear" else math.exp(mu)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Check the number of times that the pipeline leaves out, in order to begin at an image."""
        if begin_index == self.config["begin_index"]:
            return
        if self.config["strength"] is None:
            raise ValueError(
                "the schedule runs from its first time on, not from inside; search one for "
                "image-to-image, with its image and its strength: "
                "Pipeline(pipe, prompts, image=..., strength=...)"
            )
        raise ValueError(
            "the schedule begins at an image; call the pipeline with "
            f"strength={self.config['strength']} and "
            f"num_inference_steps={self.config['num_inference_steps']}"
        )

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Return the latents as they are: in the form that the network takes."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take the latents from one time to the next.

        Args:
            model_output: The network's answer (M, *E) at `timestep`.
            timestep: The next one of `timesteps`.
            sample: Latents (M, *E) at that time.
            return_dict: Whether to return a SchedulerOutput, not a tuple.

        Returns:
            Latents (M, *E) at the next time, in the sample's dtype.
        """
        finished = self.calls >= len(self.timesteps)
        if finished or float(timestep) != float(self.timesteps[self.calls]):
            raise ValueError(
                "a step schedule runs through all of its times, first to last: call set_timesteps "
                "and give step every one of scheduler.timesteps"
            )
        self._check_call(model_output, sample)

        step = self.calls - self.config["begin_index"] - int(self.config["extra_call"])
        self.calls += 1
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        if step < 0:
            latents = self._first_state(x)
        else:
            latents = self._next_state(step, model_output.to(x.dtype), x)

        latents = latents.to(sample.dtype)
        return SchedulerOutput(prev_sample=latents) if return_dict else (latents,)

    def _check_call(self, model_output: Tensor, sample: Tensor) -> None:
        """Warn where the dtype or the shape of a call is outside of the schedule's range."""
        certificate = self.config["range"] or {}
        base = certificate["base"] if isinstance(certificate.get("base"), dict) else {}
        visible = base.get("dtype") in DTYPES
        dtype = str(model_output.dtype).removeprefix("torch.") if visible else None
        self.check_range(dtype=dtype, shape=list(sample.shape[1:]))

    def _next_state(self, step: int, output: Tensor, latents: Tensor) -> Tensor:
        """Return the latents (M, *E) after a step of the schedule."""
        # State and prediction.
        x = latents / self._scale(self.times[step])
        if step == 0:
            self._first = x
            self.begun = False
        self._outputs.insert(0, self._clean(output, x, self.times[step]))

        # Weighted sum.
        current, first, mean, *answers = self.weights[step]
        terms = [(current, x), (first, self._first), *zip(answers, self._outputs, strict=False)]
        state = sum((weight * term for weight, term in terms if weight != 0), torch.zeros_like(x))
        if mean != 0:
            state = state + mean * self._mean_of(x)
        return self._scale(self.times[step + 1]) * state

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return clean latents (M, *E) with noise for a time; pipelines with masks call it."""
        timestep = timesteps.flatten()[0].cpu()
        index = (self.timesteps.cpu() == timestep).nonzero().flatten()
        if len(index) == 0:
            raise ValueError(f"{float(timestep)} is none of the schedule's timesteps")
        step = int(index[0]) - self.config["begin_index"] - int(self.config["extra_call"])
        t = self.times[max(step, 0)]
        return self._scale(t) * ((1 - t) * original_samples + t * noise)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Return the same as `add_noise`, by the name that flow schedulers have for it."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        """Return the length of the training chain."""
        return self.config["num_train_timesteps"]

    def check_range(self, **setting: Any) -> None:
        """Warn, once, where a setting is outside of the schedule's range.

        Args:
            setting: Values by axis, as in check_range(guidance=7.0, lora="x").
        """
        try:
            messages = outside(self.config["range"] or {}, setting)
        except (AttributeError, LookupError, TypeError, ValueError):
            messages = ["its certificate is damaged; certify it again"]
        for text in messages:
            if text not in self.warned:
                self.warned.add(text)
                warnings.warn(f"step schedule: {text}", stacklevel=2)

    # Times and coordinates

    def _first_state(self, noise: Tensor) -> Tensor:
        """Return the latents at the first time, made of standard normal noise (M, *E)."""
        x = self.config["start_time"] * noise
        t = self.times[0]
        if self.config["start"] == "analytic":
            ratio = t / self.config["start_time"]
            x = ratio * x + (1 - ratio) * self._mean_of(x)
        return self._scale(t) * x

    def _mean_of(self, x: Tensor) -> Tensor:
        """Return the mean of each row of x (M, *E); row m is sample m % B, as under guidance."""
        if self.mean is None:
            raise ValueError(
                "the schedule's mean is not there; load it with from_schedule, from the schedule's "
                "file"
            )

        if self.mean.shape[1:] != x.shape[1:]:
            shapes = f"{tuple(self.mean.shape[1:])}, the latents {tuple(x.shape[1:])}"
            raise ValueError(
                f"the schedule's mean has shape {shapes}; set scheduler.mean to the mean in the "
                "pipeline's layout (FluxPipeline._pack_latents)"
            )
        if self.condition is None and len(self.mean) > 1:
            raise ValueError(
                f"the schedule has means of {len(self.mean)} conditions; "
                "set scheduler.condition to (B,)"
            )

        mean = self.mean.to(x)
        rows = mean if self.condition is None else mean[self.condition.to(x.device)]
        return rows.repeat(len(x) // len(rows), *[1] * (x.ndim - 1))

    def _clean(self, output: Tensor, x: Tensor, t: float) -> Tensor:
        """Return the x0 that the network predicts, from its output at the state x and time t."""
        # Direct prediction.
        if self.prediction == "sample":
            return output

        # EDM, Karras et al. 2022, table 1, with x = (1 - t) x_native.
        data = self.config["sigma_data"]
        if data is not None:
            sign = -1 if self.prediction == "v_prediction" else 1  # diffusers turns it
            scale = self._scale(t)
            return data**2 * (1 - t) * scale**2 * x + sign * data * t * scale * output

        # The velocity.
        time = min(t, self.time_max)
        velocity = -output if self.config["invert_sigmas"] else output
        if self.prediction == "epsilon":
            velocity = (output - x) / (1 - time)
        if self.prediction == "v_prediction":
            scale = self._scale(t)
            velocity = (2 * time - 1) * scale**2 * x + scale * output
        return x - t * velocity

    def _scale(self, t: float) -> float:
        """Return the size of the network's latents over x_t; at t = 0 they are x0."""
        if self.flow or t == 0:
            return 1.0
        data = self.config["sigma_data"]
        if data is not None:
            return 1 / math.hypot(data * (1 - t), t)
        time = min(t, self.time_max)
        return 1 / math.hypot(1 - time, time)  # alpha + sigma

    def _native(self, t: float) -> float:
        """Return the network's clock at t; an index of a chain is log-linear between whole ones."""
        if self.flow:
            time = 1 - t if self.config["invert_sigmas"] else t
            return time * self.config["num_train_timesteps"]
        ratio = self._ratio(t)
        if self.ratios is None:
            arctan = self.config["timestep_type"] == "arctan"
            return 2 / math.pi * math.atan(ratio) if arctan else math.log(ratio) / 4
        if ratio < self.ratios[0]:
            return ratio / self.ratios[0] - 1  # -1 is clean
        return float(np.interp(math.log(ratio), np.log(self.ratios), np.arange(len(self.ratios))))

    def _ratio(self, t: float) -> float:
        """Return sigma / alpha at t, no larger than the chain's."""
        time = min(t, self.time_max)
        ratio = time / (1 - time) if time < 1 else math.inf
        return ratio if self.ratios is None else min(ratio, float(self.ratios[-1]))

    def _ratios(self) -> np.ndarray:
        """Return sigma / alpha of each index, float64; `LAST_RATIO` in place of infinity."""
        # The chain of the training.
        if self.config["beta_schedule"] is None and self.config["trained_betas"] is None:
            raise ValueError(
                f"prediction_type={self.prediction} needs the betas of the training; give "
                "from_schedule the config of the pipeline's own scheduler, pipe.scheduler.config"
            )
        chain = {key: self.config[key] for key in BETAS if self.config[key] is not None}
        try:
            betas = DDPMScheduler(self.config["num_train_timesteps"], **chain).betas
        except NotImplementedError:
            raise ValueError(
                f"beta_schedule={chain['beta_schedule']} is none that diffusers' DDPM has"
            ) from None

        # alpha^2, shifted and rescaled as in training.
        alpha2 = torch.cumprod(1 - betas.double(), 0)
        if (shift := self.config["snr_shift_scale"]) is not None:
            alpha2 = alpha2 / (shift + (1 - shift) * alpha2)
        if self.config["rescale_betas_zero_snr"]:  # Lin et al. 2023, arXiv 2305.08891, Alg. 1
            alpha = alpha2.sqrt()
            alpha2 = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2

        return ((1 - alpha2) / alpha2).sqrt().clamp(max=LAST_RATIO).numpy()


def outside(measured: dict[str, Any], setting: dict[str, Any]) -> list[str]:
    """Return a message on each part of a setting that lies outside a certificate.

    Args:
        measured: The certificate of a schedule; empty where it has none.
        setting: Value on each axis; None where it is unknown.
    """
    messages = []
    for axis, value in setting.items():
        base = measured["base"].get(axis) if measured else None
        if value is None or base is None or value == base:
            continue
        if axis == "shape" and len(value) != len(base):
            continue

        # Cells at this value, or the two around it.
        cells = [cell for cell in measured["cells"] if cell["axis"] == axis]
        near = [cell for cell in cells if value is True or cell["value"] == value]
        if not near and isinstance(value, float):
            points = [*cells, {"value": base, "loss": 0.0}]
            for low, high in pairwise(sorted(points, key=lambda point: point["value"])):
                if low["value"] < value < high["value"]:
                    near += [low, high]
        if not near:
            values = ", ".join(map(str, [base, *(cell["value"] for cell in cells)]))
            messages.append(f"nothing was measured at {axis}={value}, only at {values}")
            continue

        # The largest loss there.
        worst = max(near, key=lambda point: point["loss"])
        if worst["loss"] > measured["tolerance"]:
            low, high = worst["loss_interval"][:2]
            loss = f"{worst['loss']:.1f} dB ({low:.1f} to {high:.1f}, n={worst['n']}"
            place = f"{axis}={value} is outside of its range: at {worst['value']}"
            messages.append(f"{place} it lost {loss}; gain {worst['gain']:+.1f})")
    return messages


def _numbers(steps: StepSchedule) -> tuple[Mapping[str, Any], Tensor | None]:
    """Return the record of a step schedule and its mean (G, *E)."""
    from oss_exp.export.numbers import in_numbers

    return in_numbers(steps), steps.mean


def _read(path: Path) -> tuple[Mapping[str, Any], Tensor | None]:
    """Return the record in a file and its mean (G, *E).

    Raises:
        FileNotFoundError: The file, or that of its mean, does not exist.
        ValueError: Its content cannot be run.
    """
    # Format.
    record = _load_json(path)
    form = record.get("format") if isinstance(record, dict) else None
    if form == "oss_exp/step_schedule":
        return _read_step_schedule(path)
    if form != FORMAT or record.get("version") != VERSION:
        expected = f'"format": "{FORMAT}", "version": {VERSION}'
        raise ValueError(f"{path} is not of {expected}; write it with task=export")

    # Fields.
    if record.get("answers", 1) != 1:
        raise ValueError(
            f"schedule {path} weighs guided and unguided answers apart, and a pipeline gives their "
            "mix; plan it with model.guidance.scale=1, or by stepsize=oss_shared"
        )
    for key in REQUIRED:
        if key not in record:
            raise ValueError(f"schedule {path} has no {key}; write it again")
    return record, _read_mean(path, record.get("mean"))


def _load_json(path: Path) -> Any:
    """Return the content of a file."""
    if not path.is_file():
        folder = path.absolute().parent
        raise FileNotFoundError(f"schedule {path} does not exist (folder: {folder})")
    try:
        if path.stat().st_size > LIMIT:
            raise ValueError(f"more than {LIMIT >> 20} MiB")
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        reason = f"is not complete JSON ({error!s:.200}); write it again"
        raise ValueError(f"schedule {path} {reason}") from None


def _read_step_schedule(path: Path) -> tuple[Mapping[str, Any], Tensor | None]:
    """Return the record of a file of oss_exp, where that is installed."""
    try:
        from oss_exp.schedule import StepSchedule
    except ImportError:
        raise ValueError(
            f"{path} has its solver's name and not its numbers; rewrite it where oss_exp is, with "
            f"oss-exp task=export exporter=oss_scheduler task.schedule={path.name}"
        ) from None
    return _numbers(StepSchedule.load(path))


def _read_mean(path: Path, entry: Any) -> Tensor | None:
    """Return the mean that a schedule's record names, (G, *E)."""
    if entry is None:
        return None
    name = entry.get("file") if isinstance(entry, dict) else None
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"the mean of schedule {path} must name a file beside it; write it again")
    file = path.with_name(name)
    if not file.is_file():
        raise FileNotFoundError(f"the mean {file} of schedule {path} does not exist; copy it too")
    content = b"" if file.stat().st_size > MEAN_LIMIT else file.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry.get("sha256"):
        raise ValueError(f"the mean {file} is not the one of schedule {path}; copy both again")
    return safetensors.torch.load(content)["mean"]
