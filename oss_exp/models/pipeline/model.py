"""A pipeline of diffusers as a `Model`: the public side of this folder.

Calls of the pipeline stay suspended between velocities, so that prompts are encoded once.

Legend: B samples, each with its prompt; M rows, a multiple of B; R outputs of a guided call; *E a
state's dims, as the scheduler sees it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from oss_exp.checks import require_choice
from oss_exp.models.base import Model
from oss_exp.models.guidance import Guidance
from oss_exp.models.network import Dtype
from oss_exp.models.pipeline.arguments import call_parameters, check_call, check_pipeline
from oss_exp.models.pipeline.calls import SuspendedCalls, group_rows
from oss_exp.models.pipeline.convention import NetworkConvention
from oss_exp.models.pipeline.fingerprint import pipeline_fingerprint
from oss_exp.models.pipeline.loop import DENOISERS
from oss_exp.models.pipeline.pretrained import load, open_images, with_images
from oss_exp.models.pipeline.quantization import Quantization, cast_to_float8
from oss_exp.noise import NoiseSchedule
from oss_exp.velocity import BoundVelocity

MAX_STEPS_RATIO = 50  # called steps per step that strength leaves: it is 2 % or more


class Pipeline(Model):
    """A pipeline of diffusers behind canonical time. A condition is a prompt's number.

    Args:
        pipe: The pipeline as it will be used: its dtype, offloading, adapters and quantised weights
            count.
        prompts: What conditions number: texts, or the classes or images that a pipeline without
            texts takes.
        guidance_apart: Return a call's conditional and unconditional outputs apart, so that fitted
            steps (`OSSFit`) can weigh them separately. Such steps run here, not in the pipeline.
        **call: All other arguments of its `__call__`, such as `height` or `guidance_scale`. A list
            as long as `prompts`, of something that belongs to a sample (`negative_prompt`,
            `image`, ...), has one entry for each.

    Raises:
        ValueError: For a pipeline whose loop is not one of a known ODE, and for a call that a
            search cannot make.
    """

    num_classes = None

    def __init__(
        self, pipe: Any, prompts: Sequence[Any], *, guidance_apart: bool = False, **call: Any
    ):
        super().__init__()
        kind = type(pipe)

        # Checks.
        check_pipeline(pipe)
        check_call(kind, prompts, call)

        # The pipeline.
        self.pipe = pipe
        self.prompts = list(prompts)
        self.call = call
        self.convention = NetworkConvention.from_scheduler(pipe.scheduler)
        self.path = self.convention.parameterization.path
        self.name = kind.__name__
        self.guidance = Guidance()  # the pipeline applies its own
        self.guidance_apart = guidance_apart
        _check_caches(pipe)
        place = torch.empty(0, device=pipe._execution_device)
        self.register_buffer("place", place, persistent=False)

        # Its calls, and what they reveal: costs and clocks by canonical time.
        self.calls = SuspendedCalls(pipe, self.convention, self.prompts, call, guidance_apart)
        weakref.finalize(self, self.calls.release)
        self.strength = self.calls.strength
        self._row_costs: dict[float, float] = {}
        self._clocks: dict[float, tuple[Tensor, float]] = {}
        self._canonical = self.convention.canonical
        self._inference_steps: dict[int, tuple[int, Any]] = {}

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
        """Load a pipeline of diffusers from its folder or its hub id. No code in it is run.

        Args:
            pipeline: Folder or hub id.
            prompts: Texts; for a pipeline without texts, files of images.
            pipeline_class: Class of diffusers; None for the folder's own.
            dtype: Type of all parts, or by part, with `default` for the others.
            call: Other arguments of its call, such as height; files stand for images.
            loras: Files or hub ids, in order.
            quantization: How to quantise the denoisers' weights.
            offload: Keep the parts in host memory, and one at a time on the GPU.
            size: `tiny` builds small random parts in float32, calls them at a small size, and
                makes up the images that are missing.
            name: Name in tables and files; None for the class's.

        Raises:
            ValueError: For a class, scheduler or argument that is not known.
            FileNotFoundError: For a missing folder, hub id or file.
        """
        require_choice(("full", "tiny"), size=size)
        if size == "tiny" and quantization not in (None, "float8"):
            raise ValueError(
                f"quantization={quantization} works while weights are loaded, "
                "and size=tiny loads none"
            )

        # The pipeline.
        call = with_images(call or {})
        random_images: list[Any] = []
        if size == "tiny":
            from oss_exp.models.tiny import pictures, tiny

            pipe, call = tiny(pipeline_class, call)
            random_images = pictures(len(prompts))
        else:
            pipe = load(pipeline, pipeline_class, dtype, call, quantization, DENOISERS)

        # Its weights.
        for lora in loras:
            pipe.load_lora_weights(str(lora))
        if quantization == "float8":
            cast_to_float8(pipe, DENOISERS)
        if offload:
            pipe.enable_model_cpu_offload()

        # Images in the place of prompts.
        if {"prompt", "class_labels"}.isdisjoint(call_parameters(type(pipe))):
            made_up = random_images and not Path(prompts[0]).is_file()
            prompts = random_images if made_up else open_images(list(prompts))
        model = cls(pipe, prompts, **call)
        model.name = f"{name or model.name}{'_tiny' if size == 'tiny' else ''}"
        return model

    def _apply(self, fn: Any, recurse: bool = True) -> Pipeline:
        """Move the pipeline with the model. Parts in host memory get another GPU to run on."""
        super()._apply(fn, recurse)
        device = self.place.device
        if device == self.pipe._execution_device:
            return self

        self.release()
        if not getattr(self.pipe, "_all_hooks", []):
            self.pipe.to(device)
        elif device.type != "cpu":
            self.pipe.enable_model_cpu_offload(device=device)
        return self

    # The contract of a model.

    @functools.cached_property
    def event_shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        loop = self.calls.begin([0])
        try:
            return tuple(loop.first_state.shape[1:])
        finally:
            loop.release()

    @functools.cached_property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """SHA-256 of the weights, the adapters and their scales, and the network's convention."""
        has_images = False
        for name, value in self.call.items():
            has_images |= name.endswith("image") and value is not None
        formula = self.convention.formula()
        return pipeline_fingerprint(self.pipe.components, has_images, formula)

    @property
    def row_costs(self) -> dict[float, float]:
        return self._row_costs

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The times at which the pipeline itself would step."""
        return PipelineSchedule().bind(self)

    def velocity(self, condition: Tensor | None, guidance: Guidance | None = None) -> BoundVelocity:
        """Bind the numbers (B,) of prompts; None for all of them.

        Raises ValueError for a guidance, as a pipeline applies its own.
        """
        if guidance not in (None, Guidance()):
            raise ValueError("a pipeline guides itself: give Pipeline its guidance_scale")
        condition = torch.arange(len(self.prompts)) if condition is None else condition
        return _PipelineVelocity(
            fn=self._velocity, condition=condition, mix=self.mix, rows=self._row_costs
        )

    @functools.cached_property
    def mix(self) -> tuple[float, ...]:
        """The weights whose sum of a call's outputs is the pipeline's; (1,) if they stay together.

        Raises ValueError for a pipeline without guidance, or whose guidance is no such sum.
        """
        if not self.guidance_apart:
            return (1.0,)

        loop = self.calls.begin([0])
        try:
            parts = loop.outputs_apart(loop.first_output)
            if len(parts) == 1:
                raise ValueError(
                    f"{self.name} asks its network once for a sample; "
                    "call it with guidance_apart=False"
                )
            mix = _mixing_weights(parts.double(), loop.first_output.double())
        finally:
            loop.release()

        self.guidance = Guidance(max(mix))
        return mix

    def decode(self, x0: Tensor, condition: Tensor | None = None) -> Tensor:
        """Decode x0 (B, *E) by the pipeline itself: to pixels in [0, 1], or to waveforms.

        A call ends with x0. If the pipeline pastes an image in at its end, as image-to-video does
        with the first frame, then it is the image of the call's samples.

        Args:
            x0: Clean samples.
            condition: The numbers (B,) of their prompts; None for those of the latest suspended
                call of B samples.

        Returns:
            Images (B, C, H, W), videos (B, C, F, H, W) or waveforms (B, channels, samples).
        """
        samples = self.calls.latest_of_size(len(x0))
        if condition is not None:
            samples = tuple(condition.tolist())
        loop = self.calls.resume(samples)
        self.calls.loops.pop(samples)
        try:
            return decoded(loop.finish(x0))
        except BaseException:
            loop.release()
            raise

    def native(self, times: Tensor) -> dict[str, Any]:
        """Return a schedule's times in the network's clock, and how to call the pipeline for them.

        For a call that begins at an image, this includes the number of steps to call it with, and
        how many of them strength cuts off.
        """
        record = super().native(times)
        rounding = self.rounding(times)
        if rounding is not None:
            record["rounding"] = rounding

        # The first call tells whether it begins at an image, and the event shape needs one.
        if not (self.event_shape and self.calls.begin_at_image):
            return record

        num_steps = times.shape[-1] - 1
        inference_steps, probe = self.inference_steps(num_steps)
        if probe.by_length:  # the cut depends on the number of times alone
            inference_steps = num_steps
        else:
            inference_steps, probe = self._first_runnable(num_steps)
        record["strength"] = self.strength
        record["num_inference_steps"] = inference_steps
        record["begin_index"] = probe.cut // probe.order
        return record

    # Clocks and steps.

    def rounding(self, times: Tensor) -> float | None:
        """Return how far the pipeline's rounding of its clock moves these times at most.

        Pipelines round to whole numbers or to their dtype. None if the network was not evaluated
        at these times, or if the number that it received is not known to be a time.
        """
        # Times as the loop counts them, and as the network received them.
        pairs = []
        for t in times.flatten().tolist():
            if t in self._clocks:
                pairs.append(self._clocks[t])
        if not pairs:
            return None
        clock = torch.stack([loop_clock for loop_clock, _ in pairs])
        received = torch.tensor([network_clock for _, network_clock in pairs]).double()

        # Networks may receive a share of the clock, or its complement.
        scale = float(self.pipe.scheduler.config.get("num_train_timesteps") or 1)
        readings = (received, received * scale, scale - received, scale - received * scale)
        errors = [float((reading - clock).abs().max()) for reading in readings]
        error = min(errors)
        if error > 0.02 * scale:
            return None

        rounded = readings[errors.index(error)]
        return float((self._canonical(rounded) - self._canonical(clock)).abs().max())

    def inference_steps(self, num_steps: int) -> tuple[int, Any]:
        """Return the least `num_inference_steps` of which strength leaves this number of steps.

        Returns:
            That number, and the scheduler of a call with it.

        Raises:
            ValueError: If there is none.
        """
        if num_steps in self._inference_steps:
            return self._inference_steps[num_steps]
        candidate = max(num_steps, int((num_steps - 1) / self.strength))
        while candidate <= MAX_STEPS_RATIO * num_steps:
            candidate, probe = self._first_runnable(candidate)
            missing = num_steps - len(probe.own_times())
            if missing == 0 or self.strength == 1:
                self._inference_steps[num_steps] = candidate, probe
                return candidate, probe
            candidate += max(missing, 1)
        raise ValueError(f"{self.name} makes no {num_steps} steps with strength={self.strength}")

    def _first_runnable(self, candidate: int) -> tuple[int, Any]:
        """Return the first number of steps from `candidate` on that runs, and its scheduler.

        A call fails if strength leaves it no step.
        """
        while True:
            try:
                loop = self.calls.begin([0], num_inference_steps=candidate)
            except (ValueError, IndexError):
                if candidate * self.strength >= 1:
                    raise
                candidate += 1
                continue
            loop.release()
            return candidate, loop.probe

    # Velocities.

    def release(self) -> None:
        """End all suspended calls. This also happens when the model is no longer in use."""
        self.calls.release()

    def _velocity(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """Return v (M, *E), or its R outputs apart (M, R, *E)."""
        assert condition is not None
        times = t.tolist()
        outputs = () if len(self.mix) == 1 else (len(self.mix),)
        velocity = x.new_empty((len(x), *outputs, *x.shape[1:]))

        for samples, rows in group_rows(times, condition.tolist()):
            # One call of the network.
            time = times[rows[0]]
            loop = self.calls.resume(samples)
            covers_all = rows == [*range(len(x))]
            try:
                part = loop.velocity(x if covers_all else x[rows], time, self.mix)
            except BaseException:
                self.calls.loops.pop(samples).release()
                raise

            # Its cost and its clock.
            self._row_costs[time] = loop.rows / len(rows)
            if time not in self._clocks and loop.network_clock is not None:
                assert loop.loop_clock is not None
                self._clocks[time] = loop.loop_clock.cpu(), float(loop.network_clock)
                self._canonical = loop.probe.canonical

            if covers_all:
                return part
            velocity[rows] = part
        return velocity


@dataclass(frozen=True, eq=False)
class _PipelineVelocity(BoundVelocity):
    """A bound velocity with the measured cost of a row at every time evaluated so far."""

    rows: Mapping[float, float] = field(default_factory=dict)

    def rows_at(self, t: Tensor) -> Tensor:
        latest = [1.0, *self.rows.values()][-1]
        costs = [self.rows.get(time, latest) for time in t.flatten().tolist()]
        return torch.tensor(costs).reshape(t.shape)


@dataclass(frozen=True, eq=False)
class PipelineSchedule(NoiseSchedule):
    """The times at which a pipeline itself steps, for any number of steps."""

    pipeline: Pipeline | None = field(default=None, init=False, repr=False)

    def bind(self, model: Model) -> PipelineSchedule:
        """Return the schedule of this pipeline. Raises ValueError for another model."""
        if not isinstance(model, Pipeline):
            raise ValueError(
                f"model={model.name} is no pipeline, and has no times of its own; "
                "choose a noise_schedule"
            )
        bound = PipelineSchedule()
        object.__setattr__(bound, "pipeline", model)
        return bound

    def _times(self, num_steps: int) -> Tensor:
        if self.pipeline is None:
            raise ValueError("PipelineSchedule is bound to no pipeline yet")
        _, probe = self.pipeline.inference_steps(num_steps)
        return probe.own_times()


def decoded(output: Any) -> Tensor:
    """Return the tensors of a pipeline's output, float32.

    Images (B, C, H, W) and videos (B, C, F, H, W) are in [0, 1]. Waveforms (B, channels, samples)
    keep their full scale of -1 to 1, and their PSNR, 10 log10(1 / MSE), refers to it.

    Raises:
        ValueError: If the output has none of these, or not as tensors.
    """
    for name in ("images", "frames", "audios"):
        value = getattr(output, name, None)
        if value is not None:
            break
    else:
        raise ValueError(f"{type(output).__name__} has no images, frames or audios")
    if not isinstance(value, Tensor):
        raise ValueError("the pipeline returns no tensors; it needs output_type='pt'")
    return value.movedim(1, 2).float() if value.ndim == 5 else value.float()


def _check_caches(pipe: Any) -> None:
    """Raise ValueError if a network reuses outputs of the step before."""
    for name in DENOISERS:
        if getattr(getattr(pipe, name, None), "is_cache_enabled", False):
            raise ValueError(
                f"the {name} of {type(pipe).__name__} has a cache, which answers from the step "
                f"before; search without it (pipe.{name}.disable_cache()), and enable it afterwards"
            )


def _mixing_weights(parts: Tensor, output: Tensor) -> tuple[float, ...]:
    """Return the weights of the parts (R, B, *E) whose sum is nearest to output, with total 1."""
    first, *others = parts
    differences = [(other - first).flatten() for other in others]
    basis = torch.stack(differences, dim=1).cpu()
    target = (output - first).flatten()[:, None].cpu()
    weights = torch.linalg.lstsq(basis, target).solution[:, 0].tolist()
    return (1 - sum(weights), *weights)
