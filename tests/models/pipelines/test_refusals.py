"""A search of a pipeline refuses what it cannot do, and survives errors of the network."""

import functools
import gc
import random
import re
import resource
import traceback

import pytest
import torch
from diffusers import (
    DDPMWuerstchenScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableCascadeCombinedPipeline,
    StableDiffusionImg2ImgPipeline,
)
from models.pipelines import edits, images
from models.pipelines.parts import PROMPTS, Family

import oss_exp
from oss_exp.models.pipeline import Pipeline
from oss_exp.models.pipeline.loop import Loop
from oss_exp.models.tiny import tiny
from oss_exp.solvers import Euler


@pytest.fixture(scope="module")
def stable_diffusion() -> Family:
    torch.manual_seed(0)
    return images.stable_diffusion()


def search(
    family: Family, num_steps: int = 2, num_teacher_steps: int = 4, **call
) -> oss_exp.StepSchedule:
    model = Pipeline(family.pipe, family.prompts, **family.call | call)
    return oss_exp.search(
        model, num_steps=num_steps, num_teacher_steps=num_teacher_steps, solver=Euler()
    )


def test_consistency_models_are_refused(stable_diffusion):
    parts = dict(stable_diffusion.pipe.components)
    del parts["image_encoder"]
    parts["scheduler"] = LCMScheduler(**images.SD_BETAS)
    pipe = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ValueError, match="LCMScheduler is of consistency models"):
        oss_exp.search(pipe, prompts=PROMPTS)


def test_cascades_are_refused():
    names = ("tokenizer", "text_encoder", "decoder", "vqgan")
    names += ("prior_prior", "prior_text_encoder", "prior_tokenizer")
    schedulers = {
        "scheduler": DDPMWuerstchenScheduler(),
        "prior_scheduler": DDPMWuerstchenScheduler(),
    }
    pipe = StableCascadeCombinedPipeline(**dict.fromkeys(names), **schedulers)
    message = "StableCascadeCombinedPipeline is a cascade, of scheduler, prior_scheduler"
    with pytest.raises(ValueError, match=message):
        oss_exp.search(pipe, prompts=PROMPTS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"height": 25},
            "the call of StableDiffusionPipeline fails: "
            "`height` and `width` have to be divisible by 8",
        ),
        ({"negative_prompt": ["dull"] * 3}, "negative_prompt has 3 entries for 2 prompts"),
        ({"prompt": "a hat"}, "prompt and class_labels of the call are the model's prompts"),
        ({"num_inference_steps": 4}, "num_inference_steps of the call is for the search to choose"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt must be 1"),
    ],
)
def test_calls_that_do_not_fit_are_refused(stable_diffusion, call, message):
    scheduler = stable_diffusion.pipe.scheduler
    with pytest.raises(ValueError, match=re.escape(message)):
        search(stable_diffusion, **call)
    assert stable_diffusion.pipe.scheduler is scheduler


def test_a_pipeline_that_needs_no_arguments_is_searched_by_its_prompts(monkeypatch):
    pipe, call = tiny("StableDiffusionXLPipeline", {})
    method = type(pipe).__call__  # at the size of its tiny parts
    at_its_size = functools.wraps(method)(lambda *a, **given: method(*a, **given | call))
    monkeypatch.setattr(type(pipe), "__call__", at_its_size)

    steps = oss_exp.search(pipe, prompts=["a red boot"], num_steps=8, num_teacher_steps=12)
    pipe.scheduler = steps.scheduler(pipe.scheduler)
    assert steps.num_steps == 8
    assert pipe("a blue bag", num_inference_steps=8).images[0].size[0] > 0


def test_guidance_that_has_no_effect_is_refused():
    pipe = DiffusionPipeline.from_pretrained(oss_exp.ASSETS / "scenes_pipeline")
    call = {"height": 64, "width": 64, "max_sequence_length": 12, "true_cfg_scale": 8.0}
    with pytest.raises(ValueError, match=r"true_cfg_scale=8\.0 does nothing without a negative"):
        Pipeline(pipe, ["a red boot"], **call)
    Pipeline(pipe, ["a red boot"], **call, negative_prompt="")


def test_arguments_that_count_steps_are_refused():
    family = edits.control_net_stable_diffusion()
    with pytest.raises(ValueError, match="control_guidance_end counts steps"):
        search(family, control_guidance_end=0.5)


@pytest.mark.parametrize("prompts", [[], "", "a red boot"])
def test_prompts_that_are_no_list_are_refused(stable_diffusion, prompts):
    with pytest.raises(ValueError, match="prompts must be a list of one or more"):
        oss_exp.search(stable_diffusion.pipe, prompts=prompts)


def test_more_steps_than_the_teachers_are_refused(stable_diffusion):
    with pytest.raises(ValueError, match="num_steps must be whole numbers from 1 to 4"):
        search(stable_diffusion, num_steps=5)


def test_a_scheduler_of_a_schedule_is_refused(stable_diffusion):
    scheduler = stable_diffusion.pipe.scheduler
    stable_diffusion.pipe.scheduler = search(stable_diffusion).scheduler(scheduler)
    try:
        with pytest.raises(ValueError, match="the pipeline's scheduler is an OSSScheduler"):
            search(stable_diffusion)
    finally:
        stable_diffusion.pipe.scheduler = scheduler


@pytest.mark.parametrize("strength", [-0.1, 0, 1.5, "0.6", True])
def test_a_strength_out_of_range_is_refused(stable_diffusion, strength):
    image_to_image = StableDiffusionImg2ImgPipeline(**stable_diffusion.pipe.components)
    with pytest.raises(ValueError, match="strength must be a number above 0 and at most 1"):
        oss_exp.Pipeline(image_to_image, PROMPTS, strength=strength)


def test_a_schedule_of_another_kind_of_network_is_refused(stable_diffusion):
    steps = search(stable_diffusion)
    with pytest.raises(
        ValueError, match=r"searched on a network of noise prediction, and FlowMatchEuler"
    ):
        steps.scheduler(FlowMatchEulerDiscreteScheduler())
    for scheduler in (None, type(stable_diffusion.pipe.scheduler), {}):
        with pytest.raises(ValueError, match="own must be a scheduler of diffusers"):
            steps.scheduler(scheduler)


def test_a_network_that_returns_nan_is_refused(stable_diffusion):
    hook = stable_diffusion.pipe.unet.register_forward_hook(
        lambda module, arguments, output: (output[0] * float("nan"),)
    )
    try:
        with pytest.raises(ValueError, match="returns NaN or infinity at its first step"):
            search(stable_diffusion)
    finally:
        hook.remove()


class Fault:
    """A forward hook that raises at one of the network's calls."""

    def __init__(self, call: int, error: type[BaseException]):
        self.calls = call
        self.error = error

    def __call__(self, *_: object) -> None:
        self.calls -= 1
        if self.calls == 0:
            raise self.error("a fault in the network")


def test_an_error_of_the_network_reaches_the_user_and_the_pipeline_goes_on(stable_diffusion):
    before = search(stable_diffusion)
    hook = stable_diffusion.pipe.unet.mid_block.register_forward_hook(Fault(5, RuntimeError))
    with pytest.raises(RuntimeError, match="a fault in the network") as caught:
        search(stable_diffusion)
    hook.remove()
    places = {frame.name for frame in traceback.extract_tb(caught.value.__traceback__)}
    assert {"__call__", "forward"} <= places  # of the pipeline and of its network
    assert torch.equal(search(stable_diffusion).times, before.times)


@pytest.mark.slow
def test_many_failures_leave_nothing():
    """Errors and Ctrl-C come at random calls of the network."""
    torch.manual_seed(0)
    family = images.dit()
    draw = random.Random(0)
    scheduler = family.pipe.scheduler
    keys = set(family.pipe.__dict__)
    memory: list[int] = []

    # Failures.

    for number in range(200):
        error = draw.choice([RuntimeError, ValueError, KeyboardInterrupt])
        hook = family.pipe.transformer.register_forward_hook(Fault(draw.randrange(1, 13), error))
        with pytest.raises(error, match="a fault in the network"):
            search(family)
        hook.remove()
        if number in (49, 199):
            gc.collect()
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            loops = [loop for loop in gc.get_objects() if isinstance(loop, Loop)]
            assert all(loop.dead for loop in loops)

    assert family.pipe.scheduler is scheduler
    assert set(family.pipe.__dict__) == keys
    assert not family.pipe.transformer._forward_hooks
    assert memory[1] - memory[0] < 20_000  # KiB
    assert search(family).num_steps == 2
