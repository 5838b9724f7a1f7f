"""Compare schedules searched at one scale of guidance with those searched at several.

python -m experiments.guidance_scales.run     # a minute of a core
"""

from __future__ import annotations

import torch

import oss_exp
from experiments.common import command_line, keep, table
from oss_exp.evaluation.psnr import Interval

SCALES = (1.0, 2.0, 4.0)
CLASSES = torch.arange(10)
SOLVER = oss_exp.DPMSolverPP(order=2)
NUM_STEPS, TEACHER_STEPS, SEARCH_NOISES, HELD_OUT = 5, 50, 20, 100
STRATEGIES = {"oss_shared": oss_exp.OSSShared(), "oss_fit": oss_exp.OSSFit()}


def model_at(scale: float) -> oss_exp.GaussianMixture:
    guidance = oss_exp.Guidance(scale=scale)
    return oss_exp.GaussianMixture.from_asset(
        "mixture_digits.safetensors", guidance=guidance, micro_batch=4096
    )


def searched(strategy: oss_exp.OSSShared, scales: tuple[float, ...]) -> oss_exp.StepSchedule:
    """Return one schedule for these scales of guidance, of steps that see the guided answer."""
    return _search(model_at(1.0), strategy, guidance=scales)


def searched_apart(strategy: oss_exp.OSSShared, scale: float) -> oss_exp.StepSchedule:
    """Return the schedule of a model at a scale, whose fitted steps weigh both its answers."""
    return _search(model_at(scale), strategy)


def _search(
    model: oss_exp.GaussianMixture, strategy: oss_exp.OSSShared, **guidance: tuple[float, ...]
) -> oss_exp.StepSchedule:
    return oss_exp.search(
        model,
        SEARCH_NOISES,
        NUM_STEPS,
        strategy=strategy,
        solver=SOLVER,
        num_teacher_steps=TEACHER_STEPS,
        condition=CLASSES,
        **guidance,
    )


def psnr_at(scale: float, steps: oss_exp.StepSchedule) -> Interval:
    """Return the PSNR in dB to the teacher at a scale; data lie in [-1, 1]."""
    model = model_at(scale)
    noise = torch.randn(HELD_OUT, *model.event_shape, generator=torch.Generator().manual_seed(5))
    grid = oss_exp.StepSchedule(oss_exp.FlowSchedule().nodes(TEACHER_STEPS))
    teacher = oss_exp.sample(model, noise, grid, solver=SOLVER, condition=CLASSES)
    student = oss_exp.sample(model, noise, steps, solver=SOLVER, condition=CLASSES)
    errors = (student - teacher).flatten(1).double().square().mean(1) / 4
    return Interval.of((-10 * errors.log10()).numpy())


def main() -> None:
    command_line(__doc__).parse_args()
    schedules = []
    for name, strategy in STRATEGIES.items():
        for scales in (*((scale,) for scale in SCALES), SCALES):
            label = ", ".join(f"{scale:g}" for scale in scales)
            schedules.append((name, label, searched(strategy, scales)))
    for scale in SCALES[1:]:
        steps = searched_apart(STRATEGIES["oss_fit"], scale)
        schedules.append(("oss_fit", f"{scale:g}, answers apart", steps))

    rows = []
    for name, label, steps in schedules:
        values = [psnr_at(scale, steps) for scale in SCALES]
        cells = [f"{value.mean:.1f} ± {value.high - value.mean:.1f}" for value in values]
        rows.append([name, label, *cells])
    header = ["strategy", "searched at", *(f"PSNR at {scale:g}" for scale in SCALES)]
    keep(__file__, "table.md", table(header, rows))


if __name__ == "__main__":
    main()
