"""Schedules through other programs' own samplers: the times that come out are those that went in."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from oss_exp.cli import CONF
from oss_exp.export import diffusers_sigmas, flow_sigmas, from_flow_sigmas
from oss_exp.models.flux import flux_shift
from oss_exp.solvers import Euler, sample
from oss_exp.steps import StepSchedule
from oss_exp.stepsize.published import OSSComfyUI

PRESETS = {"flux": 10, "wan": 20, "chroma": 40}
MU = math.log(flux_shift(1024, 1024))
SCHEDULERS = {
    "no shift": (FlowMatchEulerDiscreteScheduler(shift=1.0), None),
    "shift 3": (FlowMatchEulerDiscreteScheduler(shift=3.0), None),
    "shift 8": (FlowMatchEulerDiscreteScheduler(shift=8.0), None),
    "FLUX": (FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), MU),
    "linear": (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"), 2.5),
    "Wan": (UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction"), None),
}


@pytest.fixture(params=PRESETS)
def preset(request, tmp_path) -> StepSchedule:
    """As a run plans, writes and reads it."""
    table = request.param
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["stepsize=oss_comfyui", f"stepsize.oss_comfyui.schedule.table={table}"]
        schedule = instantiate(compose("config", overrides).stepsize.oss_comfyui.schedule)
    nodes = schedule.nodes(PRESETS[table])
    StepSchedule(nodes, "pinned", float(nodes[0])).save(tmp_path / "preset.json")
    return StepSchedule.load(tmp_path / "preset.json")


def test_a_preset_is_the_published_list(preset):
    """Its last level is where samplers put 0."""
    assert flow_sigmas(preset)[:-1] == list(
        OSSComfyUI.tables[next(k for k, n in PRESETS.items() if n == preset.num_steps)][:-1]
    )
    assert flow_sigmas(preset)[-1] == 0


def test_there_and_back_is_the_same(preset):
    again = from_flow_sigmas(json.loads(json.dumps(flow_sigmas(preset))), made_by="ComfyUI")
    assert torch.equal(again.times, preset.times)
    assert again.provenance == {"made_by": "ComfyUI"}
    published = OSSComfyUI.tables["flux"]
    assert from_flow_sigmas(published).times.tolist() == [*published[:-1], 0.0]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_real_scheduler_runs_the_times_that_are_meant(preset, name):
    scheduler, mu = SCHEDULERS[name]
    sigmas = diffusers_sigmas(preset, scheduler.config, mu)
    scheduler.set_timesteps(sigmas=np.array(sigmas), mu=mu)
    expected = preset.times.clone()
    if name == "Wan" and expected[0] == 1:
        expected[0] -= 1e-6  # so that its logarithm is finite
    torch.testing.assert_close(scheduler.sigmas.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["shift 3", "FLUX"])
def test_a_real_scheduler_makes_our_sample(preset, name):
    scheduler, mu = SCHEDULERS[name]
    scheduler.set_timesteps(sigmas=diffusers_sigmas(preset, scheduler.config, mu), mu=mu)
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (x * (3 * t.view(-1, 1, 1)).cos() - t.view(-1, 1, 1) ** 2).float()

    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t.expand(2) / 1000), t, x).prev_sample
    ours = sample(Euler(), velocity, noise, from_flow_sigmas(flow_sigmas(preset)))
    torch.testing.assert_close(x, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "mu", "message"),
    [
        ({"use_karras_sigmas": True}, None, "with use_karras_sigmas does not run the sigmas"),
        ({"shift_terminal": 0.1}, None, "with shift_terminal does not run the sigmas"),
        ({"use_dynamic_shifting": True}, None, "shifts by the pipeline's mu"),
        ({"use_flow_sigmas": False}, None, "build it with use_flow_sigmas=True"),
    ],
)
def test_schedulers_with_times_of_their_own_are_refused(settings, mu, message):
    with pytest.raises(ValueError, match=message):
        diffusers_sigmas(StepSchedule([1.0, 0.5, 0.0]), settings, mu)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (StepSchedule([0.9, 0.5, 0.0], "analytic", mean=torch.zeros(1, 2)), "an analytic start"),
        (StepSchedule([1.0, 0.5, 0.0], orders=torch.tensor([1, 2])), "orders above 1"),
        (StepSchedule([[1.0, 0.5, 0.0]], samples=(0,)), "each sample"),
        (StepSchedule([1.0, 0.5, 0.0], weights=torch.ones(2, 4), mean=torch.zeros(1, 2)), "fitted weights"),
    ],
)
def test_what_a_list_cannot_hold_is_refused(steps, message):
    with pytest.raises(ValueError, match=f"cannot hold {message}" if "each" not in message else message):
        flow_sigmas(steps)
    assert flow_sigmas(StepSchedule([1.0, 0.5, 0.0], orders=torch.tensor([1, 1]))) == [1.0, 0.5, 0.0]
