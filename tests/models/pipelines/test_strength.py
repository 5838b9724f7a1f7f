"""Image-to-image: a search that begins at an image under noise."""

import re

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FluxImg2ImgPipeline,
    HeunDiscreteScheduler,
    QwenImageImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    ZImageImg2ImgPipeline,
)
from models.pipelines import images
from models.pipelines.edits import SMALL, exact, image, mask
from models.pipelines.parts import PROMPTS, Family

import oss_exp
from oss_exp.models.pipeline import Pipeline, decoded
from oss_exp.models.tiny import images as tiny
from oss_exp.models.tiny.images import SD_BETAS, stable_diffusion_parts
from oss_exp.models.tiny.parts import lively
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, sample

GUIDED = {"guidance_scale": 3.0}


def stable_diffusion(strength: float, scheduler=None) -> Family:
    pipe = StableDiffusionImg2ImgPipeline(**stable_diffusion_parts(scheduler))
    return Family(exact(lively(pipe)), GUIDED | pictures(strength))


def stable_diffusion_ddim(strength: float) -> Family:
    """Stable Diffusion with a scheduler that does not know where the loop begins."""
    return stable_diffusion(
        strength, DDIMScheduler(**SD_BETAS, set_alpha_to_one=True, clip_sample=False)
    )


def stable_diffusion_xl(strength: float) -> Family:
    pipe = StableDiffusionXLImg2ImgPipeline(
        **tiny.stable_diffusion_xl_parts(), add_watermarker=False
    )
    return Family(exact(lively(pipe)), GUIDED | pictures(strength))


def stable_diffusion_3(strength: float) -> Family:
    pipe = StableDiffusion3Img2ImgPipeline(*tiny.stable_diffusion_3_parts())
    return Family(exact(lively(pipe)), SMALL | {"max_sequence_length": 16} | pictures(strength))


def flux(strength: float) -> Family:
    """FLUX, which packs its states after the noise is added."""
    pipe = FluxImg2ImgPipeline(*tiny.flux_parts(), tiny.flux_transformer(32))
    call = {"guidance_scale": 3.0, "max_sequence_length": 16}
    return Family(
        exact(lively(pipe)), call | {"height": 48, "width": 32} | pictures(strength, 48, 32)
    )


def inpainting(strength: float) -> Family:
    """Inpainting whose loop restores the image outside of the mask."""
    pipe = StableDiffusionInpaintPipeline(**stable_diffusion_parts())
    return Family(
        exact(lively(pipe)), SMALL | pictures(strength) | {"mask_image": mask()}, atol=1e-3
    )


def of_text_to_image(kind, family: Family, strength: float, *size: int) -> Family:
    """The image-to-image pipeline of a text-to-image pipeline's parts."""
    call = {name: value for name, value in family.call.items() if name not in ("height", "width")}
    sizes = {"height": size[0], "width": size[1]}
    return Family(exact(kind(**family.pipe.components)), call | sizes | pictures(strength, *size))


def z_image(strength: float) -> Family:
    return of_text_to_image(ZImageImg2ImgPipeline, images.z_image(), strength, 32, 32)


def qwen_image(strength: float) -> Family:
    return of_text_to_image(QwenImageImg2ImgPipeline, images.qwen_image(), strength, 32, 32)


def pictures(strength: float, *size: int) -> dict:
    """The call's image for each prompt, and the strength."""
    return {"image": list(image(*size or (24, 24), count=2).split(1)), "strength": strength}


FAMILIES = [
    stable_diffusion,
    stable_diffusion_ddim,
    stable_diffusion_xl,
    stable_diffusion_3,
    flux,
    inpainting,
    z_image,
    qwen_image,
]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda make: make.__name__)
def family(request) -> Family:
    torch.manual_seed(0)
    return request.param(0.6)


def pipeline_output(family: Family, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pipeline's pictures and the noise that it draws, as its scheduler sees it."""
    scheduler = family.pipe.scheduler
    drawn = []

    def add_noise(original, noise, timesteps):
        drawn.append(noise)
        return type(scheduler).add_noise(scheduler, original, noise, timesteps)

    def scale_noise(sample, timestep, noise):
        drawn.append(noise)
        return type(scheduler).scale_noise(scheduler, sample, timestep, noise)

    scheduler.add_noise = add_noise
    scheduler.scale_noise = scale_noise
    draws = [torch.Generator().manual_seed(i) for i in range(2)]
    call = family.call | {"prompt": list(PROMPTS), "generator": draws, "output_type": "pt"}

    try:
        output = decoded(family.pipe(**call, num_inference_steps=num_steps))
    finally:
        del scheduler.add_noise, scheduler.scale_noise

    return output, drawn[0]


def test_on_its_own_times_the_samples_are_the_pipelines_own(family):
    model = Pipeline(family.pipe, family.prompts, **family.call)
    grid = model.noise_schedule.nodes(6)
    expected, noise = pipeline_output(family, model.inference_steps(6)[0])
    assert 0.2 < grid[0] < 0.95
    start = packed(family, noise) * float(grid[0])
    result = model.decode(sample(Euler(), model.velocity(None), start, StepSchedule(grid)))
    torch.testing.assert_close(result, expected, rtol=0, atol=family.atol)


def packed(family: Family, noise: torch.Tensor) -> torch.Tensor:
    """Pack noise as the loop's scheduler sees it."""
    if "Flux" in type(family.pipe).__name__ or "Qwen" in type(family.pipe).__name__:
        return family.pipe._pack_latents(noise, len(noise), noise.shape[-3], *noise.shape[-2:])
    return noise


@pytest.fixture(scope="module")
def searched(family) -> tuple[Pipeline, StepSchedule]:
    """A model and its schedule of 3 steps."""
    model = Pipeline(family.pipe, family.prompts, **family.call)
    return model, oss_exp.search(model, num_steps=3, num_teacher_steps=12)


@pytest.fixture
def scheduled(family, searched, monkeypatch) -> None:
    """The family's pipeline runs the searched schedule."""
    _, steps = searched
    monkeypatch.setattr(family.pipe, "scheduler", steps.scheduler(family.pipe.scheduler))


def test_a_searched_schedule_runs_in_the_pipeline(family, searched, scheduled, monkeypatch):
    """It runs with as many steps as it was searched for."""
    model, steps = searched
    calls = []
    network = getattr(family.pipe, "unet", None) or family.pipe.transformer
    hook = network.register_forward_hook(lambda *_: calls.append(1))
    result, noise = pipeline_output(family, 3)
    hook.remove()
    monkeypatch.undo()

    assert steps.start_time < 1
    assert steps.about("native")["num_inference_steps"] == 3
    assert len(calls) in (3, 6)  # one call a step, or two under guidance
    x0 = oss_exp.sample(model, packed(family, noise), steps)
    torch.testing.assert_close(result, model.decode(x0), rtol=0, atol=family.atol)


def test_a_call_with_other_steps_or_strength_is_refused(family, scheduled, monkeypatch):
    with pytest.raises(ValueError, match=re.escape("num_inference_steps=3 and strength=0.6")):
        pipeline_output(family, 7)
    monkeypatch.setitem(family.call, "strength", 0.3)
    message = r"the schedule begins at an image; call .* strength=0\.6"
    with pytest.raises(ValueError, match=message):
        pipeline_output(family, 3)


def test_a_strength_that_leaves_no_step_needs_more_steps():
    """A tenth of 1 step is none; the schedule tells how many leave 1."""
    torch.manual_seed(0)
    family = flux(0.1)
    model = Pipeline(family.pipe, family.prompts, **family.call)
    steps = oss_exp.search(model, num_steps=1, num_teacher_steps=4)
    num_steps = steps.about("native")["num_inference_steps"]
    original = family.pipe.scheduler

    family.pipe.scheduler = steps.scheduler(original)
    with pytest.raises(ValueError, match=f"set num_inference_steps={num_steps} and strength=0.1"):
        pipeline_output(family, 11)
    result, noise = pipeline_output(family, num_steps)

    family.pipe.scheduler = original
    expected = model.decode(oss_exp.sample(model, packed(family, noise), steps))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_fitted_steps_need_the_image():
    torch.manual_seed(0)
    family = stable_diffusion(0.6)
    model = Pipeline(family.pipe, family.prompts, **family.call)
    steps = oss_exp.search(
        model, num_steps=2, num_teacher_steps=4, strategy=oss_exp.OSSFit(start="pinned")
    )
    with pytest.raises(ValueError, match="begins at an image, and has pinned start, fitted steps"):
        steps.scheduler(family.pipe.scheduler)


@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, DPMSolverMultistepScheduler])
def test_a_teacher_of_second_order_cuts_whole_steps(kind):
    torch.manual_seed(0)
    family = stable_diffusion(0.6, kind(**SD_BETAS))
    model = Pipeline(family.pipe, family.prompts, **family.call)
    assert model.native(torch.linspace(1, 0, 6))["begin_index"] == 2
    assert len(model.noise_schedule.nodes(9)) == 10


def test_a_strength_of_an_unknown_meaning_is_refused():
    family = images.stable_diffusion()
    family.pipe.__class__ = type("Odd", (type(family.pipe),), {"__call__": with_strength})
    with pytest.raises(ValueError, match=r"strength=0.5 of Odd starts inside"):
        oss_exp.search(Pipeline(family.pipe, family.prompts, **family.call, strength=0.5))


def with_strength(
    self, prompt=None, height=24, width=24, guidance_scale=1.0, strength=1.0, generator=None, **call
):
    base = type(self).__mro__[1]
    return base.__call__(
        self, prompt, height, width, guidance_scale=guidance_scale, generator=generator, **call
    )
