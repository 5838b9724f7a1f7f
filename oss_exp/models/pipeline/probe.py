"""The scheduler that asks a search for every step: a probe in the place of the pipeline's own.

The probe is a copy of the pipeline's scheduler, of a subclass, because pipelines check the class
and read its configuration. Its times and noise levels are tensors that answer the loop's lookups
with what the search requests.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from oss_exp.models.parameterization import FlowVelocity
from oss_exp.models.pipeline.convention import NetworkConvention

LENGTH = 100_000  # number of steps that a suspended loop counts on


@dataclass(frozen=True)
class Request:
    """The next time of the loop in its own clock, and its noise level; both () float32."""

    clock: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class Reply:
    """The network's output, and the state that the loop evaluated it at."""

    output: Tensor
    state: Tensor


class Driver(greenlet):
    """A greenlet that runs a pipeline's call, as the probe sees it.

    Attributes:
        probe: The scheduler in the pipeline.
        pending: The time that the search requests; None before the first request.
        ending: The loop may go on to its end.
    """

    probe: Any
    pending: Request | None = None
    ending: bool = False

    def noised(self, image: Tensor) -> Tensor:
        """Return what the call takes for its image with noise on it."""
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------
# Times and noise levels
# ------------------------------------------------------------------------------------------------


class _Steps(Tensor):
    """A tensor that answers a loop's lookups with a search's requests.

    Indexing, `to` and `clone` keep the type as long as most of the steps remain. Everything else
    that is computed from it is a plain tensor.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs or {})
            copies = func in (Tensor.__getitem__, Tensor.to, Tensor.clone)
            if not copies or not isinstance(args[0], cls):
                return result
            return result.as_subclass(cls) if 2 * result.numel() > args[0].numel() else result

    def __len__(self) -> int:
        # The loops of ControlNets need the length at every step.
        with torch._C.DisableTorchFunctionSubclass():
            return self.shape[0]


class _Times(_Steps):
    """The pipeline's own times, whose iteration yields the times that a search requests.

    Attributes:
        count: Number of the pipeline's own times; a call with a strength reads it before it cuts
            off the first ones. None for calls without a strength.
    """

    count: int | None = None

    def __len__(self) -> int:
        return super().__len__() if self.count is None else self.count

    def __iter__(self) -> Iterator[Tensor]:
        driver = current_driver()
        if driver is None:
            yield from self.as_subclass(Tensor)
            return
        driver.probe.cut = driver.probe.timesteps.numel() - self.numel()
        yield self.as_subclass(Tensor)[0]
        while not driver.ending:
            assert driver.pending is not None
            yield driver.pending.clock

    def __getitem__(self, index: Any) -> Tensor:
        request = _requested(index)
        return super().__getitem__(index) if request is None else request.clock


class _Sigmas(_Steps):
    """The pipeline's own noise levels; at a step's number, that of the requested time."""

    def __getitem__(self, index: Any) -> Tensor:
        request = _requested(index)
        return super().__getitem__(index) if request is None else request.sigma


def current_driver() -> Driver | None:
    """Return the driver of the call that is running, or None outside of a driven call."""
    current = getcurrent()
    return current if isinstance(current, Driver) else None


def _requested(index: Any) -> Request | None:
    """Return the pending request, if a driven loop looks up one of its steps by number."""
    driver = current_driver()
    return driver.pending if driver is not None and isinstance(index, int) else None


# ------------------------------------------------------------------------------------------------
# The scheduler
# ------------------------------------------------------------------------------------------------


class _Probe:
    """Methods that a probe has in place of those of its scheduler's class.

    Attributes:
        own_clock: The scheduler's own times, in the loop's clock.
        clock_shift: The shift between the loop's clock and the noise level; CogView4 alone shifts
            them apart.
        cut: Number of own times that the call leaves out at the beginning, as image-to-image does.
        by_length: The call cuts by the number of times, not by the number that it was called with.
    """

    convention: NetworkConvention
    config: Mapping[str, Any]
    order: int
    own_clock: Tensor
    clock_shift: float = 1.0
    cut: int = 0
    by_length: bool = False

    def scale_model_input(self, sample: Tensor, *_: Any, **__: Any) -> Tensor:
        return sample

    @property
    def init_noise_sigma(self) -> float:
        t = self.own_times()[:1]
        return float(self.convention.network_input(t, t)[0])

    def own_times(self) -> Tensor:
        """Return the canonical times of the scheduler's own steps, (N,) float64.

        Those of a flow begin at 1, as its first state is pure noise.
        """
        times = self.canonical(self.own_clock)
        levels = getattr(self, "sigmas", None)
        is_flow = isinstance(self.convention.parameterization, FlowVelocity)
        if not self.own_clock.is_floating_point() and isinstance(levels, Tensor):
            # Multistep solvers pass whole numbers to the network, some of them twice, and step by
            # their sigmas.
            levels = levels.as_subclass(Tensor)[: len(self.own_clock)].double()
            times = self.convention.sigma(levels) if is_flow else levels / (1 + levels)
        if is_flow:
            times = torch.where(times > 0.999, 1.0, times)

        # Methods of second order have intermediate times.
        distinct = torch.unique_consecutive(times[self.cut :: self.order])
        return distinct[distinct > 0].cpu()

    def canonical(self, clock: Tensor) -> Tensor:
        """Return the canonical time of a time in the loop's clock, float64."""
        t = self.convention.canonical(clock)
        return self.clock_shift * t / (1 + (self.clock_shift - 1) * t)

    def before_shift(self, clock: Tensor) -> Tensor:
        """Return the loop's time whose shifted noise level has this time in the network's clock."""
        if self.clock_shift == 1:
            return clock
        scale = self.config["num_train_timesteps"]
        return clock / (self.clock_shift - (self.clock_shift - 1) * clock / scale)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self._noised(original_samples)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        return self._noised(sample)

    @staticmethod
    def _noised(image: Tensor) -> Tensor:
        driver = current_driver()
        assert driver is not None
        return driver.noised(image)


def make_probe(scheduler: Any, convention: NetworkConvention, cuts: bool) -> Any:
    """Return a copy of a scheduler that asks the search for its steps.

    Its class is a subclass of the scheduler's, so pipelines accept it.

    Args:
        scheduler: The pipeline's own scheduler.
        convention: How its network was trained.
        cuts: The call has a strength, which cuts its first steps off.
    """
    base = type(scheduler)
    members = {
        "set_timesteps": _set_timesteps(base, cuts),
        "step": _step(base),
        "convention": convention,
    }
    probe = copy.deepcopy(scheduler)
    probe.__class__ = type(base.__name__, (_Probe, base), members)
    return probe


def _set_timesteps(base: Any, cuts: bool) -> Any:
    """Return a `set_timesteps` that stores the scheduler's own times, and makes room for more."""

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        base.set_timesteps(self, *args, **kwargs)
        self.own_clock = self.timesteps.clone()
        self.by_length = not args and kwargs.get("num_inference_steps") is None
        self.clock_shift = _clock_shift(self)

        # Times and noise levels that answer with requests.
        padding = self.timesteps[-1:].expand(LENGTH)
        self.timesteps = torch.cat([self.timesteps, padding]).as_subclass(_Times)
        if cuts:
            self.timesteps.count = len(self.own_clock)
        if isinstance(getattr(self, "sigmas", None), Tensor):
            self.sigmas = self.sigmas.as_subclass(_Sigmas)

    return set_timesteps


def _step(base: Any) -> Any:
    """Return a `step` that hands the network's output to the search, and waits for a state."""
    signature = inspect.signature(base.step)

    @functools.wraps(base.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        output = bound.arguments["model_output"]
        sample = bound.arguments["sample"]

        # A learned variance is the second half of the output.
        learned = "learned" in str(self.config.get("variance_type"))
        if output.shape[1] == 2 * sample.shape[1] and learned:
            output = output.chunk(2, dim=1)[0]

        # Suspended until the search sends the next state.
        driver = current_driver()
        assert driver is not None
        assert driver.parent is not None
        state = driver.parent.switch(Reply(output, sample))
        if bound.arguments.get("return_dict", True):
            return SimpleNamespace(prev_sample=state, pred_original_sample=state)
        return state, state

    return step


def _clock_shift(scheduler: Any) -> float:
    """Return the s of sigma = s t / (1 + (s - 1) t) between a flow's noise levels and its clock.

    Raises ValueError if the two are related otherwise.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    is_flow = isinstance(scheduler.convention.parameterization, FlowVelocity)
    if not is_flow or not isinstance(sigmas, Tensor):
        return 1.0

    # The same up to rounding. Multistep schedulers keep their sigmas in host memory.
    scale = scheduler.config["num_train_timesteps"]
    t = scheduler.timesteps.double().cpu() / scale
    sigma = sigmas[: len(t)].double().cpu()
    if torch.allclose(t, sigma, rtol=0, atol=1.01 / scale):
        return 1.0

    # Shifted.
    inside = (t > 0) & (t < 1)
    shift = float((sigma * (1 - t) / (t * (1 - sigma)))[inside].median())
    if not torch.allclose(shift * t / (1 + (shift - 1) * t), sigma, rtol=0, atol=1e-4):
        raise ValueError(
            "the pipeline tells its network other times than its noise levels; "
            "that is not known here"
        )
    return shift
