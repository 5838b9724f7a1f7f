"""Schedulers whose own steps are not Euler's: the network is asked as they ask it, and the searched schedule runs."""

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
    """A velocity, and the arguments of the network's calls for it."""
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
    """That of Stable Audio, whose own steps need torchsde."""
    pytest.importorskip("torchsde")
    return diffusers.CosineDPMSolverMultistepScheduler(**config)


def runs_as_searched(family) -> oss_exp.OSSScheduler:
    """The three lines, on noises that the pipeline draws itself."""
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


def test_wan_as_it_is_released():
    """UniPC tells the network whole numbers; its noise levels are the teacher's nodes, the first is pure noise."""
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


def test_cogvideox_with_the_dpm_solver():
    """Its `step` takes other arguments than that of DDIM; the answers are the same."""
    family = cogvideox()
    expected, _ = velocity_and_calls(family, 0.6)
    family.pipe.scheduler = CogVideoXDPMScheduler.from_config(family.pipe.scheduler.config)
    velocity, _ = velocity_and_calls(family, 0.6)
    assert torch.equal(velocity, expected)
    runs_as_searched(family)


def test_stable_audio_as_it_is_released():
    """A v-network with the clock 2 atan(sigma) / pi: its scheduler makes x0 of the same answer as we do."""
    scheduler = cosine_scheduler()
    family = stable_audio_of(scheduler)
    t = torch.tensor([0.7, 0.7], dtype=torch.float64)
    _, [*_, (arguments, _)] = velocity_and_calls(
        family, 0.7
    )  # the last: those before begin the call
    sigma = torch.tensor(0.7 / 0.3)

    torch.testing.assert_close(arguments[1], scheduler.precondition_noise(sigma)[None])

    x, output = (
        torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(i)) for i in range(2)
    )
    convention = NetworkConvention.from_scheduler(scheduler)
    native = x / 0.3

    torch.testing.assert_close(
        convention.network_input(x, t)[0], scheduler.precondition_inputs(native, sigma)
    )

    x0 = x - 0.7 * convention.velocity(output, x, t)
    torch.testing.assert_close(x0, scheduler.precondition_outputs(native, output, sigma))

    nodes = Pipeline(family.pipe, family.prompts, **family.call).noise_schedule.nodes(5)
    scheduler.set_timesteps(5)
    sigmas = scheduler.sigmas[:5].double()

    torch.testing.assert_close(nodes[:5], sigmas / (1 + sigmas), rtol=0, atol=1e-6)

    ours = runs_as_searched(family)
    torch.testing.assert_close(ours.timesteps, scheduler.precondition_noise(ours.sigmas[:-1]))


def test_a_scheduler_of_another_preconditioning_is_refused():
    with pytest.raises(ValueError, match="CosineDPMSolverMultistepScheduler is known with"):
        NetworkConvention.from_scheduler(cosine_scheduler(sigma_data=0.5))
