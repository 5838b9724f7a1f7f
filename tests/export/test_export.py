"""Other programs' samplers run the times of the exported schedules."""

import json
import math
import re

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from export.common import PATH, SD
from helpers import mostly_slow
from hydra.utils import instantiate
from models.common import composed

from oss_exp.distances import XtMSE
from oss_exp.export.comfyui import comfyui_nodes
from oss_exp.export.diffusers import diffusers_arguments
from oss_exp.export.reading import read_sigmas
from oss_exp.export.sigmas import (
    flow_sigmas,
    from_flow_sigmas,
    from_ratio_sigmas,
    ratio_sigmas,
    sigma_text,
)
from oss_exp.export.webui import webui_text
from oss_exp.noise import DDIMSchedule, FlowSchedule, flux_shift
from oss_exp.noise.published_tables import AlignYourSteps, OSSComfyUI
from oss_exp.schedule import Analytic, FittedSteps, StepSchedule
from oss_exp.solvers import Euler, sample
from oss_exp.stepsize import OSSAve, Problem

PRESETS = {"flux": 10, "wan": 20, "chroma": 40}
MU = math.log(flux_shift(1024, 1024))
SCHEDULERS = {
    "no shift": (FlowMatchEulerDiscreteScheduler(shift=1.0), None),
    "shift 3": (FlowMatchEulerDiscreteScheduler(shift=3.0), None),
    "shift 8": (FlowMatchEulerDiscreteScheduler(shift=8.0), None),
    "FLUX": (FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), MU),
    "linear": (
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
        2.5,
    ),
    "Wan": (
        UniPCMultistepScheduler(
            use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction"
        ),
        None,
    ),
}


@pytest.fixture(params=PRESETS)
def preset(request, tmp_path) -> StepSchedule:
    """A published table, planned, written and read as a run does it."""
    table = request.param
    setting = f"stepsize.oss_comfyui.schedule.table={table}"
    strategy = composed("stepsize=oss_comfyui", setting).stepsize.oss_comfyui
    nodes = instantiate(strategy.schedule).nodes(PRESETS[table])
    StepSchedule(nodes).save(tmp_path / "preset.json")
    return StepSchedule.load(tmp_path / "preset.json")


def test_a_preset_is_the_published_list(preset):
    """Its last level is where samplers put 0."""
    [table] = [name for name, num_steps in PRESETS.items() if num_steps == preset.num_steps]
    assert flow_sigmas(preset) == [*OSSComfyUI.tables[table][:-1], 0]


def test_a_list_of_sigmas_is_read_back_as_the_same_schedule(preset):
    again = from_flow_sigmas(json.loads(json.dumps(flow_sigmas(preset))), made_by="ComfyUI")
    assert torch.equal(again.times, preset.times)
    assert again.provenance == {"made_by": "ComfyUI"}


@pytest.mark.parametrize("name", mostly_slow(SCHEDULERS, "FLUX"))
def test_a_scheduler_of_diffusers_runs_the_exported_times(preset, name):
    scheduler, mu = SCHEDULERS[name]
    scheduler.set_timesteps(**diffusers_arguments(preset, scheduler, mu))
    expected = preset.times.clone()
    if name == "Wan" and expected[0] == 1:
        expected[0] -= 1e-6  # so that its logarithm is finite
    torch.testing.assert_close(scheduler.sigmas.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shift 3", "FLUX"])
def test_a_flow_scheduler_of_diffusers_makes_our_sample(preset, name):
    scheduler, mu = SCHEDULERS[name]
    scheduler.set_timesteps(**diffusers_arguments(preset, scheduler, mu))
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (x * (3 * t.view(-1, 1, 1)).cos() - t.view(-1, 1, 1) ** 2).float()

    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t.expand(2) / 1000), t, x).prev_sample

    ours = sample(Euler(), velocity, noise, from_flow_sigmas(flow_sigmas(preset)))
    torch.testing.assert_close(x, ours, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Every kind of scheduler
# --------------------------------------------------------------------------------------------------


def planned(velocity, grid: torch.Tensor) -> StepSchedule:
    noise = torch.randn(8, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = Problem(velocity, noise * grid[0], grid, Euler(), XtMSE())
    strategy = OSSAve(start="free", band=None, refine=False, aggregate="median", chunk=8)
    return strategy.plan(problem, [6])[6]


def run_through(scheduler, steps: StepSchedule, mu: float | None = None) -> torch.Tensor:
    """Return the canonical times that a scheduler runs."""
    scheduler.set_timesteps(**diffusers_arguments(steps, scheduler, mu))
    assert len(scheduler.timesteps) == steps.num_steps
    sigmas = scheduler.sigmas.double()
    return sigmas if flow(scheduler) else sigmas / (1 + sigmas)


def flow(scheduler) -> bool:
    return scheduler.config.get("use_flow_sigmas", "beta_schedule" not in scheduler.config)


@pytest.mark.parametrize("name", mostly_slow(SCHEDULERS, "FLUX"))
def test_a_flow_scheduler_runs_presets_and_planned_schedules(name, velocity, preset):
    scheduler, mu = SCHEDULERS[name]
    for steps in (preset, planned(velocity, FlowSchedule(3.0).nodes(20))):
        expected = steps.times.clone()
        if name == "Wan" and expected[0] == 1:
            expected[0] -= 1e-6
        torch.testing.assert_close(run_through(scheduler, steps, mu), expected, rtol=0, atol=1e-6)


CONTINUOUS = {"timestep_type": "continuous", "prediction_type": "v_prediction"}


@pytest.mark.parametrize(("table", "settings"), [("sd15", {}), ("sdxl", {}), ("svd", CONTINUOUS)])
def test_euler_of_diffusers_runs_published_levels(table, settings):
    for count in (4, 10, 17):
        nodes = AlignYourSteps(table).nodes(count)
        scheduler = EulerDiscreteScheduler(**SD, **settings)
        times = run_through(scheduler, StepSchedule(nodes))
        torch.testing.assert_close(times, nodes, rtol=0, atol=1e-6)


def test_settings_that_euler_ignores_when_it_gets_sigmas_are_accepted():
    steps = StepSchedule(AlignYourSteps("sd15").nodes(10))
    times = run_through(EulerDiscreteScheduler(**SD, use_karras_sigmas=True), steps)
    torch.testing.assert_close(times, steps.times, rtol=0, atol=1e-6)


def test_a_chain_does_not_run_levels_beyond_its_end():
    """Several levels would have the last index, and Euler begins at the second of them."""
    steps = StepSchedule(AlignYourSteps("svd").nodes(10))
    message = r"EulerDiscreteScheduler does not run such a list \(IndexError"
    with pytest.raises(ValueError, match=message):
        diffusers_arguments(steps, EulerDiscreteScheduler(**SD))


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_schedulers_of_eps_networks_run_planned_schedules(kind, velocity):
    steps = planned(velocity, DDIMSchedule(PATH.betas).nodes(20))
    scheduler = kind(**SD)
    torch.testing.assert_close(run_through(scheduler, steps), steps.times, rtol=0, atol=1e-6)
    expected = PATH.native(steps.times[:-1]).float()
    torch.testing.assert_close(scheduler.timesteps.float(), expected, rtol=0, atol=1e-3)


def test_euler_of_diffusers_makes_our_sample(velocity):
    steps = planned(velocity, DDIMSchedule(PATH.betas).nodes(20))
    scheduler = EulerDiscreteScheduler(**SD)
    run_through(scheduler, steps)
    noise = torch.randn(3, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = noise * steps.start_time / (1 - steps.times[0])

    for t in scheduler.timesteps:
        native = scheduler.scale_model_input(x, t)
        time = PATH.canonical(t.double()).expand(3)
        canonical = native / PATH.scale(time)[:, None]
        eps = canonical + (1 - time)[:, None] * velocity(canonical, time)
        x = scheduler.step(eps, t, x).prev_sample

    ours = sample(Euler(), velocity, noise * steps.start_time, steps)
    torch.testing.assert_close(x, ours, rtol=0, atol=1e-4)


FEW = StepSchedule([0.9, 0.7, 0.5, 0.0])


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler takes no times"),
        (DDIMScheduler(), "DDIMScheduler takes no times; export to oss_scheduler"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "with use_flow_sigmas takes no times"),
        (DPMSolverMultistepScheduler(**SD), "beside the schedule's: it knows whole timesteps only"),
        (
            HeunDiscreteScheduler(**SD),
            "HeunDiscreteScheduler takes 5 steps where the schedule has 3",
        ),
        (UniPCMultistepScheduler(), "Please set `use_flow_sigmas=True`"),
        (
            FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
            "with use_karras_sigmas does not run the sigmas",
        ),
        (
            FlowMatchEulerDiscreteScheduler(shift_terminal=0.1),
            "with shift_terminal does not run the sigmas",
        ),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "shifts by the pipeline's mu"),
        (
            FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
            "steps at random where the schedule's steps are",
        ),
        (EDMEulerScheduler(), "with sigma_schedule does not run the sigmas"),
        (
            DPMSolverMultistepScheduler(use_lu_lambdas=True, **SD),
            "with use_lu_lambdas does not run the sigmas",
        ),
        (
            UniPCMultistepScheduler(use_flow_sigmas=True, final_sigmas_type="sigma_min"),
            "it changes the times it is given; choose another, such as FlowMatchEuler",
        ),
    ],
)
def test_schedulers_that_would_run_other_times_are_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        diffusers_arguments(FEW, scheduler)


# --------------------------------------------------------------------------------------------------
# Lists
# --------------------------------------------------------------------------------------------------


def comfyui_reads(text: str) -> list[float]:
    """Read a list as ComfyUI's node ManualSigmas does, which knows no exponents."""
    return [float(word) for word in re.findall(r"[-+]?(?:\d*\.*\d+)", text)]


@pytest.mark.parametrize("network", ["flow", "eps"])
def test_lists_are_read_back_as_they_were_written(network):
    times = [0.98, 0.7, 1e-5 / 3, 0.0]
    steps = StepSchedule(times)
    sigmas = flow_sigmas(steps) if network == "flow" else ratio_sigmas(steps)
    if network == "eps":
        assert sigmas == pytest.approx([t / (1 - t) for t in times], rel=1e-12)
    back = from_flow_sigmas if network == "flow" else from_ratio_sigmas

    assert comfyui_reads(sigma_text(sigmas)) == sigmas

    for source in (
        sigmas,
        sigma_text(sigmas),
        json.dumps(sigmas),
        json.dumps(comfyui_nodes(sigmas)),
        webui_text(sigmas),
    ):
        torch.testing.assert_close(back(read_sigmas(source)).times, steps.times, rtol=1e-12, atol=0)

    assert back(sigmas).start_time == (1.0 if network == "flow" else pytest.approx(0.98))


def test_a_list_of_the_webui_is_not_stretched():
    """It stretches lists from exactly 1 to 0."""
    first, *others = json.loads(webui_text([1.0, 0.5, 0.0]))
    assert first != 1
    assert first == pytest.approx(1, abs=1e-6)
    assert others == [0.5, 0.0]
    assert webui_text([14.6, 0.00001, 0.0]) == "[14.6, 0.00001, 0.0]"


def test_pure_noise_has_no_finite_sigma_over_alpha():
    with pytest.raises(ValueError, match="first time is 1, where sigma / alpha is infinite"):
        ratio_sigmas(StepSchedule([1.0, 0.5, 0.0]))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("1.0, x, 0", ValueError, r"'x'\); give numbers with commas, noise first"),
        ("[1.0, ..., 0.0]", ValueError, r"no list of sigmas \('\.\.\.'\)"),
        ("", ValueError, "has no numbers"),
        (
            '{"1": {"class_type": "KSampler"}}',
            ValueError,
            "has no node ManualSigmas or CustomSigmas with a list",
        ),
        ("absent.txt", FileNotFoundError, r"absent\.txt does not exist"),
    ],
)
def test_texts_that_are_no_list_are_refused(source, error, message):
    with pytest.raises(error, match=message):
        read_sigmas(source)


# --------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            StepSchedule([0.9, 0.5, 0.0], Analytic(torch.zeros(1, 2))),
            "cannot hold an analytic start",
        ),
        (StepSchedule([[1.0, 0.5, 0.0]], samples=(0,)), "each sample"),
        (
            StepSchedule([1.0, 0.5, 0.0], steps=FittedSteps(torch.ones(2, 4), torch.zeros(1, 2))),
            "cannot hold fitted weights",
        ),
    ],
)
def test_schedules_that_a_list_cannot_hold_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        flow_sigmas(steps)
