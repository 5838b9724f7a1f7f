"""Schedulers of other methods than Euler's ask the network as before, and schedules run."""

import diffusers
import pytest
import torch
from diffusers import CogVideoXDPMScheduler, UniPCMultistepScheduler
from models.pipelines.audio import stable_audio_of
from models.pipelines.videos import cogvideox, wan

import oss_exp
from oss_exp.models.pipeline import Pipeline, decoded
from oss_exp.models.pipeline.convention import NetworkConvention


def velocity_and_calls(family, time: float) -> tuple[torch.Tensor, list]:
    """Return the velocity at a time, and the arguments of the network's calls."""
    model = Pipeline(family.pipe, family.prompts, **family.call)
    calls = []
    x = torch.randn(2, *model.event_shape, generator=torch.Generator().manual_seed(0))
    hook = family.pipe.transformer.register_forward_pre_hook(
        lambda *call: calls.append(call[1:]), with_kwargs=True
    )
    v = model.velocity(None)(x, torch.full((2,), time, dtype=torch.float64))
    hook.remove()
    model.release()

    return v, calls


def cosine_scheduler(**config):
    """The scheduler of Stable Audio, whose own steps need torchsde."""
    pytest.importorskip("torchsde")
    return diffusers.CosineDPMSolverMultistepScheduler(**config)


def runs_as_searched(family) -> oss_exp.OSSScheduler:
    """Search a schedule, run the pipeline with it on its own noises, and return our scheduler."""
    before = family.pipe.scheduler
    steps = oss_exp.search(
        Pipeline(family.pipe, family.prompts, **family.call), num_steps=2, num_teacher_steps=6
    )
    family.pipe.scheduler = ours = steps.scheduler(before)
    prompts = list(family.prompts)
    output = family.pipe(prompts, num_inference_steps=2, output_type="pt", **family.call)
    family.pipe.scheduler = before

    assert decoded(output).isfinite().all()

    return ours


def test_wan_runs_with_its_released_scheduler():
    """Its noise levels are the teacher's nodes, and the first one is pure noise."""
    family = wan()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    family.pipe.scheduler = scheduler
    nodes = Pipeline(family.pipe, family.prompts, **family.call).noise_schedule.nodes(5)
    scheduler.set_timesteps(5)

    assert nodes[0] == 1
    torch.testing.assert_close(nodes[1:], scheduler.sigmas[1:].double())

    runs_as_searched(family)


def test_cogvideox_has_the_same_velocity_with_its_dpm_solver():
    """Its `step` takes other arguments than DDIM's; the velocity is the same."""
    family = cogvideox()
    expected, _ = velocity_and_calls(family, 0.6)
    family.pipe.scheduler = CogVideoXDPMScheduler.from_config(family.pipe.scheduler.config)
    velocity, _ = velocity_and_calls(family, 0.6)
    assert torch.equal(velocity, expected)
    runs_as_searched(family)


def test_the_network_of_stable_audio_gets_the_clock_of_its_scheduler():
    """The clock is 2 atan(sigma) / pi."""
    scheduler = cosine_scheduler()
    _, calls = velocity_and_calls(stable_audio_of(scheduler), 0.7)
    arguments, _ = calls[-1]  # calls before begin the loop
    expected = scheduler.precondition_noise(torch.tensor(0.7 / 0.3))
    torch.testing.assert_close(arguments[1], expected[None])


def test_the_convention_of_stable_audio_is_its_schedulers():
    """It is a v-network: we make the scheduler's x0 of the same answer."""
    scheduler = cosine_scheduler()
    convention = NetworkConvention.from_scheduler(scheduler)
    x, output = torch.randn(2, 2, 4, 24, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.7, 0.7], dtype=torch.float64)
    native = x / 0.3
    sigma = torch.tensor(0.7 / 0.3)

    network_input, _ = convention.network_input(x, t)
    x0 = x - 0.7 * convention.velocity(output, x, t)

    torch.testing.assert_close(network_input, scheduler.precondition_inputs(native, sigma))
    torch.testing.assert_close(x0, scheduler.precondition_outputs(native, output, sigma))


def test_stable_audio_runs_a_searched_schedule():
    scheduler = cosine_scheduler()
    family = stable_audio_of(scheduler)

    # The teacher's nodes are the scheduler's noise levels.
    nodes = Pipeline(family.pipe, family.prompts, **family.call).noise_schedule.nodes(5)
    scheduler.set_timesteps(5)
    sigmas = scheduler.sigmas[:5].double()
    torch.testing.assert_close(nodes[:5], sigmas / (1 + sigmas), rtol=0, atol=1e-6)

    ours = runs_as_searched(family)
    torch.testing.assert_close(ours.timesteps, scheduler.precondition_noise(ours.sigmas[:-1]))


def test_a_scheduler_of_another_preconditioning_is_refused():
    with pytest.raises(ValueError, match="CosineDPMSolverMultistepScheduler is known with"):
        NetworkConvention.from_scheduler(cosine_scheduler(sigma_data=0.5))
