"""Step schedules in pipelines of diffusers: orders, fitted steps and analytic starts, which no list of sigmas holds.

This file needs torch, diffusers and safetensors, and can lie beside a script that has nothing else of oss_exp. It runs
what `oss-exp task=export exporter=oss_scheduler` writes: every step as numbers, a sum over the current state, the first
state, a mean and all clean samples predicted so far. Times t are those of flow matching: x_t = (1 - t) x0 + t eps.
Legend: B samples, M rows (a multiple of B), K steps, G conditions, *E a latent's dims.
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

FORMAT, VERSION = "oss_exp/scheduler", 1
LIMIT, MEAN_LIMIT = 1 << 24, 1 << 29  # bytes that are read of a schedule and of its mean
PREDICTIONS = ("flow_prediction", "epsilon", "v_prediction", "sample")
BETAS = ("beta_schedule", "beta_start", "beta_end", "trained_betas")
TRAINING = (
    *(
        "prediction_type",
        "num_train_timesteps",
        "rescale_betas_zero_snr",
        "snr_shift_scale",
        *BETAS,
    ),
    *("use_flow_sigmas", "invert_sigmas", "timestep_type", "sigma_data"),
    *("shift", "use_dynamic_shifting", "time_shift_type"),  # and what pipelines make the shift of:
    *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
)
SCHEDULE = (
    "range",
    "times",
    "weights",
    "start",
    "start_time",
    "strength",
    "num_inference_steps",
    "begin_index",
)
LAST_RATIO = (
    4096.0  # sigma / alpha that diffusers gives to the end of a chain that has no signal left
)


class OSSScheduler(SchedulerMixin, ConfigMixin):
    """pipe.scheduler = OSSScheduler.from_schedule("x.json", pipe.scheduler.config); pipe(..., num_inference_steps=K).

    times:      K + 1 decreasing times t, the last 0.
    weights:    K rows over (x, first state, mean, newest x0, older x0 ...): the state at the next time.
    start:      `pinned` and `free`: the noise is the first state. `analytic`: they are a jump apart, see `begin`.
    start_time: the noise is start_time * eps.
    mean:       (G, *E) mean clean latents, in the pipeline's own layout (a FluxPipeline's are packed).
    prediction_type, num_train_timesteps, beta_..., rescale_betas_zero_snr, snr_shift_scale, use_flow_sigmas,
    invert_sigmas, timestep_type, sigma_data: how the network was trained, in diffusers' words and with its defaults;
                timestep_type=arctan is the clock of its CosineDPMSolverMultistepScheduler.
    strength, num_inference_steps, begin_index: of a schedule that begins at an image, how its pipeline is called, and
                how many of `timesteps` it cuts off then: so many come before the first time.
    extra_call: one more network call, not used, in which the noise becomes the first state: for pipelines that take no
                `latents` and do not ask for init_noise_sigma, such as DiTPipeline.

    range:      where the schedule was measured to hold, by task=certify: a call outside of it is warned of, once. The
                scheduler sees the network's dtype and the latents' shape; `check_range` takes the rest.

    `condition` (B,) says which mean is each sample's where there are several; set it before the pipeline is called.
    The state is made anew from the noise and the answers at each step: what a callback does to latents is not kept.
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
        self.said: set[str] = set()
        self.times, self.weights, self.mean = list(times), [list(row) for row in weights], mean
        self.condition: Tensor | None = None

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
                f"use_flow_sigmas=True with prediction_type={self.prediction} is no flow network of diffusers' "
                "pipelines; give from_schedule prediction_type='flow_prediction' where it predicts the velocity"
            )
        continuous = timestep_type == "continuous" and self.prediction == "v_prediction"
        self.by_log = not self.flow and (
            continuous or sigma_data is not None
        )  # its clock is one of sigma
        self.ratios = None if self.flow or self.by_log else self._ratios()
        self.time_max = 1.0
        if self.ratios is not None and not rescale_betas_zero_snr:
            self.time_max = float(self.ratios[-1] / (1 + self.ratios[-1]))
        if self.times[0] == 1 and (
            self.by_log or (self.prediction == "epsilon" and self.time_max == 1)
        ):
            raise ValueError(
                "the schedule begins at t = 1, where sigma is infinite and this network's answer says nothing; plan it "
                "on a noise_schedule that begins at the network's largest sigma"
            )

        # Times.
        clock = torch.tensor([self._native(t) for t in self.times[:-1]], dtype=torch.float32)
        self.clock = torch.cat([clock[:1].expand(begin_index + extra_call), clock])
        self.timesteps = self.clock
        self.sigmas = torch.tensor([t if self.flow else self._ratio(t) for t in self.times])
        self.num_inference_steps, self.begun = len(self.weights), False
        self.calls = len(self.timesteps)  # until set_timesteps

    @classmethod
    def from_schedule(
        cls,
        file: str | Path | StepSchedule,
        config: Mapping[str, Any] | None = None,
        extra_call: bool = False,
        **changes: Any,
    ) -> OSSScheduler:
        """file: what exporter=oss_scheduler wrote; or, where oss_exp is installed, a step schedule or its file.

        config: of the pipeline's own scheduler, which says how the network was trained; `changes` go over it.
        """
        told = {**config} if config is not None else {}
        training: dict[str, Any] = {
            key: value for key, value in told.items() if key in TRAINING
        } | changes
        if str(told.get("_class_name")).startswith("CosineDPM"):
            training = {"timestep_type": "arctan"} | training
        known = config is None or "prediction_type" in training
        if not known and not (
            {"shift", "num_train_timesteps"} <= {*told} or any(map(training.get, BETAS))
        ):
            raise ValueError(
                "the config of the pipeline's scheduler does not say how its network was trained; if it predicts the "
                "velocity from noise to data over a clock of 0 to 1000, give from_schedule "
                "prediction_type='flow_prediction'"
            )
        if "sigma_data" in training and "sigma_schedule" not in told:
            raise ValueError(
                "of the networks with sigma_data only those of diffusers' EDM schedulers are known"
            )
        record, mean = _read(Path(file)) if isinstance(file, str | Path) else _numbers(file)
        given = {key: record[key] for key in SCHEDULE if key in record}
        return cls(**given, **training, extra_call=extra_call, mean=mean)

    # What a pipeline asks

    @property
    def init_noise_sigma(self) -> float:
        """What pipelines of eps-networks multiply their noise by; those of flow networks do not ask."""
        if self.flow or self.config["start"] == "analytic" or self.config["extra_call"]:
            return 1.0
        return self._scale(self.times[0]) * self.config["start_time"]

    def begin(self, noise: Tensor) -> Tensor:
        """noise (B, *E) of size 1 -> the `latents` to give to the pipeline, which spares an analytic start's call."""
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
        """The schedule has its own times: of what a pipeline gives only the number of steps counts.

        One that gives sigmas and timesteps too, as CogView4's, tells its network the times before the shift by mu.
        """
        asked, steps = num_inference_steps, len(self.weights)
        if asked is None and sigmas is not None:
            asked = len(sigmas)
        if asked != (call := self.config["num_inference_steps"] or steps):
            with_strength = (
                ""
                if self.config["strength"] is None
                else f" and strength={self.config['strength']}"
            )
            raise ValueError(
                f"the schedule has {steps} steps, {asked} were asked; set num_inference_steps={call}{with_strength}"
            )
        inside = self.flow and self.config["start_time"] != 1 and self.config["strength"] is None
        moves = self.config["start"] == "analytic" or inside
        if moves and not self.begun and not self.config["extra_call"]:
            raise ValueError(
                "the noise is not the schedule's first state: give the pipeline latents=scheduler.begin(noise), or "
                "build the scheduler with extra_call=True, which costs one more network call"
            )
        self.timesteps = self.clock.to(device)
        if self.flow and timesteps is not None and sigmas is not None:
            shift = self.config["shift"]
            if self.config["use_dynamic_shifting"]:
                if mu is None:
                    raise ValueError(
                        "use_dynamic_shifting=True needs the mu of the pipeline's size"
                    )
                shift = mu if self.config["time_shift_type"] == "linear" else math.exp(mu)
            self.timesteps = self.timesteps / (
                shift - (shift - 1) * self.timesteps / self.config["num_train_timesteps"]
            )
        self.calls, self._outputs = self.config["begin_index"], []

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Pipelines call it with 0, or with how many times they leave out to begin at an image."""
        if begin_index == self.config["begin_index"]:
            return
        if self.config["strength"] is None:
            raise ValueError(
                "the schedule runs from its first time on, not from inside; search one for image-to-image, with its "
                "image and its strength: Pipeline(pipe, prompts, image=..., strength=...)"
            )
        raise ValueError(
            f"the schedule begins at an image; call the pipeline with strength={self.config['strength']} and "
            f"num_inference_steps={self.config['num_inference_steps']}"
        )

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Latents are as the network takes them."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """sample (M, *E) and what the network said of it -> the latents at the next time, in the sample's dtype."""
        if self.calls >= len(self.timesteps) or float(timestep) != float(
            self.timesteps[self.calls]
        ):
            raise ValueError(
                "a step schedule runs through all of its times, first to last: call set_timesteps and give step every "
                "one of scheduler.timesteps"
            )
        step = self.calls - self.config["begin_index"] - int(self.config["extra_call"])
        told = self.config["range"] or {}
        base = told["base"].get("dtype") if isinstance(told.get("base"), dict) else None
        seen = base in (
            "float32",
            "bfloat16",
            "float16",
        )  # else it is of the weights, which a scheduler does not see
        dtype = str(model_output.dtype).removeprefix("torch.") if seen else None
        self.check_range(dtype=dtype, shape=list(sample.shape[1:]))
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        self.calls += 1
        if step < 0:
            after = self._first_state(x)
        else:
            x = x / self._scale(self.times[step])
            if step == 0:
                self._first, self.begun = x, False
            self._outputs.insert(0, self._clean(model_output.to(x.dtype), x, self.times[step]))
            current, first, mean, *answers = self.weights[step]
            terms = [(current, x), (first, self._first), *zip(answers, self._outputs, strict=False)]
            after = sum(
                (weight * vector for weight, vector in terms if weight != 0), torch.zeros_like(x)
            )
            if mean != 0:
                after = after + mean * self._mean_of(x)
            after = self._scale(self.times[step + 1]) * after
        after = after.to(sample.dtype)
        return SchedulerOutput(prev_sample=after) if return_dict else (after,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean latents (M, *E) -> latents at one of the schedule's times, as pipelines with masks ask at each step."""
        index = (self.timesteps.cpu() == timesteps.flatten()[0].cpu()).nonzero().flatten()
        if len(index) == 0:
            raise ValueError(f"{float(timesteps.flatten()[0])} is none of the schedule's timesteps")
        t = self.times[
            max(int(index[0]) - self.config["begin_index"] - int(self.config["extra_call"]), 0)
        ]
        return self._scale(t) * ((1 - t) * original_samples + t * noise)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """The same, in the words of schedulers of flow matching."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def check_range(self, **setting: Any) -> None:
        """Warn, once, where a setting is outside of the schedule's range, as check_range(guidance=7.0, lora="x")."""
        try:
            found = outside(self.config["range"] or {}, setting)
        except (AttributeError, LookupError, TypeError, ValueError):
            found = ["its certificate is damaged; certify it again"]
        for text in found:
            if text not in self.said:
                self.said.add(text)
                warnings.warn(f"step schedule: {text}", stacklevel=2)

    # Times and coordinates

    def _first_state(self, noise: Tensor) -> Tensor:
        """eps (M, *E) -> latents at times[0]."""
        x, t = self.config["start_time"] * noise, self.times[0]
        if self.config["start"] == "analytic":
            ratio = t / self.config["start_time"]
            x = ratio * x + (1 - ratio) * self._mean_of(x)
        return self._scale(t) * x

    def _mean_of(self, x: Tensor) -> Tensor:
        """(M, *E) like x; row m is sample m % B, as under guidance."""
        if self.mean is None:
            raise ValueError(
                "the schedule's mean is not there; load it with from_schedule, from the schedule's file"
            )
        if self.mean.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"the schedule's mean has shape {tuple(self.mean.shape[1:])}, the latents {tuple(x.shape[1:])}; set "
                "scheduler.mean to the mean in the pipeline's layout (FluxPipeline._pack_latents)"
            )
        if self.condition is None and len(self.mean) > 1:
            raise ValueError(
                f"the schedule has means of {len(self.mean)} conditions; set scheduler.condition to (B,)"
            )
        mean = self.mean.to(x)
        rows = mean if self.condition is None else mean[self.condition.to(x.device)]
        return rows.repeat(len(x) // len(rows), *[1] * (x.ndim - 1))

    def _clean(self, output: Tensor, x: Tensor, t: float) -> Tensor:
        """What the network said of x at t -> its x0."""
        if self.prediction == "sample":
            return output
        if (data := self.config["sigma_data"]) is not None:
            # Karras et al. 2022, table 1, with x = (1 - t) x_native; v_prediction has its sign turned in diffusers.
            sign, scale = -1 if self.prediction == "v_prediction" else 1, self._scale(t)
            return data**2 * (1 - t) * scale**2 * x + sign * data * t * scale * output
        asked = min(t, self.time_max)
        velocity = -output if self.config["invert_sigmas"] else output
        if self.prediction == "epsilon":
            velocity = (output - x) / (1 - asked)
        if self.prediction == "v_prediction":
            scale = self._scale(t)
            velocity = (2 * asked - 1) * scale**2 * x + scale * output
        return x - t * velocity

    def _scale(self, t: float) -> float:
        """The latents, as the network takes them, are as much larger than x_t; at t = 0 they are x0."""
        if self.flow or t == 0:
            return 1.0
        if (data := self.config["sigma_data"]) is not None:
            return 1 / math.hypot(data * (1 - t), t)
        return 1 / math.hypot(1 - min(t, self.time_max), min(t, self.time_max))  # alpha + sigma

    def _native(self, t: float) -> float:
        """What the network is told of t: the index of its training chain, log-linear between whole ones."""
        if self.flow:
            return (1 - t if self.config["invert_sigmas"] else t) * self.config[
                "num_train_timesteps"
            ]
        ratio = self._ratio(t)
        if self.ratios is None:
            return (
                2 / math.pi * math.atan(ratio)
                if self.config["timestep_type"] == "arctan"
                else math.log(ratio) / 4
            )
        if ratio < self.ratios[0]:
            return ratio / self.ratios[0] - 1  # -1 is clean
        return float(np.interp(math.log(ratio), np.log(self.ratios), np.arange(len(self.ratios))))

    def _ratio(self, t: float) -> float:
        """sigma / alpha at t, no larger than the chain's."""
        t = min(t, self.time_max)
        ratio = t / (1 - t) if t < 1 else math.inf
        return ratio if self.ratios is None else min(ratio, float(self.ratios[-1]))

    def _ratios(self) -> np.ndarray:
        """sigma / alpha of each index, float64; the last is `LAST_RATIO` where it should be infinite."""
        if self.config["beta_schedule"] is None and self.config["trained_betas"] is None:
            raise ValueError(
                f"prediction_type={self.prediction} needs the betas of the training; give from_schedule "
                "the config of the pipeline's own scheduler, pipe.scheduler.config"
            )
        chosen = {key: self.config[key] for key in BETAS if self.config[key] is not None}
        try:
            betas = DDPMScheduler(self.config["num_train_timesteps"], **chosen).betas
        except NotImplementedError:
            raise ValueError(
                f"beta_schedule={chosen['beta_schedule']} is none that diffusers' DDPM has"
            ) from None
        kept = torch.cumprod(1 - betas.double(), 0)
        if (shift := self.config["snr_shift_scale"]) is not None:
            kept = kept / (shift + (1 - shift) * kept)
        if self.config["rescale_betas_zero_snr"]:  # Lin et al. 2023, arXiv 2305.08891, Alg. 1
            alpha = kept.sqrt()
            kept = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
        return ((1 - kept) / kept).sqrt().clamp(max=LAST_RATIO).numpy()


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
            values = ", ".join(str(point) for point in [base, *(cell["value"] for cell in cells)])
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
    """A step schedule's record and its mean (G, *E)."""
    from oss_exp.export.numbers import in_numbers

    return in_numbers(steps), steps.mean


def _read(path: Path) -> tuple[Mapping[str, Any], Tensor | None]:
    """A file's record and its mean (G, *E). FileNotFoundError or ValueError says what is wrong with it."""
    if not path.is_file():
        raise FileNotFoundError(
            f"schedule {path} does not exist (folder: {path.absolute().parent})"
        )
    try:
        if path.stat().st_size > LIMIT:
            raise ValueError(f"more than {LIMIT >> 20} MiB")
        record = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"schedule {path} is not complete JSON ({error!s:.200}); write it again"
        ) from None
    form = record.get("format") if isinstance(record, dict) else None
    if form == "oss_exp/step_schedule":
        try:
            from oss_exp.schedule import StepSchedule
        except ImportError:
            raise ValueError(
                f"{path} has its solver's name and not its numbers; rewrite it where oss_exp is, with oss-exp "
                f"task=export exporter=oss_scheduler task.schedule={path.name}"
            ) from None
        return _numbers(StepSchedule.load(path))
    if form != FORMAT or record.get("version") != VERSION:
        raise ValueError(
            f'{path} is not of "format": "{FORMAT}", "version": {VERSION}; write it with task=export'
        )
    if record.get("answers", 1) != 1:
        raise ValueError(
            f"schedule {path} weighs guided and unguided answers apart, and a pipeline gives their mix; plan it with "
            "model.guidance.scale=1, or by stepsize=oss_shared"
        )
    mean = record.get("mean")
    if missing := [key for key in ("times", "weights", "start", "start_time") if key not in record]:
        raise ValueError(f"schedule {path} has no {missing[0]}; write it again")
    if mean is None:
        return record, None
    if not (
        isinstance(mean, dict)
        and isinstance(mean.get("file"), str)
        and Path(mean["file"]).name == mean["file"]
    ):
        raise ValueError(f"the mean of schedule {path} must name a file beside it; write it again")
    file = path.with_name(mean["file"])
    if not file.is_file():
        raise FileNotFoundError(f"the mean {file} of schedule {path} does not exist; copy it too")
    data = b"" if file.stat().st_size > MEAN_LIMIT else file.read_bytes()
    if hashlib.sha256(data).hexdigest() != mean.get("sha256"):
        raise ValueError(f"the mean {file} is not the one of schedule {path}; copy both again")
    return record, safetensors.torch.load(data)["mean"]
