"""Write the arguments with which a scheduler of diffusers runs a step schedule.

Schedulers shift, round and extend the times that they are given, each in its own way.
Arguments are therefore tried on the real scheduler, and what it runs is compared with
the schedule.
"""

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
STEP_TOLERANCE = 2e-3  # of the steps' weights, in float32 at sigmas of up to 4096
LAST_RATIO = 4096.0  # sigma / alpha of t = 1, as in diffusers
OWN_TIMES = (  # options with which a scheduler ignores the times that it is given
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
    *("shift_terminal", "sigma_schedule"),
)
# Pipelines that compute mu from the picture's tokens of 16 x 16 pixels, linearly, by constants of
# their scheduler.
BY_SIZE = re.compile(r"Flux(?!2)|Chroma|QwenImage(?!Layered|21)|StableDiffusion3|ZImage")
CONSTANTS = {  # fields of a scheduler's config -> arguments of flux_shift
    "base_shift": "base_shift",
    "max_shift": "max_shift",
    "base_image_seq_len": "base_tokens",
    "max_image_seq_len": "max_tokens",
}
# Name of a function -> the function, which turns a list into what a scheduler takes.
WRAPPERS: dict[str, Callable[[list[float]], Any]] = {
    "": list,
    "numpy.array": np.array,
    "torch.tensor": lambda values: torch.tensor(values, dtype=torch.float64),
}


@dataclass(frozen=True)
class Diffusers(Exporter):
    """The arguments of a pipeline's call, tried on its scheduler.

    Attributes:
        scheduler: A scheduler_config.json, the folder of a pipeline, or a class of
            diffusers.
        mu: Shift that the pipeline gives a scheduler with use_dynamic_shifting.
        height: Pixels; with `width` in place of `mu`, which FLUX's and some other
            pipelines compute from the size.
        width: Pixels.
    """

    scheduler: str | None = None
    mu: float | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None):
            raise ValueError(
                "task.exporter.height and task.exporter.width belong together; "
                "give both, or neither"
            )
        require_range(at_least=-10, at_most=10, mu=self.mu)
        if self.mu is not None and self.height is not None:
            raise ValueError(
                "task.exporter.height and task.exporter.width stand for task.exporter.mu; "
                "give either"
            )

    def write(self, steps: StepSchedule, path: Path) -> str:
        """Write the arguments, and return the call to paste."""
        # The file.
        scheduler = self.own_scheduler()
        call = diffusers_call(steps, scheduler, self._mu(scheduler))
        arguments = {**call.arguments}
        if "sigmas" in arguments:
            arguments["sigmas"] = list(map(float, arguments["sigmas"]))
        record = {"scheduler": type(scheduler).__name__, **arguments}
        record["runs"] = {"network": call.network, "sigmas": call.sigmas}
        write_atomically(path, json.dumps(record, indent=2) + "\n")

        # The call.
        if call.wrapper:
            arguments["sigmas"] = f"{call.wrapper}({arguments['sigmas']})"
        words = [f"{key}={value}" for key, value in arguments.items() if key != "mu"]
        advice = f"pipe(..., {', '.join(words)})"

        # Its noise.
        if abs(call.noise - 1) > 5e-3:
            advice += (
                f"\nGive it latents=noise * {call.noise:.6g}, for the search began with other "
                "noise than it does."
            )
        return advice

    def _mu(self, scheduler: Any) -> float | None:
        """Return mu, computed as the pipeline does if the picture's size is given."""
        if self.height is None or self.width is None:
            return self.mu
        pipeline = self._pipeline()
        if pipeline is not None and not BY_SIZE.match(pipeline):
            raise ValueError(
                f"{pipeline} does not compute mu from height and width as FLUX's pipeline does; "
                "set task.exporter.mu to what it gives its scheduler"
            )
        constants = {}
        for field, argument in CONSTANTS.items():
            if scheduler.config.get(field) is not None:
                constants[argument] = scheduler.config[field]
        return math.log(flux_shift(self.height, self.width, **constants))

    def _pipeline(self) -> str | None:
        """Return the class of the pipeline whose folder holds the scheduler, or None."""
        for folder in list(Path(str(self.scheduler), "_").parents)[:3]:
            file = folder / "model_index.json"
            if file.is_file():
                fields = TypeAdapter(dict[str, JsonValue])
                index = load_record(file, fields, "pipeline", "get it again")
                return str(index.get("_class_name"))
        return None

    def own_scheduler(self) -> Any:
        """Return the scheduler that `scheduler` names.

        Raises:
            ValueError: It names none.
        """
        import diffusers
        from diffusers.configuration_utils import ConfigMixin
        from diffusers.schedulers.scheduling_utils import SchedulerMixin

        if self.scheduler is None:
            raise ValueError(
                "exporter=diffusers needs task.exporter.scheduler: a scheduler_config.json, the "
                "folder of a pipeline, or a class such as FlowMatchEulerDiscreteScheduler"
            )

        # Its class and config.
        name, config, path = self.scheduler, {}, Path(self.scheduler)
        if path.exists():
            config = read_scheduler_config(_config_file(path))
            name = config.get("_class_name")
        kind: Any = getattr(diffusers, str(name), None)
        if not {SchedulerMixin, ConfigMixin} <= {*getattr(kind, "__mro__", ())}:
            raise ValueError(
                f"task.exporter.scheduler={self.scheduler} is neither a class of diffusers' "
                "schedulers nor a file of one"
            )

        # The scheduler.
        try:
            return kind.from_config(config)
        except Exception as error:  # of any kind: it is other people's code
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"task.exporter.scheduler={self.scheduler}: its config makes no {name} "
                f"({reason:.200}); get it again"
            ) from None


def _config_file(path: Path) -> Path:
    """Return the config of a scheduler: a file, or in the folder of it or of its pipeline."""
    if path.is_file():
        return path
    folder = path / "scheduler"
    return (folder if folder.is_dir() else path) / "scheduler_config.json"


@dataclass(frozen=True)
class Call:
    """The call with which a scheduler runs a schedule.

    Attributes:
        arguments: Arguments of set_timesteps, and of a pipeline's call.
        wrapper: Name of the function that turns a list into what the scheduler takes,
            such as numpy.array; empty if it takes the list.
        network: Kind of network that the scheduler is for.
        sigmas: The K + 1 sigmas that it runs, as lists for that kind of network have
            them.
        noise: The search's first latents as a multiple of the scheduler's.
    """

    arguments: dict[str, Any]
    wrapper: str
    network: Network
    sigmas: list[float]
    noise: float


def diffusers_arguments(
    steps: StepSchedule, scheduler: Any, mu: float | None = None
) -> dict[str, Any]:
    """Return the arguments of `set_timesteps` with which a scheduler runs a schedule.

    They are `sigmas` or `timesteps`, for a pipeline's call too, and `mu` if it is
    given. Arguments and errors are those of `diffusers_call`.
    """
    return diffusers_call(steps, scheduler, mu).arguments


def diffusers_call(steps: StepSchedule, scheduler: Any, mu: float | None = None) -> Call:
    """Find, by trying, the call with which a scheduler takes a schedule's steps at its times.

    Args:
        steps: The schedule.
        scheduler: A scheduler of diffusers, which is not changed.
        mu: Shift that the pipeline passes with use_dynamic_shifting; for FLUX
            `math.log(flux_shift(height, width))`.

    Raises:
        ValueError: The scheduler takes no times, changes them, steps at random, is for
            another kind of network, or takes other steps than the schedule's solver.
    """
    # The lists.
    _require_fit(steps, scheduler, mu)
    network = _network(scheduler.config)
    if network == "eps":
        steps = _finite(steps, scheduler)
    sigmas = flow_sigmas(steps) if network == "flow" else ratio_sigmas(steps)
    solver = None if not steps.about("solver") and steps.orders is None else steps_of(steps)
    if solver is not None:
        states_of(steps, solver)  # for its errors

    # Trials.
    faults: list[_Fault] = []
    for arguments, wrapper in _candidates(steps, scheduler, sigmas, mu):
        try:
            noise = _try(steps, solver, scheduler, network, arguments)
        except _Fault as fault:
            faults.append(fault)
        else:
            return Call(arguments, wrapper, network, sigmas, noise)
    raise ValueError(_advice(faults, scheduler))


def _require_fit(steps: StepSchedule, scheduler: Any, mu: float | None) -> None:
    """Raise a ValueError if the scheduler cannot run this schedule, whatever its arguments."""
    config, name, network = scheduler.config, type(scheduler).__name__, _network(scheduler.config)
    parameters = inspect.signature(scheduler.set_timesteps).parameters
    if not parameters.keys() & {"sigmas", "timesteps"}:
        raise ValueError(_no_times(scheduler))
    planned = network_of(steps)
    if planned not in (network, None):
        raise ValueError(
            f"the schedule was planned for a network of kind {planned}, {name} is for {network}; "
            "choose the scheduler of that network's pipeline"
        )
    flow_sigmas(steps)  # for its errors
    if "sigmas" in parameters and config.get("use_dynamic_shifting") and mu is None:
        raise ValueError(f"{name} with use_dynamic_shifting shifts by the pipeline's mu; give it")


def _advice(faults: list[_Fault], scheduler: Any) -> str:
    """Return what is wrong with all candidates, and what to do."""
    if not faults:
        return _no_times(scheduler)
    config, name = scheduler.config, type(scheduler).__name__
    fault = max(faults, key=lambda fault: fault.stage)  # of the arguments that came nearest
    options = [key for key in OWN_TIMES if config.get(key)]
    if options and fault.stage in (0, 1, 2, 4):
        return (
            f"{name} with {options[0]} does not run the sigmas it is given; build it without, "
            "or export to oss_scheduler"
        )
    euler = f"{'FlowMatch' if _network(config) == 'flow' else ''}EulerDiscreteScheduler"
    choice = "" if name == euler else f"choose another, such as {euler}, or "
    return f"{fault}; {choice}export to oss_scheduler"


def _no_times(scheduler: Any) -> str:
    """Return the message for a scheduler that takes no times."""
    flow = " with use_flow_sigmas" if scheduler.config.get("use_flow_sigmas") else ""
    return f"{type(scheduler).__name__}{flow} takes no times; export to oss_scheduler"


class _Fault(Exception):
    """The reason why a scheduler does not run a schedule.

    Attributes:
        stage: Number of the check that failed; a higher one is nearer to success.
    """

    def __init__(self, stage: int, text: str):
        super().__init__(text)
        self.stage = stage


@contextmanager
def _their_code(stage: int, name: str) -> Iterator[None]:
    """Silence a scheduler's warnings, and turn whatever it raises into a _Fault of this stage."""
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
    """Return the schedule with the time that a scheduler of zero terminal SNR has for t = 1."""
    if float(steps.times[0]) < 1 or not scheduler.config.get("rescale_betas_zero_snr"):
        return steps
    largest = _ratios(scheduler)[-1:].clamp(max=LAST_RATIO)
    return replace(steps, times=torch.cat([EDMPath().canonical(largest), steps.times[1:]]))


def _ratios(scheduler: Any) -> Tensor:
    """Return sigma / alpha at the indices of a scheduler's chain, (T,) float64."""
    alpha2 = scheduler.alphas_cumprod.double()
    return ((1 - alpha2) / alpha2).sqrt()


def _candidates(
    steps: StepSchedule, scheduler: Any, sigmas: list[float], mu: float | None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield arguments of set_timesteps that might make these times, each with its wrapper."""
    config, network = scheduler.config, _network(scheduler.config)
    parameters = inspect.signature(scheduler.set_timesteps).parameters

    # Other arguments.
    options: dict[str, Any] = {} if mu is None or "mu" not in parameters else {"mu": mu}
    count = parameters.get("num_inference_steps")
    if count is not None and count.default is inspect.Parameter.empty:
        options["num_inference_steps"] = steps.num_steps

    # Sigmas: as they are, or before the scheduler's shift; without and with the last.
    if "sigmas" in parameters:
        shift = _shift(config, mu) if network == "flow" else 1.0
        lists = [sigmas]
        if shift != 1:
            unshifted = shift_time(torch.tensor(sigmas, dtype=torch.float64), 1 / shift)
            lists = [unshifted.tolist(), sigmas]
        for values, end, wrapper in product(lists, (-1, None), WRAPPERS):
            yield {"sigmas": WRAPPERS[wrapper](values[:end]), **options}, wrapper

    # Indices of the chain.
    elif network == "eps" and hasattr(scheduler, "alphas_cumprod"):
        ratios = _ratios(scheduler).clamp(max=1e12)
        index = np.interp(np.log(sigmas[:-1]), ratios.log().numpy(), np.arange(len(ratios)))
        yield {"timesteps": index.round().astype(int).tolist(), **options}, ""


def _shift(config: Mapping[str, Any], mu: float | None) -> float:
    """Return the shift that a scheduler of flow times applies to the sigmas that it is given."""
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
    """Try a call on a scheduler like this one.

    Args:
        steps: The schedule.
        solver: Solver whose steps it should take; None: a bare list, for any.
        scheduler: The scheduler, which is not changed.
        network: Kind of its network.
        arguments: Arguments of set_timesteps.

    Returns:
        The search's first latents as a multiple of the scheduler's.

    Raises:
        _Fault: It steps at random, runs other times, or takes steps of another solver.
    """
    name = type(scheduler).__name__

    def build() -> Any:
        with _their_code(0, name):
            trial = type(scheduler).from_config(scheduler.config)
            trial.set_timesteps(**arguments)
            return trial

    def run(trial: Any, seed: int = 0, sign: float = 1.0) -> tuple[float, Tensor]:
        with _their_code(2, name):
            return _walk(trial, steps, network, seed, sign)

    # Times, chance, steps.
    trial = build()
    with _their_code(0, name):
        times = _times(trial, network)
    _require_count(steps, trial, times)
    noise, states = run(trial)
    _, others = run(build(), seed=1)
    if not torch.equal(states.nan_to_num(), others.nan_to_num()):
        raise _Fault(3, f"{name} steps at random where the schedule's steps are fixed")
    _require_times(steps, name, times, whole="timesteps" in arguments)
    if solver is None:
        return noise

    # Some flow networks answer with a velocity towards the noise, and some towards the data.
    results = [states]
    if network == "flow":
        results.append(run(build(), sign=-1)[1])
    first = torch.minimum(times[:1], steps.times[:1])  # UniPC's is before 1, where its h is finite
    nodes = torch.cat([first, steps.times[1:]])
    expected = states_of(replace(steps, times=nodes), solver)
    if not any(float((result - expected).abs().max()) <= STEP_TOLERANCE for result in results):
        steps_text = f"other steps than {words(solver)}, for which the schedule was planned"
        raise _Fault(5, f"{name} takes {steps_text}")
    return noise


def _require_count(steps: StepSchedule, trial: Any, times: Tensor) -> None:
    """Raise a _Fault unless a scheduler has the schedule's number of steps and calls."""
    name, count, calls = type(trial).__name__, len(times) - 1, len(trial.timesteps)
    if count != steps.num_steps:
        raise _Fault(1, f"{name} takes {count} steps where the schedule has {steps.num_steps}")
    if calls != steps.num_steps:
        raise _Fault(
            2,
            f"{name} calls the network {calls} times where the schedule has "
            f"{steps.num_steps} steps",
        )


def _require_times(steps: StepSchedule, name: str, times: Tensor, whole: bool) -> None:
    """Raise a _Fault unless these are the schedule's times."""
    error = float((times - steps.times).abs().max())
    if error <= TOLERANCE:
        return
    reason = "it knows whole timesteps only" if whole else "it changes the times it is given"
    raise _Fault(
        4,
        f"{name} would run times that are up to {error:.2g} beside the schedule's: {reason}",
    )


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
    """Run a scheduler on unit vectors, for the first state and for the x0 that each call predicts.

    Returns:
        The search's first latents as a multiple of the scheduler's, and the states (K,
        1 + K) after the steps.
    """
    config = trial.config
    basis = torch.eye(steps.num_steps + 1, dtype=torch.float64)
    enter = getattr(trial, "scale_model_input", lambda sample, timestep: sample)
    latents = basis[0].view(1, -1, 1, 1)
    noise, states = 1.0, []

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step, timestep in enumerate(trial.timesteps):
            # Size of the latents over x_t.
            t = float(steps.times[step])
            factor = float(enter(torch.ones(1, 1, 1, 1, dtype=torch.float64), timestep))
            if "sigma_data" in config:
                length = 1 / (1 - t)  # latents with alpha = 1
            else:
                length = (1.0 if network == "flow" else 1 / math.hypot(1 - t, t)) / factor
            if step == 0:
                noise = steps.start_time * length / float(getattr(trial, "init_noise_sigma", 1.0))
                latents = latents * length

            # The step.
            x0 = basis[step + 1].view(1, -1, 1, 1)
            states.append(latents / length)
            answer = sign * _answer(config, network, states[-1], x0, t)
            latents = trial.step(answer, timestep, latents, return_dict=False)[0].double()
    return noise, torch.stack([*states[1:], latents]).flatten(1)


def _answer(config: Mapping[str, Any], network: Network, x: Tensor, x0: Tensor, t: float) -> Tensor:
    """Return the answer at x_t of a network that predicts x0, as a scheduler's config has it."""
    # Flow.
    eps = (x - (1 - t) * x0) / t
    if network == "flow":
        return eps - x0

    # EDM: F of Karras et al. 2022, table 1.
    prediction = config.get("prediction_type", "epsilon")
    data = config.get("sigma_data")
    if data is not None:
        square = (t / (1 - t)) ** 2 + data**2
        answer = (x0 - data**2 / square * x / (1 - t)) * square**0.5 * (1 - t) / (t * data)
        return -answer if prediction == "v_prediction" else answer  # diffusers turns its sign

    # A chain.
    scale = 1 / math.hypot(1 - t, t)
    answers = {
        "epsilon": eps,
        "sample": x0,
        "original_sample": x0,
        "v_prediction": scale * ((1 - t) * eps - t * x0),
    }
    return answers[prediction]
