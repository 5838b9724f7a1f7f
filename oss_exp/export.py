"""Step schedules in the words of other programs, and back.

A flow model's sigma elsewhere is canonical time here; that of any other model is sigma / alpha = t / (1 - t). A list of
sigmas holds times alone; what has orders, fitted steps or an analytic start is written `in_numbers`, which
`oss_scheduler.py` runs in pipelines of diffusers. Whatever a target cannot hold is refused.
"""

from __future__ import annotations

import inspect
import json
import math
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oss_exp.files import save_asset, write_atomically
from oss_exp.noise import EDMPath, shift_time
from oss_exp.solvers import Solver, walk
from oss_exp.steps import StepSchedule, rowwise

TOLERANCE = 2e-6  # of times: diffusers counts in float32, and its UniPC begins at 1 - 1e-6


# --------------------------------------------------------------------------------------------------------------
# Lists of sigmas
# --------------------------------------------------------------------------------------------------------------


def flow_sigmas(steps: StepSchedule) -> list[float]:
    """K + 1 sigmas of a flow model, the last 0: what ComfyUI's samplers take. Only times are in it, to be run by Euler.

    ValueError where times alone do not say what the schedule does.
    """
    lost = {
        "times of their own for each sample": steps.samples is not None,
        "an analytic start": steps.start == "analytic",
        "fitted weights": steps.weights is not None,
        "orders above 1": steps.orders is not None and bool((steps.orders > 1).any()),
    }
    if said := [name for name, here in lost.items() if here]:
        raise ValueError(
            f"a list of sigmas cannot hold {' and '.join(said)}; plan with first-order steps for all samples and "
            "start=free or pinned, such as stepsize=oss_ave solver=euler, or, where all samples have the same times, "
            "export to oss_scheduler"
        )
    return steps.times.tolist()


def ratio_sigmas(steps: StepSchedule) -> list[float]:
    """K + 1 sigmas of any other model, sigma / alpha as k-diffusion has it, the last 0. ValueError as `flow_sigmas`."""
    times = flow_sigmas(steps)
    if times[0] == 1:
        raise ValueError(
            "the schedule's first time is 1, where sigma / alpha is infinite; plan it on a noise_schedule that begins "
            "at the network's largest sigma, such as ddim or edm"
        )
    return EDMPath().native(steps.times).tolist()


def from_flow_sigmas(sigmas: Sequence[float], **provenance: Any) -> StepSchedule:
    """What `flow_sigmas` gave. A last sigma above 0, as published lists have it, is where samplers put 0, and so is it.

    The noise is taken as it is, however large the first sigma: start "free".
    """
    return StepSchedule([*sigmas[:-1], 0.0], "free", provenance=provenance)


def from_ratio_sigmas(sigmas: Sequence[float], **provenance: Any) -> StepSchedule:
    """What `ratio_sigmas` gave, the last as in `from_flow_sigmas`. Samplers begin with noise times the first sigma."""
    times = EDMPath().canonical(torch.tensor([*sigmas[:-1], 0.0], dtype=torch.float64))
    return StepSchedule(times, "pinned", float(times[0]), provenance=provenance)


def sigma_text(sigmas: Sequence[float]) -> str:
    """For ComfyUI's ManualSigmas: "14.6, 6.4, 0.0", every digit; its node reads no exponents, so there are none."""
    return ", ".join(np.format_float_positional(sigma, trim="0") for sigma in sigmas)


def comfyui_nodes(sigmas: Sequence[float]) -> dict[str, Any]:
    """ComfyUI's API format: the sigmas, and the sampler that they are for."""
    return {
        "sigmas": {"class_type": "ManualSigmas", "inputs": {"sigmas": sigma_text(sigmas)}},
        "sampler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    }


def webui_text(sigmas: Sequence[float]) -> str:
    """For the field "custom" of the extension webUI_ExtraSchedulers; AUTOMATIC1111 and Forge alone take no list.

    It stretches a list from 1 to 0 to the model's own range: a first 1 is written as a little less.
    """
    return f"[{sigma_text([min(sigmas[0], 1 - 1e-7) if sigmas[0] <= 1 else sigmas[0], *sigmas[1:]])}]"


def read_sigmas(given: str | Sequence[float]) -> list[float]:
    """Numbers, text with commas, or a file of either, of JSON or of ComfyUI's API format with one ManualSigmas."""
    if not isinstance(given, str):
        return [float(sigma) for sigma in given]
    text, said = given, given if len(given) < 60 else f"{given[:57]}..."
    if given.endswith((".json", ".txt")) or (len(given) < 256 and Path(given).is_file()):
        if not Path(given).is_file():
            raise FileNotFoundError(f"list of sigmas {given} does not exist (folder: {Path(given).resolve().parent})")
        text = Path(given).read_text()
    if text.lstrip().startswith("{"):
        nodes = [node for node in json.loads(text).values() if isinstance(node, dict)]
        texts = [node["inputs"]["sigmas"] for node in nodes if node.get("class_type") == "ManualSigmas"]
        if len(texts) != 1:
            raise ValueError(f"{said} has {len(texts)} nodes ManualSigmas and should have one; give the list itself")
        text = texts[0]
    try:
        return [float(word) for word in text.strip().strip("[]").replace(",", " ").split()]
    except ValueError as error:
        raise ValueError(f"{said} is no list of sigmas ({error}); give numbers with commas, noise first") from None


# --------------------------------------------------------------------------------------------------------------
# Schedulers of diffusers
# --------------------------------------------------------------------------------------------------------------


def diffusers_sigmas(steps: StepSchedule, config: Mapping[str, Any], mu: float | None = None) -> list[float]:
    """The K `sigmas` with which a scheduler of diffusers runs exactly these times of a flow model.

    config: the scheduler's; FlowMatchEulerDiscreteScheduler's, or with use_flow_sigmas UniPC's and others'.
    mu:     that the pipeline passes with use_dynamic_shifting; for FLUX `math.log(flux_shift(height, width))`.
    ValueError for a scheduler that puts times of its own in place of those it is given.
    """
    _refuse_own_times(config)
    if config.get("use_flow_sigmas") is False:
        raise ValueError("a scheduler without use_flow_sigmas has no flow times; build it with use_flow_sigmas=True")
    if not config.get("use_dynamic_shifting"):
        shift = config.get("shift") or config.get("flow_shift") or 1.0
    elif mu is None:
        raise ValueError("a scheduler with use_dynamic_shifting shifts by the pipeline's mu; give it")
    else:
        shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    times = steps.times.new_tensor(flow_sigmas(steps)[:-1])
    return shift_time(times, 1 / shift).tolist()


def diffusers_arguments(steps: StepSchedule, scheduler: Any, mu: float | None = None) -> dict[str, Any]:
    """What makes `scheduler.set_timesteps` run exactly these times, tried on a scheduler like it.

    `sigmas` or `timesteps`, for a pipeline's call too, and mu where there is one. ValueError for a scheduler that takes
    no times, or from which others come out.
    """
    config, name = scheduler.config, type(scheduler).__name__
    takes = inspect.signature(scheduler.set_timesteps).parameters
    flow = config.get("use_flow_sigmas", "beta_schedule" not in config)
    _refuse_own_times(config)
    if "sigmas" in takes and (flow or "use_flow_sigmas" in config):
        given = {"sigmas": diffusers_sigmas(steps, config, mu)}
    elif "sigmas" in takes:
        given = {"sigmas": ratio_sigmas(steps)}
    elif "timesteps" in takes and not flow:
        ratios = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).double().sqrt()
        index = np.interp(np.log(ratio_sigmas(steps)[:-1]), ratios.log().numpy(), np.arange(len(ratios)))
        given = {"timesteps": index.round().astype(int).tolist()}
    else:
        with_ = " with use_flow_sigmas" if config.get("use_flow_sigmas") else ""
        raise ValueError(f"{name}{with_} takes no times; export to oss_scheduler")
    if mu is not None and "mu" in takes:
        given["mu"] = mu
    trial = type(scheduler).from_config(config)
    trial.set_timesteps(**{key: np.array(value) if key == "sigmas" else value for key, value in given.items()})
    found = trial.sigmas.double()
    if not flow:
        found = EDMPath().canonical(found)
    if len(found) != len(steps.times):
        raise ValueError(
            f"{name} takes {len(found) - 1} steps where the schedule has {steps.num_steps}; choose another"
        )
    off = float((found - steps.times).abs().max())
    if off > TOLERANCE:
        reason = "it knows whole timesteps only" if "timesteps" in given else "it changes the times it is given"
        raise ValueError(
            f"{name} would run times that are up to {off:.2g} beside the schedule's: {reason}; choose another, such as "
            f"{'FlowMatch' if flow else ''}EulerDiscreteScheduler, or export to oss_scheduler"
        )
    return given


def _refuse_own_times(config: Mapping[str, Any]) -> None:
    own = [f"use_{kind}_sigmas" for kind in ("karras", "exponential", "beta")]
    own += ["use_lu_lambdas", "shift_terminal", "invert_sigmas"]
    if replaced := [name for name in own if config.get(name)]:
        raise ValueError(f"a scheduler with {replaced[0]} does not run the sigmas it is given; build it without")


# --------------------------------------------------------------------------------------------------------------
# Steps in numbers, for oss_scheduler.py
# --------------------------------------------------------------------------------------------------------------


def in_numbers(steps: StepSchedule, solver: Solver | None = None) -> dict[str, Any]:
    """The schedule with every step as numbers: `times`, `weights`, `start` and `start_time` of OSSScheduler.

    solver: whose steps they are; None: the one that the schedule's file names, else Euler.
    ValueError where a step is no sum of one call's x0 each, or where it needs a guided call's answers apart.
    """
    if steps.samples is not None:
        raise ValueError("the schedule has times of its own for each sample; a scheduler runs one schedule for all")
    if solver is None and steps.weights is None:
        solver = _named_solver(steps)
    if solver is not None and solver.calibration is not None:
        raise ValueError("a calibrated solver's steps are no sums; export without solver.calibration")
    weights = _summed(steps, solver) if steps.weights is None else _from_first(steps)
    return {
        "times": steps.times.tolist(),
        "weights": weights.tolist(),
        "start": steps.start,
        "start_time": steps.start_time,
    }


def save_in_numbers(steps: StepSchedule, path: str | Path, solver: Solver | None = None) -> Path:
    """Write what OSSScheduler.from_schedule reads: JSON and, where there is a mean, `<name>.mean.safetensors` first."""
    path = Path(path)
    record = {"format": "oss_exp/scheduler", "version": 1, **in_numbers(steps, solver), "mean": None}
    if steps.mean is not None:
        file = path.with_suffix(".mean.safetensors")
        digest = save_asset(file, {"mean": steps.mean.cpu()}, {"made_by": path.name})
        record["mean"] = {"file": file.name, "sha256": digest}
    record["provenance"] = dict(steps.provenance)
    return write_atomically(path, json.dumps(record, indent=2) + "\n")


def _summed(steps: StepSchedule, solver: Solver) -> Tensor:
    """(K, 3 + K) weights over (x, first state, mean, x0 newest first): the solver run on coordinates.

    Its states are sums of the first state and the x0 of its calls, so it is run on the vectors that stand for them.
    """
    count = steps.num_steps
    if solver.evals_per_step != 1:
        raise ValueError(f"{solver} calls the network again within a step, which no scheduler can; use a multistep one")
    basis, seen = torch.eye(count + 1, dtype=torch.float64), []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x[0])
        return (x - basis[len(seen)]) / rowwise(t, x)

    orders = None if steps.orders is None else list(steps.orders)
    *_, last = walk(solver, velocity, basis[:1], steps.times, orders)
    states = torch.stack([*seen[1:], last.x[0]])
    weights = torch.zeros(count, 3 + count, dtype=torch.float64)
    weights[:, 1] = states[:, 0]
    for step in range(count):
        weights[step, 3 : 4 + step] = states[step, 1 : 2 + step].flip(0)
    return weights


def _from_first(steps: StepSchedule) -> Tensor:
    """(K, P) fitted weights, over the first state where they are over the noise."""
    if (steps.about("model").get("guidance") or {}).get("scale", 1) != 1:
        raise ValueError(
            "the schedule's steps were fitted to guided and unguided answers apart, and a pipeline gives their mix; "
            "plan it with model.guidance.scale=1, or by stepsize=oss_shared"
        )
    weights = steps.weights.clone()
    if steps.start == "analytic":  # first = ratio noise + (1 - ratio) mean
        ratio = float(steps.times[0]) / steps.start_time
        weights[:, 1] /= ratio
        weights[:, 2] -= (1 - ratio) * weights[:, 1]
    return weights


def _named_solver(steps: StepSchedule) -> Solver:
    settings = dict(steps.about("solver"))
    if not settings and steps.orders is not None:
        raise ValueError("the schedule has orders and names no solver; give the one they were searched with")
    target = str(settings.pop("_target_", "oss_exp.solvers.Euler"))
    kind = pkgutil.resolve_name(target) if target.startswith("oss_exp.solvers.") else None
    if not (isinstance(kind, type) and issubclass(kind, Solver)):
        raise ValueError(f"the schedule's solver {target} is none of oss_exp.solvers; give the solver itself")
    return kind(**settings)
