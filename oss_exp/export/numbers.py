"""Step schedules with every step as numbers: oss_scheduler.py runs them in diffusers, comfyui_nodes.py in ComfyUI."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oss_exp.export.base import Exporter
from oss_exp.export.samplers import same_steps, states_of, steps_of, uncalibrated
from oss_exp.export.workflow import with_schedule
from oss_exp.files import beside, save_asset, write_atomically
from oss_exp.schedule import Analytic, FittedSteps, Pinned, SolverSteps, StepSchedule
from oss_exp.solvers import Euler, Solver

CODE = Path(__file__).with_name("oss_scheduler.py")  # without which the files run nowhere
NODES = Path(__file__).with_name("comfyui_nodes.py")
INSIDE = 0.9  # schedules whose noise is less begin at an image, as the nodes have it


@dataclass(frozen=True)
class OSSSchedulerFile(Exporter):
    """What `OSSScheduler.from_schedule` reads, and beside it the one file of code that it is in."""

    def write(self, steps: StepSchedule, path: Path) -> str:
        save_in_numbers(steps, path)
        write_atomically(path.with_name(CODE.name), CODE.read_text())
        return f'from oss_scheduler import OSSScheduler\nOSSScheduler.from_schedule("{path.name}", pipe.scheduler.config)'


@dataclass(frozen=True)
class ComfyUINodes(Exporter):
    """A folder of ComfyUI's custom_nodes: the one file of code, and `schedules`, to which further exports add.

    workflow: of ComfyUI; a copy that samples by the schedule goes into `example_workflows`, which ComfyUI lists.
    """

    suffix = ""  # a folder

    workflow: str | None = None

    def write(self, steps: StepSchedule, path: Path) -> str:
        code, text = path / "__init__.py", NODES.read_text()
        if code.exists() and not code.read_text(errors="replace").startswith(text[:60]):
            raise ValueError(
                f"{path} holds another __init__.py; choose a folder of its own, custom_nodes/oss_exp"
            )
        made_of = (
            steps.about("model").get("name"),
            steps.about("strategy").get("name"),
            steps.num_steps,
        )
        name = re.sub(r"[^\w.-]+", "-", "_".join(str(part) for part in made_of if part))
        file = save_in_numbers(steps, path / "schedules" / f"{name}.json", apart=True)
        copied = []
        if self.workflow is not None:
            native = in_numbers(steps, apart=True)
            inside = native["start_time"] if native["start_time"] < INSIDE else 1.0
            changed, copied = with_schedule(
                self.workflow, file.name, native.get("strength", inside)
            )
            copied.append(
                str(
                    write_atomically(
                        path / "example_workflows" / Path(self.workflow).name, f"{changed}\n"
                    )
                )
            )
        write_atomically(code, text)
        hint = "Restart ComfyUI once; schedules that are added later need none."
        use = "OSS Sampler takes the place of KSampler, OSS Schedule gives sigmas and sampler to SamplerCustom."
        return "\n".join([*copied, str(file), hint, use])


def in_numbers(
    steps: StepSchedule, solver: Solver | None = None, apart: bool = False
) -> dict[str, Any]:
    """The schedule with every step as numbers: `times`, `weights`, `start` and `start_time` of OSSScheduler.

    solver: whose steps they are; None: the one that the schedule's file names, else Euler.
    apart:  whether who runs it knows a guided call's two answers apart, which `answers` then counts.
    ValueError where a step is no sum of one call's x0 each, or where it needs answers apart that nobody knows.
    """
    if steps.per_sample:
        raise ValueError(
            "the schedule has times of its own for each sample; a scheduler runs one schedule for all"
        )
    native = steps.about("native")
    image = {
        key: native[key]
        for key in ("strength", "num_inference_steps", "begin_index")
        if key in native
    }
    if image and not (isinstance(steps.start, Pinned) and isinstance(steps.steps, SolverSteps)):
        raise ValueError(
            f"the schedule is for a call that begins at an image, and has {steps.kind}; a scheduler does not know the "
            "image: plan it by stepsize=oss_shared with start=pinned"
        )
    solver = steps_of(steps) if solver is None else uncalibrated(solver)
    answers = 1
    if isinstance(steps.steps, FittedSteps):
        guidance = steps.about("model").get("guidance") or {}
        answers = 1 if guidance.get("scale", 1) == 1 else 2
        if answers > 1 and (
            not apart
            or guidance.get("channels") is not None
            or guidance.get("interval") is not None
        ):
            raise ValueError(
                "the schedule's steps were fitted to guided and unguided answers apart, and a pipeline gives their "
                "mix; plan it with model.guidance.scale=1 (a Pipeline: guidance_apart=False), or by stepsize=oss_shared"
            )
        weights = _from_first(steps, steps.steps)
    elif same_steps(steps, solver, Euler()):
        weights = _first_order(steps.times)
    else:
        weights = _summed(states_of(steps, solver))
    return {
        "times": steps.times.tolist(),
        "weights": weights.tolist(),
        "start": steps.start.kind,
        "start_time": steps.start_time,
        **({"answers": answers} if answers > 1 else {}),
        **({"range": steps.range.model_dump()} if steps.range is not None else {}),
        **image,
    }


def save_in_numbers(
    steps: StepSchedule, path: str | Path, solver: Solver | None = None, apart: bool = False
) -> Path:
    """Write what OSSScheduler.from_schedule reads: JSON and, where there is a mean, `<name>.mean.safetensors` first."""
    path = Path(path)
    record = {
        "format": "oss_exp/scheduler",
        "version": 1,
        **in_numbers(steps, solver, apart),
        "mean": None,
    }
    if steps.mean is not None:
        file = beside(path, ".mean.safetensors")
        digest = save_asset(file, {"mean": steps.mean.cpu()}, {"made_by": path.name})
        record["mean"] = {"file": file.name, "sha256": digest}
    record["provenance"] = dict(steps.provenance)
    return write_atomically(path, json.dumps(record, indent=2) + "\n")


def _first_order(times: Tensor) -> Tensor:
    """Euler's weights (K, 4) over (x, first state, mean, newest x0), which remember nothing."""
    keep = times[1:] / times[:-1]
    return torch.stack([keep, torch.zeros_like(keep), torch.zeros_like(keep), 1 - keep], dim=1)


def _summed(states: Tensor) -> Tensor:
    """States (K, 1 + K) after a solver's steps -> (K, 3 + K) weights over (x, first state, mean, x0 newest first)."""
    count = len(states)
    weights = torch.zeros(count, 3 + count, dtype=torch.float64)
    weights[:, 1] = states[:, 0]
    for step in range(count):
        weights[step, 3 : 4 + step] = states[step, 1 : 2 + step].flip(0)
    return weights


def _from_first(steps: StepSchedule, fitted: FittedSteps) -> Tensor:
    """(K, P) fitted weights, over the first state where they are over the noise."""
    weights = fitted.weights.clone()
    if isinstance(steps.start, Analytic):  # first = ratio noise + (1 - ratio) mean
        ratio = float(steps.times[0]) / steps.start_time
        weights[:, 1] /= ratio
        weights[:, 2] -= (1 - ratio) * weights[:, 1]
    return weights
