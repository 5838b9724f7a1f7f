"""The shipped folder of scenes is a real pipeline of diffusers, and `model=flux_scenes` is it."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

import oss_exp
from oss_exp.cli import CONF
from oss_exp.data.scenes import wishes
from oss_exp.files import sha256
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
    with initialize_config_dir(str(CONF), version_base="1.3"):
        model = compose("config", ["model=flux_scenes", *overrides]).model
    return instantiate(model, prompts=PROMPTS)


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_both_draw_the_same_pictures(pipe):
    x = noise(len(PROMPTS))
    expected = pipe(
        PROMPTS,
        latents=pipe._pack_latents(x, *x.shape),
        sigmas=list(TIMES[:-1]),
        num_inference_steps=4,
        output_type="pt",
        **CALL,
    ).images
    found = flux_scenes().generate(Euler(), StepSchedule(TIMES), x, torch.arange(len(PROMPTS)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_guidance_is_its_true_cfg(pipe):
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
    found = guided.generate(Euler(), StepSchedule(TIMES), x, torch.arange(1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_transformer_is_that_of_its_record(pipe):
    folder = oss_exp.ASSETS / "scenes_pipeline" / "transformer"
    record = json.loads((folder / "training.json").read_text())
    assert sha256((folder / record["file"]).read_bytes()) == record["sha256"]
    assert pipe.transformer.num_parameters() == record["parameters"]
    assert record["made_by"].startswith(
        "oss-exp task=pretrain task.optimizer=muon model=flux_scenes"
    )
    assert record["training"]["seconds"] > 600


@torch.no_grad()
def test_prompts_are_encoded_as_the_pipeline_does(pipe):
    texts, pooled, _ = pipe.encode_prompt(PROMPTS, None, max_sequence_length=12)
    tables = flux_scenes().backbone
    torch.testing.assert_close(tables.text[:-1], texts, rtol=0, atol=1e-6)
    torch.testing.assert_close(tables.pooled[:-1], pooled, rtol=0, atol=1e-6)


def test_a_search_for_the_pipeline_beats_its_own_times(pipe):
    model = oss_exp.Pipeline(pipe, PROMPTS[:2], **CALL)
    strategies = {
        "own": oss_exp.ClosedForm(model.noise_schedule),
        "searched": oss_exp.OSSShared(start="pinned", band=None, refine=False),
    }
    table = oss_exp.compare(
        model, num_steps=4, num_teacher_steps=16, strategies=strategies, held_out=4, progress=False
    )
    decibels = {row["strategy"]: row["psnr"]["mean"] for row in table.rows}
    assert decibels["searched"] > decibels["own"] + 3


def test_every_caption_is_read_whole(pipe):
    captions = sorted({wish["prompt"] for listed in wishes().values() for wish in listed})
    for tokenizer, length in ((pipe.tokenizer, 16), (pipe.tokenizer_2, 12)):
        tokens = tokenizer(captions)["input_ids"]
        assert max(map(len, tokens)) <= length
        assert len({tuple(row) for row in tokens}) == len(captions)
