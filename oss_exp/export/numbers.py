"""Write step schedules with every step as numbers.

oss_scheduler.py runs them in diffusers, comfyui_nodes.py in ComfyUI.
"""

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

CODE = Path(__file__).with_name("oss_scheduler.py")
NODES = Path(__file__).with_name("comfyui_nodes.py")
MARK = "oss_exp/scheduler"  # is in every version of the nodes' file
INSIDE = 0.9  # a schedule whose noise is smaller begins at an image, as in the nodes' FULL


@dataclass(frozen=True)
class OSSSchedulerFile(Exporter):
    """A file for `OSSScheduler.from_schedule`, and beside it the file of code with that class."""

    def write(self, steps: StepSchedule, path: Path) -> str:
        """Write both files, and return the lines of Python that use them."""
        save_in_numbers(steps, path)
        write_atomically(path.with_name(CODE.name), CODE.read_text())
        call = f'OSSScheduler.from_schedule("{path.name}", pipe.scheduler.config)'
        return f"from oss_scheduler import OSSScheduler\n{call}"


@dataclass(frozen=True)
class ComfyUINodes(Exporter):
    """A folder for ComfyUI's custom_nodes: the file of code, and `schedules`.

    Further exports to the same folder add to its schedules.

    Attributes:
        workflow: A workflow of ComfyUI. A copy that samples by the schedule is written
            to `example_workflows`, which ComfyUI lists.
    """

    suffix = ""  # a folder

    workflow: str | None = None

    def write(self, steps: StepSchedule, path: Path) -> str:
        """Write the folder, and return what was written and how to use it."""
        # The folder is new, or ours.
        code, text = path / "__init__.py", NODES.read_text()
        if code.exists() and MARK not in code.read_text(errors="replace"):
            raise ValueError(
                f"{path} holds another __init__.py; choose a folder of its own, "
                "custom_nodes/oss_exp"
            )

        # The schedule.
        model, strategy = steps.about("model"), steps.about("strategy")
        words = (model.get("name"), strategy.get("name"), steps.num_steps)
        name = "_".join(str(word) for word in words if word)
        name = re.sub(r"[^\w.-]+", "-", name)
        file = save_in_numbers(steps, path / "schedules" / f"{name}.json", apart=True)

        # The workflow and the code.
        lines = [] if self.workflow is None else self._copy_workflow(steps, path, file.name)
        write_atomically(code, text)
        hint = "Restart ComfyUI once; schedules that are added later need none."
        use = (
            "OSS Sampler takes the place of KSampler, "
            "OSS Schedule gives sigmas and sampler to SamplerCustom."
        )
        return "\n".join([*lines, str(file), hint, use])

    def _copy_workflow(self, steps: StepSchedule, path: Path, schedule: str) -> list[str]:
        """Write the workflow's copy; return a line on each changed node, and the copy's path."""
        assert self.workflow is not None
        record = in_numbers(steps, apart=True)
        start_time = record["start_time"] if record["start_time"] < INSIDE else 1.0
        denoise = record.get("strength", start_time)
        text, lines = with_schedule(self.workflow, schedule, denoise)
        copy = path / "example_workflows" / Path(self.workflow).name
        write_atomically(copy, f"{text}\n")
        return [*lines, str(copy)]


def in_numbers(
    steps: StepSchedule, solver: Solver | None = None, apart: bool = False
) -> dict[str, Any]:
    """Return a schedule with every step as numbers, as the arguments of OSSScheduler.

    Args:
        steps: The schedule.
        solver: The solver whose steps it takes; None: the one that its file names, else
            Euler.
        apart: Whether the program knows the two answers of a guided call, guided and
            unguided. `answers` in the result then says how many the steps weigh.

    Raises:
        ValueError: A step is no sum of one x0 a call, or it needs answers that the
            program does not know.
    """
    if steps.per_sample:
        raise ValueError(
            "the schedule has times of its own for each sample; "
            "a scheduler runs one schedule for all"
        )

    image = _image_call(steps)
    solver = steps_of(steps) if solver is None else uncalibrated(solver)

    # Weights of the steps.
    answers = 1
    if isinstance(steps.steps, FittedSteps):
        answers = _answers(steps, apart)
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


def _image_call(steps: StepSchedule) -> dict[str, Any]:
    """Return how a pipeline is called that begins at an image; empty for any other schedule."""
    native = steps.about("native")
    keys = ("strength", "num_inference_steps", "begin_index")
    call = {key: native[key] for key in keys if key in native}
    plain = isinstance(steps.start, Pinned) and isinstance(steps.steps, SolverSteps)
    if call and not plain:
        raise ValueError(
            f"the schedule is for a call that begins at an image, and has {steps.kind}; a "
            "scheduler does not know the image: plan it by stepsize=oss_shared with start=pinned"
        )
    return call


def _answers(steps: StepSchedule, apart: bool) -> int:
    """Return the number of answers of a call that fitted steps weigh."""
    guidance = steps.about("model").get("guidance") or {}
    if guidance.get("scale", 1) == 1:
        return 1
    partial = guidance.get("channels") is not None or guidance.get("interval") is not None
    if not apart or partial:
        raise ValueError(
            "the schedule's steps were fitted to guided and unguided answers apart, and a pipeline "
            "gives their mix; plan it with model.guidance.scale=1 "
            "(a Pipeline: guidance_apart=False), or by stepsize=oss_shared"
        )
    return 2


def save_in_numbers(
    steps: StepSchedule, path: str | Path, solver: Solver | None = None, apart: bool = False
) -> Path:
    """Write the file that OSSScheduler.from_schedule reads.

    A mean is written first, to `<name>.mean.safetensors`. Arguments and errors are
    those of `in_numbers`.
    """
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
    """Return Euler's weights (K, 4) over (x, first state, mean, newest x0)."""
    keep = times[1:] / times[:-1]
    none = torch.zeros_like(keep)
    return torch.stack([keep, none, none, 1 - keep], dim=1)


def _summed(states: Tensor) -> Tensor:
    """Return weights (K, 3 + K) over (x, first state, mean, newest x0, ...), from `states_of`."""
    count = len(states)
    weights = torch.zeros(count, 3 + count, dtype=torch.float64)
    weights[:, 1] = states[:, 0]
    for step in range(count):
        weights[step, 3 : 4 + step] = states[step, 1 : 2 + step].flip(0)
    return weights


def _from_first(steps: StepSchedule, fitted: FittedSteps) -> Tensor:
    """Return fitted weights (K, P), with the first state in the place of the noise."""
    weights = fitted.weights.clone()
    if isinstance(steps.start, Analytic):  # first = ratio noise + (1 - ratio) mean
        ratio = float(steps.times[0]) / steps.start_time
        weights[:, 1] /= ratio
        weights[:, 2] -= (1 - ratio) * weights[:, 1]
    return weights
