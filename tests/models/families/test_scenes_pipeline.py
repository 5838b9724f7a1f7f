"""The shipped folder of scenes is a pipeline of diffusers, and the same as `model=flux_scenes`."""

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from hydra.utils import instantiate
from models.common import composed

import oss_exp
from oss_exp.data.scenes import wishes
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler

PROMPTS = ["a red bag left of a boot", "three shirts", "an orange t-shirt and a purple dress"]
TIMES = (1.0, 0.7, 0.4, 0.1, 0.0)
CALL = {"height": 64, "width": 64, "max_sequence_length": 12, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    pipe = DiffusionPipeline.from_pretrained(
        oss_exp.ASSETS / "scenes_pipeline", torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_scenes(*overrides: str):
    """Load the model of the scenes."""
    return instantiate(composed("model=flux_scenes", *overrides).model, prompts=PROMPTS)


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 8, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_pipeline_and_the_model_draw_the_same_pictures(pipe):
    x = noise(len(PROMPTS))
    expected = pipe(
        PROMPTS,
        latents=pipe._pack_latents(x, *x.shape),
        sigmas=list(TIMES[:-1]),
        num_inference_steps=4,
        output_type="pt",
        **CALL,
    ).images

    pictures = flux_scenes().generate(Euler(), StepSchedule(TIMES), x, torch.arange(len(PROMPTS)))
    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_guidance_is_the_pipelines_true_cfg(pipe):
    x = noise(1)

    expected = pipe(
        PROMPTS[:1],
        negative_prompt="",
        true_cfg_scale=3.0,
        latents=pipe._pack_latents(x, *x.shape),
        sigmas=list(TIMES[:-1]),
        num_inference_steps=4,
        output_type="pt",
        **CALL,
    ).images

    guided = flux_scenes("model.guidance.scale=3")
    pictures = guided.generate(Euler(), StepSchedule(TIMES), x, torch.arange(1))
    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-4)


def test_every_caption_is_read_whole(pipe):
    captions = sorted({wish["prompt"] for listed in wishes().values() for wish in listed})
    for tokenizer, length in ((pipe.tokenizer, 16), (pipe.tokenizer_2, 12)):
        tokens = tokenizer(captions)["input_ids"]
        assert max(map(len, tokens)) <= length
        assert len({tuple(row) for row in tokens}) == len(captions)
