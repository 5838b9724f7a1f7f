"""Step schedules for the schedulers of diffusers: arguments with which one runs exactly the times of a schedule."""

from __future__ import annotations

import inspect
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue, TypeAdapter
from torch import Tensor

from oss_exp.checks import require_range
from oss_exp.export.base import Exporter
from oss_exp.export.samplers import Network, network_of, states_of, steps_of, words
from oss_exp.export.sigmas import flow_sigmas, ratio_sigmas
from oss_exp.files import load_record, write_atomically
from oss_exp.noise import EDMPath, flux_shift, shift_time
from oss_exp.schedule import StepSchedule
from oss_exp.scheduler_config import read_scheduler_config
from oss_exp.solvers import Solver

TOLERANCE = 2e-6  # of times: diffusers counts in float32, and its UniPC begins at 1 - 1e-6
STEP_TOLERANCE = 2e-3  # of what the steps add up to, in float32 at sigmas of up to 4096
OWN_TIMES = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
    *("shift_terminal", "sigma_schedule"),
)
BY_SIZE = re.compile(r"Flux(?!2)|Chroma|QwenImage(?!Layered|21)|StableDiffusion3|ZImage")
"""Pipelines that compute mu from the picture's tokens of 16 x 16 pixels, linearly, by their scheduler's constants."""


SEQUENCES = {"base_image_seq_len": "base_tokens", "max_image_seq_len": "max_tokens"}


@dataclass(frozen=True)
class Diffusers(Exporter):
    """The arguments of a pipeline's call, tried on the scheduler that they are for.

    scheduler:     a scheduler_config.json, the folder of a pipeline, or the name of a class of diffusers.
    mu:            of a scheduler with use_dynamic_shifting.
    height, width: pixels, both in place of mu, which FLUX's and some other pipelines compute from them.
    """

    scheduler: str | None = None
    mu: float | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None):
            raise ValueError(
                "task.exporter.height and task.exporter.width belong together; give both, or neither"
            )
        require_range(at_least=-10, at_most=10, mu=self.mu)
        if self.mu is not None and self.height is not None:
            raise ValueError(
                "task.exporter.height and task.exporter.width stand for task.exporter.mu; give either"
            )

    def write(self, steps: StepSchedule, path: Path) -> str:
        scheduler = self.own_scheduler()
        call = diffusers_call(steps, scheduler, self._own_mu(scheduler))
        plain = {
            key: [*map(float, v)] if key == "sigmas" else v for key, v in call.arguments.items()
        }
        record = {"scheduler": type(scheduler).__name__, **plain}
        record["runs"] = {"network": call.network, "sigmas": call.sigmas}
        write_atomically(path, json.dumps(record, indent=2) + "\n")

        shown = {**plain, "sigmas": f"{call.wrapper}({plain['sigmas']})"} if call.wrapper else plain
        advice = f"pipe(..., {', '.join(f'{key}={value}' for key, value in shown.items() if key != 'mu')})"
        if abs(call.noise - 1) > 5e-3:
            advice += f"\nGive it latents=noise * {call.noise:.6g}, for the search began with other noise than it does."
        return advice

    def _own_mu(self, scheduler: Any) -> float | None:
        """Return mu, computed as the pipeline does it where the picture's size is given."""
        if self.height is None or self.width is None:
            return self.mu
        pipeline = self._pipeline()
        if pipeline is not None and not BY_SIZE.match(pipeline):
            raise ValueError(
                f"{pipeline} does not compute mu from height and width as FLUX's pipeline does; set task.exporter.mu "
                "to what it gives its scheduler"
            )
        given = {key: scheduler.config.get(key) for key in ("base_shift", "max_shift", *SEQUENCES)}
        constants = {
            SEQUENCES.get(key, key): value for key, value in given.items() if value is not None
        }
        return math.log(flux_shift(self.height, self.width, **constants))

    def _pipeline(self) -> str | None:
        """Return the class of the pipeline in whose folder the scheduler is, None where there is none."""
        for folder in list(Path(str(self.scheduler), "_").parents)[:3]:
            if (folder / "model_index.json").is_file():
                index = load_record(
                    folder / "model_index.json",
                    TypeAdapter(dict[str, JsonValue]),
                    "pipeline",
                    "get it again",
                )
                return str(index.get("_class_name"))
        return None

    def own_scheduler(self) -> Any:
        """Return a scheduler of diffusers as `scheduler` names it. ValueError where it names none."""
        import diffusers
        from diffusers.configuration_utils import ConfigMixin
        from diffusers.schedulers.scheduling_utils import SchedulerMixin

        if self.scheduler is None:
            raise ValueError(
                "exporter=diffusers needs task.exporter.scheduler: a scheduler_config.json, the folder of a pipeline, "
                "or a class such as FlowMatchEulerDiscreteScheduler"
            )
        name, config, path = self.scheduler, {}, Path(self.scheduler)
        if path.exists():
            folder = next(
                (place for place in (path / "scheduler", path) if place.is_dir()), path.parent
            )
            file = path if path.is_file() else folder / "scheduler_config.json"
            config = read_scheduler_config(file)
            name = config.get("_class_name")
        kind = getattr(diffusers, str(name), None)
        if not (
            isinstance(kind, type)
            and issubclass(kind, SchedulerMixin)
            and issubclass(kind, ConfigMixin)
        ):
            raise ValueError(
                f"task.exporter.scheduler={self.scheduler} is neither a class of diffusers' schedulers nor a file of "
                "one"
            )
        try:
            return kind.from_config(config)
        except Exception as error:  # of any kind: it is other people's code
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"task.exporter.scheduler={self.scheduler}: its config makes no {name} ({reason:.200}); get it again"
            ) from None


@dataclass(frozen=True)
class Call:
    """What makes a scheduler run a schedule.

    arguments: of set_timesteps, and of a pipeline's call.
    wrapper:   what makes of a list what the scheduler takes, such as numpy.array; empty: it takes the list.
    network:   kind of network that the scheduler is for.
    sigmas:    K + 1 that it runs, as lists of that kind of network have them.
    noise:     what the search's first latents are of the scheduler's own.
    """

    arguments: dict[str, Any]
    wrapper: str
    network: Network
    sigmas: list[float]
    noise: float


def diffusers_arguments(
    steps: StepSchedule, scheduler: Any, mu: float | None = None
) -> dict[str, Any]:
    """What makes `scheduler.set_timesteps` run exactly these times and steps, tried on a scheduler like it.

    `sigmas` or `timesteps`, for a pipeline's call too, and mu where there is one. ValueError as of `diffusers_call`.
    """
    return diffusers_call(steps, scheduler, mu).arguments


def diffusers_call(steps: StepSchedule, scheduler: Any, mu: float | None = None) -> Call:
    """Find the arguments with which a scheduler like this one takes the schedule's steps at its times, by trying.

    mu: that the pipeline passes with use_dynamic_shifting; for FLUX `math.log(flux_shift(height, width))`.
    Raises ValueError for a scheduler that takes no times, makes others of them, steps at random, is for another kind of
    network, or takes other steps than those of the solver that the schedule was planned for.
    """
    config, name, network = scheduler.config, type(scheduler).__name__, _network(scheduler.config)
    takes = inspect.signature(scheduler.set_timesteps).parameters
    none = f"{name}{' with use_flow_sigmas' * bool(config.get('use_flow_sigmas'))} takes no times"
    if not takes.keys() & {"sigmas", "timesteps"}:
        raise ValueError(f"{none}; export to oss_scheduler")
    if network_of(steps) not in (network, None):
        raise ValueError(
            f"the schedule was planned for a network of kind {network_of(steps)}, {name} is for {network}; choose the "
            "scheduler of that network's pipeline"
        )
    flow_sigmas(steps)  # its refusals
    if network == "eps":
        steps = _finite(steps, scheduler)
    sigmas = flow_sigmas(steps) if network == "flow" else ratio_sigmas(steps)
    if "sigmas" in takes and config.get("use_dynamic_shifting") and mu is None:
        raise ValueError(f"{name} with use_dynamic_shifting shifts by the pipeline's mu; give it")

    solver = None if not steps.about("solver") and steps.orders is None else steps_of(steps)
    if solver is not None:
        states_of(steps, solver)  # its refusals
    faults: list[_Fault] = []
    for arguments, wrapper in _candidates(steps, scheduler, sigmas, mu):
        try:
            noise = _try(steps, solver, scheduler, network, arguments)
        except _Fault as fault:
            faults.append(fault)
        else:
            return Call(arguments, wrapper, network, sigmas, noise)
    if not faults:
        raise ValueError(f"{none}; export to oss_scheduler")
    fault = max(faults, key=lambda fault: fault.stage)  # that of the arguments that came nearest
    own = [key for key in OWN_TIMES if config.get(key)]
    if own and fault.stage in (0, 1, 2, 4):
        raise ValueError(
            f"{name} with {own[0]} does not run the sigmas it is given; build it without, or export to oss_scheduler"
        )
    euler = f"{'FlowMatch' if network == 'flow' else ''}EulerDiscreteScheduler"
    choose = "" if name == euler else f"choose another, such as {euler}, or "
    raise ValueError(f"{fault}; {choose}export to oss_scheduler")


class _Fault(Exception):
    """Why a scheduler does not run a schedule. stage: how far the trial came."""

    def __init__(self, stage: int, text: str):
        super().__init__(text)
        self.stage = stage


@contextmanager
def _their_code(stage: int, name: str) -> Iterator[None]:
    """Turn whatever a scheduler raises into a _Fault of this stage; what it only warns of is not said."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # of any kind: it is other people's code
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
        raise _Fault(stage, f"{name} does not run such a list ({reason})") from None
    finally:
        logger.setLevel(level)


def _network(config: Mapping[str, Any]) -> Network:
    """Return the kind of network that a scheduler of this config is for."""
    chain = any(key in config for key in ("beta_schedule", "trained_betas", "sigma_data"))
    return "flow" if config.get("use_flow_sigmas", not chain) else "eps"


def _finite(steps: StepSchedule, scheduler: Any) -> StepSchedule:
    """Return the schedule with the first time that the scheduler has for t = 1, where its chain has been cut there."""
    if float(steps.times[0]) < 1 or not scheduler.config.get("rescale_betas_zero_snr"):
        return steps
    largest = _ratios(scheduler)[-1:].clamp(max=4096.0)
    return replace(steps, times=torch.cat([EDMPath().canonical(largest), steps.times[1:]]))


def _ratios(scheduler: Any) -> Tensor:
    """Return sigma / alpha at the indices of a scheduler's chain, (T,) float64."""
    kept = scheduler.alphas_cumprod.double()
    return ((1 - kept) / kept).sqrt()


def _candidates(
    steps: StepSchedule, scheduler: Any, sigmas: list[float], mu: float | None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield arguments of set_timesteps that might make these times, each with its wrapper."""
    config, takes = scheduler.config, inspect.signature(scheduler.set_timesteps).parameters
    network = _network(config)
    more: dict[str, Any] = {} if mu is None or "mu" not in takes else {"mu": mu}
    needed = takes.get("num_inference_steps")
    if needed is not None and needed.default is inspect.Parameter.empty:
        more["num_inference_steps"] = steps.num_steps
    if "sigmas" in takes:
        lists = [sigmas]
        if network == "flow" and (shift := _shift(config, mu)) != 1:
            lists.insert(
                0, shift_time(torch.tensor(sigmas, dtype=torch.float64), 1 / shift).tolist()
            )
        wrappers: dict[str, Callable[[list[float]], Any]] = {
            "": list,
            "numpy.array": np.array,
            "torch.tensor": lambda values: torch.tensor(values, dtype=torch.float64),
        }
        for values, wrapper in product(
            [values[:end] for values in lists for end in (-1, None)], wrappers
        ):
            yield {"sigmas": wrappers[wrapper](values), **more}, wrapper
    elif network == "eps" and hasattr(scheduler, "alphas_cumprod"):
        ratios = _ratios(scheduler).clamp(max=1e12)
        index = np.interp(np.log(sigmas[:-1]), ratios.log().numpy(), np.arange(len(ratios)))
        yield {"timesteps": index.round().astype(int).tolist(), **more}, ""


def _shift(config: Mapping[str, Any], mu: float | None) -> float:
    """Return the shift that a scheduler of flow times puts on the sigmas it is given."""
    if not config.get("use_dynamic_shifting") or mu is None:
        return config.get("shift") or config.get("flow_shift") or 1.0
    if config.get("time_shift_type") != "linear":
        return math.exp(mu)
    require_range(above=0, mu=mu)
    return mu


def _try(
    steps: StepSchedule,
    solver: Solver | None,
    scheduler: Any,
    network: Network,
    arguments: Mapping[str, Any],
) -> float:
    """Run a scheduler like this one, and return what the search's first latents are of its own.

    solver: whose steps it should take; None: a bare list, for any.
    Raises _Fault where it steps at random, runs other times, or takes steps of another solver than the schedule's.
    """
    name = type(scheduler).__name__

    def fresh() -> Any:
        with _their_code(0, name):
            trial = type(scheduler).from_config(scheduler.config)
            trial.set_timesteps(**arguments)
            return trial

    def run(trial: Any, seed: int = 0, sign: float = 1.0) -> tuple[float, Tensor]:
        with _their_code(2, name):
            return _walk(trial, steps, network, seed, sign)

    # The number of steps.
    trial = fresh()
    with _their_code(0, name):
        times = _times(trial, network)
    if len(times) != len(steps.times):
        raise _Fault(
            1, f"{name} takes {len(times) - 1} steps where the schedule has {steps.num_steps}"
        )
    if len(trial.timesteps) != steps.num_steps:
        calls = len(trial.timesteps)
        raise _Fault(
            2,
            f"{name} calls the network {calls} times where the schedule has {steps.num_steps} steps",
        )

    # Chance.
    noise, states = run(trial)
    if not torch.equal(states.nan_to_num(), run(fresh(), seed=1)[1].nan_to_num()):
        raise _Fault(3, f"{name} steps at random where the schedule's steps are fixed")

    # Times.
    off = float((times - steps.times).abs().max())
    if not off <= TOLERANCE:  # nan too
        reason = (
            "it knows whole timesteps only"
            if "timesteps" in arguments
            else "it changes the times it is given"
        )
        raise _Fault(
            4, f"{name} would run times that are up to {off:.2g} beside the schedule's: {reason}"
        )

    # Steps.
    if solver is not None:
        first = torch.minimum(
            times[:1], steps.times[:1]
        )  # UniPC's is a little before 1, where its h is finite
        expected = states_of(replace(steps, times=torch.cat([first, steps.times[1:]])), solver)
        tried = [states]
        if network == "flow":  # of which some velocities point to the noise and some to the data
            tried.append(run(fresh(), sign=-1)[1])
        if not any(float((one - expected).abs().max()) <= STEP_TOLERANCE for one in tried):
            raise _Fault(
                5,
                f"{name} takes other steps than {words(solver)}, for which the schedule was planned",
            )
    return noise


def _times(trial: Any, network: Network) -> Tensor:
    """Return the canonical times (K+1,) that a scheduler will run."""
    sigmas = getattr(trial, "sigmas", None)
    if sigmas is None:
        ratios = _ratios(trial)[trial.timesteps.long()]
        return EDMPath().canonical(torch.cat([ratios, ratios.new_zeros(1)]))
    sigmas = torch.as_tensor(sigmas).double()
    if network == "eps":
        return EDMPath().canonical(sigmas)
    return 1 - sigmas if trial.config.get("invert_sigmas") else sigmas


def _walk(
    trial: Any, steps: StepSchedule, network: Network, seed: int, sign: float
) -> tuple[float, Tensor]:
    """Run a scheduler on coordinates: of the first state, and of the clean sample that each call predicts.

    -> the search's first latents as a multiple of the scheduler's, and the states (K, 1 + K) after the steps.
    """
    config, basis = trial.config, torch.eye(steps.num_steps + 1, dtype=torch.float64)
    noise, latents, states = 1.0, basis[0].view(1, -1, 1, 1), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step, timestep in enumerate(trial.timesteps):
            t = float(steps.times[step])
            enter = getattr(trial, "scale_model_input", lambda sample, timestep: sample)
            factor = float(enter(torch.ones(1, 1, 1, 1, dtype=torch.float64), timestep))
            if "sigma_data" in config:
                length = 1 / (1 - t)  # latents with alpha = 1
            else:
                length = (1.0 if network == "flow" else 1 / math.hypot(1 - t, t)) / factor
            if step == 0:
                noise = steps.start_time * length / float(getattr(trial, "init_noise_sigma", 1.0))
                latents = latents * length
            x0 = basis[step + 1].view(1, -1, 1, 1)
            states.append(latents / length)
            answer = sign * _answer(config, network, states[-1], x0, t)
            latents = trial.step(answer, timestep, latents, return_dict=False)[0].double()
    return noise, torch.stack([*states[1:], latents]).flatten(1)


def _answer(config: Mapping[str, Any], network: Network, x: Tensor, x0: Tensor, t: float) -> Tensor:
    """Return what a network says at x_t that predicts x0, in the words of its scheduler's config."""
    eps = (x - (1 - t) * x0) / t
    if network == "flow":
        return eps - x0
    prediction, scale = config.get("prediction_type", "epsilon"), 1 / math.hypot(1 - t, t)
    if (data := config.get("sigma_data")) is not None:
        # F of Karras et al. 2022, table 1; diffusers' v_prediction has its sign turned.
        square = (t / (1 - t)) ** 2 + data**2
        answer = (x0 - data**2 / square * x / (1 - t)) * square**0.5 * (1 - t) / (t * data)
        return -answer if prediction == "v_prediction" else answer
    words = {
        "epsilon": eps,
        "sample": x0,
        "original_sample": x0,
        "v_prediction": scale * ((1 - t) * eps - t * x0),
    }
    return words[prediction]
