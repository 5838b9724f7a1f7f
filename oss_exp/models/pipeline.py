"""Any pipeline of diffusers as a model: its own loop is run, and a search tells it which state and time come next.

A pipeline's `__call__` encodes prompts, prepares states and conditions, and then asks its scheduler for a time, its
network for an answer, and its scheduler for the next state, over and over. Here a probe stands in for the scheduler:
`step` hands the network's answer out and takes the next state and time in, while the call stays suspended in between.
So guidance, masks, image conditions, ControlNets, adapters, offloading and quantised weights are the pipeline's own.

The call runs in a greenlet, in the caller's thread: grad mode, autocast and CUDA streams are the caller's.
Legend: B samples, each with its prompt; M rows, a multiple of B; *E a state's dims, as the scheduler sees it.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from greenlet import error, getcurrent, greenlet
from torch import Tensor, nn

from oss_exp.checks import require_choice
from oss_exp.models.base import Model
from oss_exp.models.guidance import Guidance
from oss_exp.models.network import Dtype
from oss_exp.models.parameterization import (
    DataPrediction,
    EDMPrediction,
    FlowVelocity,
    NoisePrediction,
    Parameterization,
    VPVelocity,
)
from oss_exp.models.pretrained import images, loaded, numbered, require_arguments, with_images
from oss_exp.models.quantization import Quantization, cast
from oss_exp.noise import CosinePath, DDPMPath, FlowPath, NoiseSchedule
from oss_exp.tensors import rowwise
from oss_exp.velocity import BoundVelocity

MOST_ASKED = 50  # times the steps that are left: strength is 2 % or more
LENGTH = 100_000  # steps that a suspended loop believes in
MOST_SUSPENDED = 64  # calls; schedules of their own for each of 32 samples need 32
TEXTS = ("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")
PER_SAMPLE = (*TEXTS, "image", "mask_image", "control_image", "generator")
# Arguments whose effect goes by a step's number.
COUNTED = (
    "control_guidance_start",
    "control_guidance_end",
    "cfg_trunc_ratio",
    "cfg_truncation",
    "skip_guidance_layers",
    "denoising_start",
    "denoising_end",
    "adapter_conditioning_factor",
)
ADAPTED = (
    "scaling",
    "active_adapters",
    "disable_adapters",
    "merged_adapters",
)  # of a layer of peft
DECODERS = ("vae", "vqvae", "vocoder")
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")


class Pipeline(Model):
    """A pipeline of diffusers behind canonical time. A condition is a prompt's number.

    pipe:    the pipeline, as it will be used: its dtype, offloading, adapters and quantised weights count.
    prompts: what conditions number: texts, or the classes or images that a pipeline without texts takes.
    guidance_apart: give a call's conditional and unconditional answers apart, which fitted steps (`OSSFit`) may weigh
             each for itself. Such steps run here, and not in the pipeline.
    call:    what else its `__call__` is given, such as `height` or `guidance_scale`. A list as long as `prompts` of
             what belongs to a sample (`negative_prompt`, `image`, ...) has an entry for each.

    Raises ValueError for a pipeline whose loop is not one of an ODE that is known here.
    """

    num_classes = None

    def __init__(
        self, pipe: Any, prompts: Sequence[Any], *, guidance_apart: bool = False, **call: Any
    ):
        super().__init__()
        if not is_pipeline(pipe) or not hasattr(pipe, "scheduler"):
            raise ValueError(
                f"pipe must be a pipeline of diffusers with a scheduler, got {type(pipe).__name__}"
            )
        schedulers = [
            name for name, part in pipe.components.items() if hasattr(part, "set_timesteps")
        ]
        if len(schedulers) > 1:
            raise ValueError(
                f"{type(pipe).__name__} is a cascade, of {', '.join(schedulers)}; search its pipelines one by one"
            )
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError(f"prompts must be a list of one or more, got {prompts!r}")
        if refused := {"num_inference_steps", "timesteps", "sigmas", "latents"} & call.keys():
            raise ValueError(
                f"{', '.join(sorted(refused))} of the call is for the search to choose; leave it out"
            )
        takes = inspect.signature(type(pipe).__call__).parameters
        if unknown := sorted(call.keys() - takes.keys()):
            near = ", ".join(get_close_matches(unknown[0], takes, n=3) or takes)
            raise ValueError(
                f"{type(pipe).__name__} takes no {unknown[0]}; it takes, among others, {near}"
            )
        given = {name: parameter.default for name, parameter in takes.items()} | call
        strength = given.get("strength", 1.0)
        if (
            isinstance(strength, bool)
            or not isinstance(strength, int | float)
            or not 0 < strength <= 1
        ):
            raise ValueError(f"strength must be a number above 0 and at most 1, got {strength!r}")
        if "prompt" in call or "class_labels" in call:
            raise ValueError(
                "prompt and class_labels of the call are the model's prompts; give them there"
            )
        for name in {*TEXTS, "generator"} & call.keys():
            if isinstance(call[name], list | tuple) and len(call[name]) != len(prompts):
                raise ValueError(
                    f"{name} has {len(call[name])} entries for {len(prompts)} prompts; give one for each, or no list"
                )
        if several := [
            name for name, value in call.items() if name.endswith("_per_prompt") and value != 1
        ]:
            raise ValueError(f"{several[0]} must be 1; give a prompt as often as it is wanted")
        if counted := [
            name for name in COUNTED if name in takes and given[name] != takes[name].default
        ]:
            raise ValueError(f"{counted[0]} counts steps, and a search goes by times; leave it out")
        self.pipe, self.call, self.prompts = pipe, call, list(prompts)
        self.strength = float(strength)
        self.draws = "generator" in takes
        self.takes = numbered(takes)
        if not self.takes:
            raise ValueError(f"{type(pipe).__name__} takes no prompt, class_labels or image")
        require_arguments(type(pipe), call)
        self.training_of = Training.of(pipe.scheduler)
        self.path = self.training_of.parameterization.path
        self.name = type(pipe).__name__
        self.guidance = Guidance()  # the pipeline's own comes with it
        self.guidance_apart = guidance_apart
        cached = [
            name
            for name in DENOISERS
            if getattr(getattr(pipe, name, None), "is_cache_enabled", False)
        ]
        if cached:
            raise ValueError(
                f"the {cached[0]} of {type(pipe).__name__} has a cache, which answers from the step before; search "
                f"without it (pipe.{cached[0]}.disable_cache()), and enable it afterwards"
            )
        self.suspended: dict[tuple[int, ...], _Loop] = {}
        self._rows: dict[float, float] = {}
        self._memoryless = False  # not known yet, and neither is the next
        self._begins_at_image = False
        self._asked: dict[int, tuple[int, Any]] = {}
        self._clock: dict[
            float, tuple[Tensor, float]
        ] = {}  # of a time: as the loop calls it, and what was told
        self._canonical = self.training_of.canonical
        self.register_buffer(
            "place", torch.empty(0, device=pipe._execution_device), persistent=False
        )
        weakref.finalize(self, _release, self.suspended)

    @classmethod
    def from_pretrained(
        cls,
        pipeline: str | Path,
        prompts: Sequence[Any] = ("a photo of a cat",),
        pipeline_class: str | None = None,
        dtype: Dtype | Mapping[str, Dtype] = "bfloat16",
        call: Mapping[str, Any] | None = None,
        loras: Sequence[str | Path] = (),
        quantization: Quantization | None = None,
        offload: bool = False,
        size: Literal["full", "tiny"] = "full",
        name: str | None = None,
    ) -> Pipeline:
        """Load a pipeline of diffusers from its folder or its hub id. Nothing that it brings is run.

        prompts: texts; of a pipeline without texts, files of images.
        pipeline_class: of diffusers; None: what the folder says. dtype: of all parts, or by part and `default`.
        call: what else its call is given, such as height; files stand for images.
        loras: files or hub ids, in order. quantization: of the denoisers' weights.
        offload: keep the parts in host memory, and one at a time on the GPU.
        size: `tiny`: small random parts in float32, called at a small size, with images made up where none are given.
        name: in tables and files; None: the class.
        Raises ValueError or FileNotFoundError for what is not there, or not known here.
        """
        require_choice(("full", "tiny"), size=size)
        call = with_images(call or {})
        made_up: list[Any] = []
        if size == "tiny" and quantization not in (None, "float8"):
            raise ValueError(
                f"quantization={quantization} is done while weights are loaded, of which size=tiny has none"
            )
        if size == "tiny":
            from oss_exp.models.tiny import pictures, tiny

            (pipe, call), made_up = tiny(pipeline_class, call), pictures(len(prompts))
        else:
            pipe = loaded(pipeline, pipeline_class, dtype, call, quantization, DENOISERS)
        for lora in loras:
            pipe.load_lora_weights(str(lora))
        if quantization == "float8":
            cast(pipe, DENOISERS)
        if offload:
            pipe.enable_model_cpu_offload()
        if {"prompt", "class_labels"}.isdisjoint(inspect.signature(type(pipe).__call__).parameters):
            prompts = (
                made_up if made_up and not Path(prompts[0]).is_file() else images(list(prompts))
            )
        model = cls(pipe, prompts, **call)
        model.name = f"{name or model.name}{'_tiny' if size == 'tiny' else ''}"
        return model

    def _apply(self, fn: Any, recurse: bool = True) -> Pipeline:
        """Move the pipeline with the model. What is offloaded moves by itself."""
        super()._apply(fn, recurse)
        if self.place.device != self.pipe._execution_device:
            self.release()
            self.pipe.to(self.place.device)
        return self

    @functools.cached_property
    def event_shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        loop = self.begun([0])
        try:
            return tuple(loop.first.shape[1:])
        finally:
            loop.release()

    @functools.cached_property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """SHA-256 of what makes the velocity: weights, adapters and their scales, and how the network was trained.

        Of every weight, quantised or not, its name, shape, type and 1,024 of its numbers. What only decodes counts not.
        """
        digest = hashlib.sha256()
        images = any(
            name.endswith("image") and value is not None for name, value in self.call.items()
        )
        for name, part in sorted(self.pipe.components.items()):
            if not isinstance(part, nn.Module) or name in (
                "safety_checker",
                *(() if images else DECODERS),
            ):
                continue
            for key, weight in _weights(part):
                digest.update(
                    f"{name}.{key} {tuple(weight.shape)} {weight.dtype}".encode()
                    + _some_bits(weight)
                )
            for key, module in part.named_modules():
                # Of peft's layers, and of the processors of image prompts.
                for owner in (module, getattr(module, "processor", None)):
                    scales = [getattr(owner, of, None) for of in ADAPTED]
                    scales.append(getattr(owner, "scale", None) if owner is not module else None)
                    if any(scales):
                        digest.update(f"{name}.{key} {scales}".encode())
        digest.update(self.training_of.formula().encode())
        return digest.hexdigest()

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The times at which the pipeline itself would step."""
        return PipelineSchedule().bind(self)

    def velocity(self, condition: Tensor | None, guidance: Guidance | None = None) -> BoundVelocity:
        if guidance not in (None, Guidance()):
            raise ValueError("a pipeline guides itself: give Pipeline its guidance_scale")
        condition = torch.arange(len(self.prompts)) if condition is None else condition
        return _PipelineVelocity(
            fn=self._velocity, condition=condition, mix=self.mix, rows=self._rows
        )

    @functools.cached_property
    def mix(self) -> tuple[float, ...]:
        """The weights with which the pipeline makes its answer of a call's rows; (1,) where these are not kept apart.

        Raises ValueError for a pipeline that does not guide, or not by such a sum.
        """
        if not self.guidance_apart:
            return (1.0,)
        loop = self.begun([0])
        try:
            parts, output = loop.parts(loop.answer), loop.answer.double()
            first, *others = parts.double()
            if not others:
                raise ValueError(
                    f"{self.name} asks its network once for a sample; call it with guidance_apart=False"
                )
            basis = torch.stack([(other - first).flatten() for other in others], dim=1).cpu()
            right = (output - first).flatten()[:, None].cpu()
            weights = torch.linalg.lstsq(basis, right).solution[:, 0].tolist()
        finally:
            loop.release()
        mix = (1 - sum(weights), *weights)
        self.guidance = Guidance(max(mix))
        return mix

    def decode(self, x0: Tensor) -> Tensor:
        """x0 (B, *E) -> pixels in [0, 1], or waveforms (B, channels, samples), by the pipeline's own end.

        The latest suspended call of B samples ends with it. So an image that the end pastes in, as that of
        image-to-video's first frame, is that of the samples whose velocity was asked for last.
        """
        taken = tuple(i % len(self.prompts) for i in range(len(x0)))
        key = next((key for key in reversed(self.suspended) if len(key) == len(x0)), taken)
        loop = self._loop(key)
        self.suspended.pop(key, None)
        try:
            return decoded(loop.finish(x0))
        except BaseException:
            loop.release()
            raise

    def native(self, times: Tensor) -> dict[str, Any]:
        """The same; and of a call that begins at an image, how it is asked for so many steps and what it cuts off."""
        record = super().native(times)
        if (rounding := self.rounding(times)) is not None:
            record["rounding"] = rounding
        if not (
            self.event_shape and self._begins_at_image
        ):  # the first asks for a call, where none was made yet
            return record
        num_steps = times.shape[-1] - 1
        asked, probe = self.asked_for(num_steps)
        if probe.by_length:  # the scheduler's times are cut, whatever was asked
            asked = num_steps
        else:
            asked, probe = self._first_that_runs(num_steps)
        return record | {
            "strength": self.strength,
            "num_inference_steps": asked,
            "begin_index": probe.cut // probe.order,
        }

    def rounding(self, times: Tensor) -> float | None:
        """How far the pipeline's rounding of its clock, to whole numbers or to its dtype, moves these times at most.

        None where the network was not asked at them, or is told no number that is known to be of the clock.
        """
        pairs = [pair for t in times.flatten().tolist() if (pair := self._clock.get(t)) is not None]
        if not pairs:
            return None
        clock, told = (
            torch.stack([clock for clock, _ in pairs]),
            torch.tensor([t for _, t in pairs]).double(),
        )
        scale = float(self.pipe.scheduler.config.get("num_train_timesteps") or 1)
        heard = min(
            (
                told,
                told * scale,
                scale - told,
                scale - told * scale,
            ),  # pipelines tell a share of it, or what is left
            key=lambda each: float((each - clock).abs().max()),
        )
        if float((heard - clock).abs().max()) > 0.02 * scale:
            return None
        t, moved = (self._canonical(each) for each in (clock, heard))
        return float((moved - t).abs().max())

    def asked_for(self, num_steps: int) -> tuple[int, Any]:
        """The least `num_inference_steps` of which `strength` leaves so many steps, and its scheduler.

        Raises ValueError where there is none.
        """
        if num_steps in self._asked:
            return self._asked[num_steps]
        asked = max(num_steps, int((num_steps - 1) / self.strength))
        while asked <= MOST_ASKED * num_steps:
            asked, probe = self._first_that_runs(asked)
            missing = num_steps - len(probe.own_times())
            if missing == 0 or self.strength == 1:
                self._asked[num_steps] = asked, probe
                return asked, probe
            asked += max(missing, 1)
        raise ValueError(f"{self.name} makes no {num_steps} steps with strength={self.strength}")

    def _first_that_runs(self, asked: int) -> tuple[int, Any]:
        """So many `num_inference_steps`, or the next number of which `strength` leaves a step, and its scheduler."""
        while True:
            try:
                loop = self.begun([0], num_inference_steps=asked)
            except (ValueError, IndexError):
                if asked * self.strength >= 1:
                    raise
                asked += 1
                continue
            loop.release()
            return asked, loop.probe

    def release(self) -> None:
        """End all suspended calls. It is done when the model is no longer used, too."""
        _release(self.suspended)

    def _velocity(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        times, parts = t.tolist(), () if len(self.mix) == 1 else (len(self.mix),)
        velocity = x.new_empty((len(x), *parts, *x.shape[1:]))
        for key, rows in _calls(times, condition.tolist()):
            loop, whole = self._loop(key), rows == [*range(len(x))]
            try:
                answer = loop.velocity(x if whole else x[rows], times[rows[0]], self.mix)
            except BaseException:
                self.suspended.pop(key).release()
                raise
            self._rows[times[rows[0]]] = loop.rows / len(rows)
            if (
                times[rows[0]] not in self._clock
                and loop.told is not None
                and loop.asked is not None
            ):
                self._clock[times[rows[0]]] = loop.asked.cpu(), float(loop.told)
                self._canonical = loop.probe.canonical
            if whole:
                return answer
            velocity[rows] = answer
        return velocity

    def _loop(self, key: tuple[int, ...]) -> _Loop:
        """The suspended call of these prompts, which is then the latest; the oldest ends where there are many.

        Raises ValueError where a thread that still runs has suspended it.
        """
        loop = self.suspended.get(key)
        if loop is not None and loop.thread is not threading.current_thread():
            if loop.thread.is_alive():
                raise ValueError(
                    f"a call of {self.name} is suspended in another thread, {loop.thread.name}, and can go on only "
                    "there; use the model in that thread, or call its release() there first"
                )
            loop = None  # it has ended with its thread
        loop = loop or self.begun(key)
        self.suspended.pop(key, None)
        self.suspended[key] = loop
        if not self._memoryless:
            loop.require_no_memory()
            self._memoryless = True
        while len(self.suspended) > MOST_SUSPENDED:
            self.suspended.pop(next(iter(self.suspended))).release()
        return loop

    def _rows_of(self, value: Any, key: Sequence[int]) -> Any:
        """What belongs to these prompts of a list or a batch of images that has an entry for each prompt."""
        if isinstance(value, list) and len(value) == len(self.prompts):
            return [value[i] for i in key]
        if isinstance(value, Tensor) and value.ndim > 3 and len(value) == len(self.prompts):
            return value[list(key)]
        return value

    def begun(self, key: Sequence[int], **call: Any) -> _Loop:
        """A call of these prompts, suspended at the first answer of its network."""
        own = {
            name: self._rows_of(value, key) if name in PER_SAMPLE else value
            for name, value in self.call.items()
        }
        if self.draws:
            own["generator"] = self._generators(own.get("generator"), key)
        arguments = {self.takes: [self.prompts[i] for i in key], **own, **call}
        loop = _Loop(self.pipe, self.training_of, arguments, self.guidance_apart)
        try:
            loop.begin(len(key))
            self._begins_at_image = loop.image_start is not None
            if loop.image_start is None and self.strength != 1:
                raise ValueError(
                    f"strength={self.strength} of {self.name} starts inside of the schedule, and it is not its "
                    "scheduler that puts noise on the image; search with strength=1.0"
                )
        except BaseException:
            loop.release()
            raise
        return loop

    @staticmethod
    def _generators(given: Any, key: Sequence[int]) -> Any:
        """Every call of a prompt draws the same numbers, such as the noise on its image, whatever it is called with."""
        if given is None:
            return [torch.Generator().manual_seed(i) for i in key]
        return (
            [each.clone_state() for each in given]
            if isinstance(given, list)
            else given.clone_state()
        )


@dataclass(frozen=True, eq=False)
class _PipelineVelocity(BoundVelocity):
    """A bound velocity that knows what a row cost where it was asked."""

    rows: Mapping[float, float] = field(default_factory=dict)

    def rows_at(self, t: Tensor) -> Tensor:
        usual = [1.0, *self.rows.values()][-1]
        return torch.tensor([self.rows.get(time, usual) for time in t.flatten().tolist()]).reshape(
            t.shape
        )


@dataclass(frozen=True, eq=False)
class PipelineSchedule(NoiseSchedule):
    """The times at which a pipeline itself steps, when it is called with so many steps."""

    pipeline: Pipeline | None = field(default=None, init=False, repr=False)

    def bind(self, model: Model) -> PipelineSchedule:
        """Return the schedule of this pipeline. Raises ValueError for another model."""
        if not isinstance(model, Pipeline):
            raise ValueError(
                f"model={model.name} is no pipeline, and has no times of its own; choose a noise_schedule"
            )
        bound = PipelineSchedule()
        object.__setattr__(bound, "pipeline", model)
        return bound

    def _times(self, num_steps: int) -> Tensor:
        if self.pipeline is None:
            raise ValueError("PipelineSchedule is bound to no pipeline yet")
        return self.pipeline.asked_for(num_steps)[1].own_times()


# --------------------------------------------------------------------------------------------------------------
# How the network was trained
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """What a scheduler's config says of its network.

    sign:     of the answer, against what the parameterization expects.
    inverted: the clock runs up while noise goes away.
    """

    parameterization: Parameterization
    sign: float = 1.0
    inverted: bool = False

    @classmethod
    def of(cls, scheduler: Any) -> Training:
        """Read it from a diffusers scheduler. ValueError names what is not known here."""
        config, kind = scheduler.config, type(scheduler).__name__
        if kind == "OSSScheduler":
            raise ValueError(
                "the pipeline's scheduler is an OSSScheduler, a schedule's; give it the one it came with"
            )
        if "LCM" in kind or "original_inference_steps" in config:
            raise ValueError(
                f"{kind} is of consistency models, which jump to the data and add noise; that is no ODE"
            )
        answer = config.get("prediction_type", "epsilon")
        if (
            kind.startswith("FlowMatch")
            or answer == "flow_prediction"
            or config.get("use_flow_sigmas")
        ):
            inverted = bool(config.get("invert_sigmas", False))
            path = FlowPath(time_scale=float(config["num_train_timesteps"]))
            return cls(FlowVelocity(path), -1.0 if inverted else 1.0, inverted)
        if kind.startswith("CosineDPM"):
            if answer != "v_prediction" or config["sigma_data"] != 1:
                raise ValueError(
                    f"{kind} is known with prediction_type=v_prediction and sigma_data=1"
                )
            return cls(VPVelocity(CosinePath(), config["sigma_max"] / (1 + config["sigma_max"])))
        if kind.startswith("EDM") or config.get("timestep_type") == "continuous":
            sigma_data = float(config.get("sigma_data", 1.0))
            bounds = float(config.get("sigma_min") or 0.002), float(config.get("sigma_max") or 80.0)
            if answer not in ("epsilon", "v_prediction"):
                raise ValueError(
                    f"{kind} has prediction_type={answer}; known are epsilon and v_prediction"
                )
            negative = answer == "v_prediction"
            return cls(EDMPrediction(sigma_data, *bounds), -1.0 if negative else 1.0)
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{kind} is not known: it is no flow matching and has no betas. Known are schedulers of flow matching, "
                "of a chain of betas (epsilon, v_prediction, sample) and of EDM"
            )
        alphas = scheduler.alphas_cumprod.double()
        path = DDPMPath(1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]]))
        last = float(path.canonical(torch.tensor(len(path.betas) - 1.0, dtype=torch.float64)))
        if answer == "epsilon" and last == 1:
            raise ValueError(
                f"{kind} has a chain that ends at pure noise, of which prediction_type=epsilon says nothing; such a "
                "network predicts v"
            )
        known = {
            "epsilon": lambda: NoisePrediction(path, last),
            "v_prediction": lambda: VPVelocity(path, last),
            "sample": lambda: DataPrediction(path, 1e-4),
        }
        if answer not in known:
            raise ValueError(f"{kind} has prediction_type={answer}; known are {', '.join(known)}")
        return cls(known[answer]())

    def formula(self) -> str:
        """What `question` and `velocity` make of one, at several times: two trainings are the same where these are."""
        t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
        one = torch.ones_like(t)
        numbers = [
            *self.question(one, t),
            self.velocity(one, 0 * one, t),
            self.velocity(0 * one, one, t),
        ]
        return " ".join(f"{number:.5g}" for number in torch.cat(numbers).tolist())

    def question(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x (M, *E) at t (M,) -> what the network gets, and what its loop calls t."""
        state, clock = self.parameterization.question(x, t)
        return state, self._scale() - clock if self.inverted else clock

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.parameterization.velocity(self.sign * output, x, t)

    def canonical(self, clock: Tensor) -> Tensor:
        """What the loop calls t -> canonical time, float64."""
        clock = self._scale() - clock.double() if self.inverted else clock.double()
        if isinstance(self.parameterization, EDMPrediction):
            sigma = (4 * clock).exp()
            return sigma / (1 + sigma)
        return self.parameterization.path.canonical(clock)

    def sigma(self, t: Tensor) -> Tensor:
        """Canonical time -> the noise level as the scheduler counts it."""
        if isinstance(self.parameterization, FlowVelocity):
            return 1 - t if self.inverted else t
        return t / (1 - t)

    def _scale(self) -> float:
        path = self.parameterization.path
        assert isinstance(path, FlowPath)
        return path.time_scale


# --------------------------------------------------------------------------------------------------------------
# The suspended call
# --------------------------------------------------------------------------------------------------------------


class _Loop(greenlet):
    """One call of a pipeline, suspended inside its loop."""

    def __init__(self, pipe: Any, training: Training, call: Mapping[str, Any], apart: bool):
        super().__init__()
        self.apart = apart
        self.thread = threading.current_thread()
        self.outputs: list[Tensor] = []  # of the network in a step, where they are kept apart
        self.pipe, self.training, self.call_arguments = pipe, training, dict(call)
        cuts = "strength" in inspect.signature(type(pipe).__call__).parameters
        self.probe = _probe(pipe.scheduler, training, cuts)
        self.output_type = {} if "output_type" in call else {"output_type": "pt"}
        self.pending: _Asked | None = None
        self.ending, self.started = False, False
        self.rows = 0.0
        self.asked: Tensor | None = (
            None  # a time in the loop's clock, () float64, and what the network heard of it
        )
        self.told: Tensor | None = None
        self.state: Tensor | None = None  # what the last step gave the loop
        self.image_start: Tensor | None = (
            None  # what the call puts noise on to begin, in its layout, then the state's
        )
        self.image: Tensor | None = (
            None  # where the loop masks after each step, what it keeps, and where
        )
        self.kept: Tensor | None = None
        self.showing = False
        self.attributes: dict[
            str, Any
        ] = {}  # what its call left on the pipeline, such as SVD's guidance of a batch
        self.denoisers = [
            part for name in DENOISERS if isinstance(part := getattr(pipe, name, None), nn.Module)
        ]

    def run(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.pipe(**self.output_type, **self.call_arguments)

    def begin(self, count: int) -> None:
        """Run up to the first answer of the network, which tells the state's shape."""
        self.started = True
        device = self.pipe._execution_device
        try:
            # Some draw without the generator that they are given; they draw the same in all calls, too.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(0)
                answered = self._resume(None)
        except ValueError as error:  # of a size, mostly
            raise ValueError(f"the call of {type(self.pipe).__name__} fails: {error}") from error
        if not isinstance(answered, _Answer):
            raise ValueError(
                f"{type(self.pipe).__name__} ended without asking its scheduler for a step"
            )
        states, self.answer = answered.sample, answered.output
        self.copies = max(
            len(states) // count, 1
        )  # DiTPipeline steps every state twice under guidance
        self.first = states[:count]
        if self.image_start is not None:
            own, found = (each.float().norm() for each in (self.image_start, states))
            if self.image_start.numel() != states.numel() or not torch.isclose(
                own, found, rtol=1e-3
            ):
                raise ValueError(
                    f"{type(self.pipe).__name__} puts noise on what is not its first state; that is not known here"
                )
            self.image_start = self.first.float()
        if not torch.equal(states, self._copied(self.first)):
            raise ValueError(
                f"{type(self.pipe).__name__} has {len(states)} states for {count} prompts; give one image a prompt"
            )

    def require_no_memory(self) -> None:
        """ValueError where the network's first answer is another one when it is asked for again."""
        sigmas = getattr(self.probe, "sigmas", self.probe.own_clock)
        first = self.probe.cut
        self.pending = _Asked(self.probe.own_clock[first], sigmas[first])
        again = self._resume(self._copied(self.first)).output
        if not bool(self.answer.isfinite().all()):
            raise ValueError(
                f"the network of {type(self.pipe).__name__} returns NaN or infinity at its first step; check its dtype"
            )
        difference, size = (each.float().norm() for each in (again - self.answer, self.answer))
        if not difference <= 1e-2 * size:
            raise ValueError(
                f"{type(self.pipe).__name__} answers the same state at the same time otherwise in its next step: its "
                "guidance has a momentum, or draws numbers, and its loop is no ODE; call it without"
            )

    def velocity(self, x: Tensor, time: float, mix: tuple[float, ...]) -> Tensor:
        """x (B, *E) at one time -> v (B, *E), or (B, R, *E) of R answers that are kept apart.

        Of a call that begins at an image, x is the state less the image's share of it, x_t - (1 - t) image, and v that
        of x: so it begins at noise alone as others do. Solvers make the same steps of both.
        """
        if self.image_start is None:
            return self._velocity(x, time, mix)
        image = self.image_start.to(x)
        answer = self._velocity(x + (1 - time) * image, time, mix)
        return answer + (image if len(mix) == 1 else image[:, None])

    def _velocity(self, x: Tensor, time: float, mix: tuple[float, ...]) -> Tensor:
        t = x.new_full((len(x),), time, dtype=torch.float64)
        question, clock = self.training.question(x, t)
        self.asked = clock = self.probe.before_its_shift(clock[0])
        self.pending, self.rows = _Asked(clock.float(), self.training.sigma(t[0]).float()), 0.0
        answered = self._resume(self._copied(question.to(self.first.dtype)))
        outputs = answered.output[None] if len(mix) == 1 else self._mixed(answered.output, mix)
        velocities = [self.training.velocity(output[: len(x)].to(x), x, t) for output in outputs]
        if self.image is not None:
            # After a step the loop puts the image, with noise on it, outside of its mask: there, x0 is the image.
            if self.kept is None:
                self.kept = self._shown()[: len(x)].to(x)
            to_image = (x - self.image[: len(x)].to(x)) / rowwise(t, x)
            velocities = [torch.lerp(velocity, to_image, self.kept) for velocity in velocities]
        return velocities[0] if len(mix) == 1 else torch.stack(velocities, dim=1)

    def parts(self, output: Tensor) -> Tensor:
        """What the network answered in this step, apart: (R, B, *E) like the pipeline's answer (B, *E) of it."""
        rows = torch.cat(self.outputs)
        if rows.ndim > 1 and rows.shape[1] == 2 * output.shape[1]:
            rows = rows.chunk(2, dim=1)[
                0
            ]  # the other half is of its variance, or of an image's tokens
        if rows.shape[1:] != output.shape[1:] or len(rows) % len(output) or self.copies > 1:
            raise ValueError(
                f"the network of {type(self.pipe).__name__} answers {tuple(rows.shape)}, of which its loop makes "
                f"{tuple(output.shape)} in a way that is not known here; call it with guidance_apart=False"
            )
        return rows.unflatten(0, (-1, len(output)))

    def _mixed(self, output: Tensor, mix: tuple[float, ...]) -> Tensor:
        """The R answers of this step, (R, B, *E), whose sum with these weights the pipeline's answer (B, *E) is."""
        parts = self.parts(output)
        if len(parts) == 1:  # outside of an interval that is guided
            return output.expand(len(mix), *output.shape)
        total = torch.einsum(
            "r,r...->...", parts.new_tensor(mix, dtype=torch.float64), parts.double()
        )
        rounding = max(1e-3, 8 * torch.finfo(output.dtype).eps)
        if (
            len(parts) != len(mix)
            or not (total - output).norm() <= rounding * output.double().norm()
        ):
            raise ValueError(
                f"the guidance of {type(self.pipe).__name__} is no sum of its network's answers with weights that are "
                "the same at all times, such as one that is rescaled; call it with guidance_apart=False"
            )
        return parts

    def finish(self, x0: Tensor) -> Any:
        """Let the loop go, with x0 as its last state; returns what the call returns."""
        self.ending = True
        if self.image_start is not None:
            x0 = x0 + self.image_start.to(x0)
        return self._resume(self._copied(x0.to(self.first.dtype)))

    def release(self) -> None:
        """End the call where it is, and what it would do last: an offloaded network leaves the GPU."""
        if self and not self.dead:
            try:
                with self._inside():
                    self.throw()
            except (error, ValueError):  # ValueError: a parent in another thread
                return  # another thread's call, which ends with its thread
        if self.started:
            self.started = False
            self.pipe.maybe_free_model_hooks()

    def _copied(self, states: Tensor) -> Tensor:
        return states if self.copies == 1 else states.repeat(self.copies, *[1] * (states.ndim - 1))

    def _shown(self) -> Tensor:
        """1 where the loop puts the image, by one more call of the network; it is not part of what a step costs."""
        rows, self.showing = self.rows, True
        shown = self._resume(self._copied(torch.zeros_like(self.first))).sample
        self.rows, self.showing = rows, False
        return shown

    def noised(self, image: Tensor) -> Tensor:
        """What the call shall have for its image with noise on it.

        Before the loop that is its first state: the image alone, which tells it in the state's layout. In the loop it
        is what goes outside of a mask: the state itself, or 1 to show where that is.
        """
        if self.state is None:
            self.image_start = image
            return image
        self.image = image
        return torch.ones_like(self.state) if self.showing else self.state

    def _resume(self, state: Tensor | None) -> Any:
        self.state = state
        self.outputs.clear()
        with self._inside(), torch.set_grad_enabled(state is not None and state.requires_grad):
            return self.switch() if state is None else self.switch(state)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """The probe in the pipeline's place of its scheduler, for as long as its call runs."""
        grad, before = torch.is_grad_enabled(), dict(self.pipe.__dict__)
        try:
            try:
                self.parent = getcurrent()
                self.pipe.__dict__ |= self.attributes
                self.pipe.__dict__ |= {
                    "scheduler": self.probe,
                    "_progress_bar_config": {"disable": True},
                }
                for part in self.denoisers:
                    part.register_forward_hook(self._count, with_kwargs=True)
                yield
            finally:
                self._restore(grad, before)
        finally:
            self._restore(grad, before)  # once more, for Ctrl-C may have come while it was done

    def _restore(self, grad: bool, before: Mapping[str, Any]) -> None:
        torch.set_grad_enabled(grad)
        for name in ("scheduler", "_progress_bar_config"):
            if name in before:
                self.pipe.__dict__[name] = before[name]
            else:
                self.pipe.__dict__.pop(name, None)
        after = self.pipe.__dict__.items()
        self.attributes |= {
            name: value for name, value in after if before.get(name, self) is not value
        }
        for part in self.denoisers:
            # Not by their handles, of which Ctrl-C may have left none.
            for number in [
                number for number, hook in part._forward_hooks.items() if hook == self._count
            ]:
                part._forward_hooks_with_kwargs.pop(number, None)
                part._forward_hooks.pop(number, None)

    def _count(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        # Z-Image's network takes a list of states.
        states = [
            x
            for x in (*args, *kwargs.values())
            if isinstance(x, list) or (isinstance(x, Tensor) and x.ndim > 1)
        ]
        if states:
            self.rows += len(states[0])
        if self.apart:
            answer = output if isinstance(output, Tensor) else output[0]
            self.outputs.append(torch.stack(answer) if isinstance(answer, list) else answer)
        name, place = _time_of(type(module))
        told = kwargs.get(name, args[place] if name and place < len(args) else None)
        if isinstance(told, Tensor) and told.numel() > 0:
            self.told = told.detach().flatten()[
                -1
            ]  # a condition's tokens, which have no noise, are the first


@functools.cache
def _time_of(network: type) -> tuple[str, int]:
    """The argument of a network's `forward` that is its time, and its place."""
    names = [*inspect.signature(network.forward).parameters][1:]
    return next(
        ((name, names.index(name)) for name in ("timestep", "timesteps", "t") if name in names),
        ("", 0),
    )


@dataclass(frozen=True)
class _Asked:
    """A time as the loop calls it, and its noise level, () float32."""

    clock: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class _Answer:
    """What the network said of its state."""

    output: Tensor
    sample: Tensor


class _Steps(Tensor):
    """A tensor that answers a loop's lookups with what a search asks for. What is computed of it is a plain tensor."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs or {})
            moved = func in (Tensor.__getitem__, Tensor.to, Tensor.clone) and isinstance(
                args[0], cls
            )
            return (
                result.as_subclass(cls)
                if moved and 2 * result.numel() > args[0].numel()
                else result
            )

    def __len__(self) -> int:
        with (
            torch._C.DisableTorchFunctionSubclass()
        ):  # ControlNets' loops ask it for each of their steps
            return self.shape[0]


class _Times(_Steps):
    """The pipeline's own times, and a loop over those that a search asks for.

    count: of its own ones, which a call with a strength asks for before it cuts the first ones off.
    """

    count: int | None = None

    def __len__(self) -> int:
        return super().__len__() if self.count is None else self.count

    def __iter__(self) -> Iterator[Tensor]:
        loop = getcurrent()
        if not isinstance(loop, _Loop):
            yield from self.as_subclass(Tensor)
            return
        loop.probe.cut = loop.probe.timesteps.numel() - self.numel()
        yield self.as_subclass(Tensor)[0]
        while not loop.ending:
            assert loop.pending is not None
            yield loop.pending.clock

    def __getitem__(self, index: Any) -> Tensor:
        asked = _pending(index)
        return super().__getitem__(index) if asked is None else asked.clock


class _Sigmas(_Steps):
    """The pipeline's own noise levels, and at a step's number that of the time that a search asks for."""

    def __getitem__(self, index: Any) -> Tensor:
        asked = _pending(index)
        return super().__getitem__(index) if asked is None else asked.sigma


def _pending(index: Any) -> _Asked | None:
    """What the loop is asked for, where it looks up one of its steps."""
    loop = getcurrent()
    return loop.pending if isinstance(loop, _Loop) and isinstance(index, int) else None


class _Probe:
    """Mixed into a copy of the pipeline's scheduler."""

    training: Training
    config: Mapping[str, Any]
    order: int
    own_clock: Tensor
    clock_shift: float = (
        1.0  # between the loop's clock and the noise level, which CogView4 shifts alone
    )
    cut: int = 0  # how many of its times the call leaves out, as image-to-image does
    by_length: bool = False  # and that by how many there are, not by how many it asked for

    def scale_model_input(self, sample: Tensor, *_: Any, **__: Any) -> Tensor:
        return sample

    @property
    def init_noise_sigma(self) -> float:
        t = self.own_times()[:1]
        return float(self.training.question(t, t)[0])

    def own_times(self) -> Tensor:
        """Canonical times of the steps, (N,) float64. Those of a flow begin at 1: its first state is pure noise."""
        times, levels = self.canonical(self.own_clock), getattr(self, "sigmas", None)
        flow = isinstance(self.training.parameterization, FlowVelocity)
        if not self.own_clock.is_floating_point() and isinstance(levels, Tensor):
            # Multistep solvers tell the network whole numbers, of which some are the same, and step by their sigmas.
            levels = levels.as_subclass(Tensor)[: len(self.own_clock)].double()
            times = self.training.sigma(levels) if flow else levels / (1 + levels)
        if flow:
            times = torch.where(times > 0.999, 1.0, times)
        # Those between are of methods of second order.
        distinct = torch.unique_consecutive(times[self.cut :: self.order])
        return distinct[distinct > 0].cpu()

    def canonical(self, clock: Tensor) -> Tensor:
        """What the loop calls t -> canonical time, float64."""
        t = self.training.canonical(clock)
        return self.clock_shift * t / (1 + (self.clock_shift - 1) * t)

    def before_its_shift(self, clock: Tensor) -> Tensor:
        """What a network of this time would be told -> what this loop calls it."""
        if self.clock_shift == 1:
            return clock
        return clock / (
            self.clock_shift - (self.clock_shift - 1) * clock / self.config["num_train_timesteps"]
        )

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self._noised(original_samples)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        return self._noised(sample)

    @staticmethod
    def _noised(image: Tensor) -> Tensor:
        loop = getcurrent()
        assert isinstance(loop, _Loop)
        return loop.noised(image)


def _probe(scheduler: Any, training: Training, cuts: bool) -> Any:
    """A copy of the scheduler that asks the search for its steps, of a class that pipelines take for its own.

    cuts: the call has a strength, which cuts its first steps off.
    """
    own = type(scheduler)

    @functools.wraps(own.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        own.set_timesteps(self, *args, **kwargs)
        self.own_clock = self.timesteps.clone()
        self.by_length = not args and kwargs.get("num_inference_steps") is None
        self.clock_shift = _shift(self)
        padding = self.timesteps[-1:].expand(LENGTH)
        self.timesteps = torch.cat([self.timesteps, padding]).as_subclass(_Times)
        if cuts:
            self.timesteps.count = len(self.own_clock)
        if isinstance(getattr(self, "sigmas", None), Tensor):
            self.sigmas = self.sigmas.as_subclass(_Sigmas)

    asked = inspect.signature(own.step)

    @functools.wraps(own.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = asked.bind(self, *args, **kwargs)
        given.apply_defaults()
        output, sample = given.arguments["model_output"], given.arguments["sample"]
        if output.shape[1] == 2 * sample.shape[1] and "learned" in str(
            self.config.get("variance_type")
        ):
            output = output.chunk(2, dim=1)[0]
        loop = getcurrent()
        assert isinstance(loop, _Loop)
        assert loop.parent is not None
        state = loop.parent.switch(_Answer(output, sample))
        whole = given.arguments.get("return_dict", True)
        return (
            SimpleNamespace(prev_sample=state, pred_original_sample=state)
            if whole
            else (state, state)
        )

    members = {"set_timesteps": set_timesteps, "step": step, "training": training}
    probe = copy.deepcopy(scheduler)
    probe.__class__ = type(own.__name__, (_Probe, own), members)
    return probe


def _shift(scheduler: Any) -> float:
    """The s of sigma = s t / (1 + (s - 1) t) between the times t that a flow's network is told and its noise levels."""
    count, scale = len(scheduler.timesteps), scheduler.config["num_train_timesteps"]
    sigmas = getattr(scheduler, "sigmas", None)
    if not isinstance(scheduler.training.parameterization, FlowVelocity) or not isinstance(
        sigmas, Tensor
    ):
        return 1.0
    t, sigma = scheduler.timesteps.double() / scale, sigmas[:count].double()
    if torch.allclose(t, sigma, rtol=0, atol=1.01 / scale):
        return 1.0
    shift = float((sigma * (1 - t) / (t * (1 - sigma)))[(t > 0) & (t < 1)].median())
    if not torch.allclose(shift * t / (1 + (shift - 1) * t), sigma, rtol=0, atol=1e-4):
        raise ValueError(
            "the pipeline tells its network other times than its noise levels; that is not known here"
        )
    return shift


def is_pipeline(value: Any) -> bool:
    """Whether a value is a pipeline of diffusers, which is not imported for it."""
    return any(kind.__name__ == "DiffusionPipeline" for kind in type(value).__mro__)


def _weights(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All weights and buffers that a part saves, as plain tensors: those of quantised and of offloaded ones, too."""
    offloaded = {}
    for name, module in part.named_modules():
        if kept := getattr(getattr(module, "_hf_hook", None), "weights_map", None):
            offloaded |= {
                f"{name}.{key}".lstrip("."): kept[key] for key in module.state_dict() if key in kept
            }
    for name, value in part.state_dict().items():
        if value is not None and isinstance(value, Tensor):
            value = offloaded.get(name, value)
            parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
            yield from [(f"{name}.{each}", getattr(value, each)) for each in parts] or [
                (name, value)
            ]


def _some_bits(weight: Tensor) -> bytes:
    """1,024 of a tensor's numbers, or all where it has fewer."""
    places = torch.linspace(
        0, weight.numel() - 1, min(weight.numel(), 1024), dtype=torch.float64
    ).long()
    numbers = (
        weight.detach().flatten()[places.to(weight.device)] if weight.element_size() > 1 else None
    )
    if numbers is None:  # of a byte each, as float8 has no indices on some devices
        numbers = weight.detach().flatten().view(torch.uint8)[places.to(weight.device)]
    return numbers.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _release(suspended: dict[tuple[int, ...], _Loop]) -> None:
    for loop in suspended.values():
        loop.release()
    suspended.clear()


def _calls(
    times: Sequence[float], samples: Sequence[int]
) -> list[tuple[tuple[int, ...], list[int]]]:
    """Each call's samples and rows: rows of one time, a sample at most once, in the samples' order."""
    seen: Counter[tuple[float, int]] = Counter()
    calls: dict[tuple[float, int], list[int]] = {}
    for row, asked in enumerate(zip(times, samples, strict=True)):
        calls.setdefault((asked[0], seen[asked]), []).append(row)
        seen[asked] += 1
    ordered = [sorted(rows, key=samples.__getitem__) for rows in calls.values()]
    return [(tuple(samples[row] for row in rows), rows) for rows in ordered]


def decoded(output: Any) -> Tensor:
    """What a pipeline returned -> its tensors, float32.

    Images (B, C, H, W) and videos (B, C, F, H, W) are in [0, 1]. Waveforms (B, channels, samples) are as they are,
    full scale being -1 to 1, and their PSNR, 10 log10(1 / MSE), is against full scale.
    """
    for name in ("images", "frames", "audios"):
        if (found := getattr(output, name, None)) is not None:
            break
    else:
        raise ValueError(f"{type(output).__name__} has no images, frames or audios")
    if not isinstance(found, Tensor):
        raise ValueError("the pipeline returns no tensors; it needs output_type='pt'")
    return found.movedim(1, 2).float() if found.ndim == 5 else found.float()
