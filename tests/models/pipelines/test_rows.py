"""NFE of a pipeline: the rows that its denoiser really sees."""

import pytest
import torch
from diffusers import ControlNetModel, EulerDiscreteScheduler, StableDiffusionControlNetPipeline
from models.pipelines.audio import longcat_audio
from models.pipelines.images import SD_BETAS, SMALL, chroma, flux, stable_diffusion, unet
from models.pipelines.parts import Family, clip, image_vae, lively, pictures
from models.pipelines.videos import ltx, wan, wan_two_experts

from oss_exp.models.pipeline import Pipeline
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, nfe, sample


def stable_diffusion_controlnet() -> Family:
    encoder, tokenizer = clip()
    network = unet()
    control = ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(8, 8))
    pipe = StableDiffusionControlNetPipeline(
        image_vae(4), encoder, tokenizer, network, control, EulerDiscreteScheduler(**SD_BETAS), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    return Family(lively(pipe), {**SMALL, "image": pictures(2, 24)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "call", "rows"),
    [
        (flux, {}, 1),  # its guidance is a number that the network takes
        (stable_diffusion, {}, 2),  # a batch of twice the rows
        (stable_diffusion, {"guidance_scale": 1.0}, 1),
        (ltx, {}, 2),
        (wan, {}, 2),  # two calls
        (chroma, {}, 2),
        (longcat_audio, {}, 2),
        (wan_two_experts, {}, 2),
        (wan_two_experts, {"guidance_scale": 1.0}, 1),
        (stable_diffusion_controlnet, {}, 2),  # a ControlNet is not the denoiser
    ],
)
def test_rows_that_the_denoiser_sees(make, call, rows):
    family = make()
    model = Pipeline(family.pipe, family.prompts, **family.call | call)
    steps = StepSchedule(torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64))
    velocity = model.velocity(None)
    assert nfe(Euler(), steps, velocity) == 3 * 1  # nothing is known yet
    sample(Euler(), velocity, torch.ones(2, *model.event_shape), steps)
    assert nfe(Euler(), steps, velocity) == 3 * rows
    model.release()
