"""Wan 2.1 behind canonical time, against diffusers itself on folders that it wrote."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from helpers import run_cli
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from oss_exp.cli import CONF
from oss_exp.distances import XtMSE
from oss_exp.models.families.wan import Wan
from oss_exp.models.guidance import Guidance
from oss_exp.noise import FlowSchedule
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler
from oss_exp.stepsize import Problem

PROMPTS = ["a red bicycle", "two  cats &amp; a dog", "a bowl of oranges " * 60]  # the last is too long
FRAMES, HEIGHT, WIDTH = 9, 16, 48
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def yaml():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", ["model=wan2_1_1_3b", "data=prompts"])


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("OSS_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> WanPipeline:
    """Of random weights, and not of the sizes of model.size=tiny; `name_or_path` is its folder."""
    torch.manual_seed(0)
    words = [(word, -3.0) for word in ("<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz&;", "▁cats")]
    text = {"vocab_size": 40, "d_model": 20, "d_kv": 5, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    parts = WanPipeline(
        tokenizer=T5Tokenizer(vocab=words, extra_ids=0),
        text_encoder=UMT5EncoderModel(UMT5Config(**text, feed_forward_proj="gated-gelu")),
        vae=AutoencoderKLWan(
            base_dim=4, z_dim=8, dim_mult=[1, 2, 1, 2], num_res_blocks=1, latents_mean=[0.1] * 8, latents_std=[2.0] * 8
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=WanTransformer3DModel(
            num_attention_heads=3,
            attention_head_dim=12,
            in_channels=8,
            out_channels=8,
            text_dim=20,
            freq_dim=24,
            ffn_dim=40,
            num_layers=2,
        ),
    )
    for part in (parts.transformer, parts.text_encoder):
        part.eval()
        for weight in part.parameters():
            weight.data += 0.05 * torch.randn_like(weight)  # nothing is zero, and prompts make a difference
    folder = tmp_path_factory.mktemp("pipeline")
    parts.save_pretrained(folder)
    parts.set_progress_bar_config(disable=True)
    parts.register_to_config(_name_or_path=str(folder))
    return parts


@pytest.fixture
def copy(pipeline, tmp_path) -> Path:
    """Its folder, to change."""
    return Path(shutil.copytree(pipeline.config._name_or_path, tmp_path / "copy"))


@pytest.fixture
def build(yaml, pipeline):
    """model=wan2_1_1_3b of the pipeline's folder and PROMPTS."""

    def make(**changes) -> Wan:
        settings = {"checkpoint": pipeline.config._name_or_path, "prompts": PROMPTS, "dtype": "float32"}
        settings |= {"frames": FRAMES, "height": HEIGHT, "width": WIDTH}
        return instantiate(yaml.model, **(settings | changes))

    return make


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 8, 3, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------------------------------------
# The network and the sampler
# --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_network_gives_diffusers_velocity_at_any_time(build, pipeline):
    model, x = build(guidance=Guidance()), noise(3)
    text, _ = pipeline.encode_prompt(PROMPTS, None, False, max_sequence_length=512)
    assert text[0].abs().sum(1).count_nonzero() < 20  # 0 beyond the prompt
    torch.testing.assert_close(model.backbone.text[:3], text, rtol=0, atol=1e-6)
    t = torch.tensor([0.0031, 0.4567, 0.99893], dtype=torch.float64)
    expected = pipeline.transformer(x, (1000 * t).float(), text).sample
    found = model.velocity(torch.arange(3))(x, t)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    beside = model.velocity(torch.arange(3))(x, t + 2e-4)  # rounded to the same whole number, or the next
    assert (found - beside).abs().amax((1, 2, 3, 4)).min() > 1e-4
    assert (found - model.velocity(torch.tensor([1, 0, 0]))(x, t)).abs().amax((1, 2, 3, 4)).min() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("negative", ["", "blurred"])
@torch.no_grad()
def test_videos_are_those_of_the_whole_pipeline(build, pipeline, negative):
    model, z = build(negative_prompt=negative), noise(3)
    ask = {"negative_prompt": negative, "num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "latents": z}
    ask |= {"num_inference_steps": 5, "guidance_scale": 5.0}
    expected = pipeline(PROMPTS, output_type="latent", return_dict=False, **ask)[0]
    times = pipeline.scheduler.sigmas.double()
    schedule = StepSchedule(times)
    decoded, model.decoder = model.decoder, torch.nn.Identity()
    latents = model.generate(Euler(), schedule, z, torch.arange(3))
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    assert (latents - z).std() > 0.1
    videos = pipeline(PROMPTS, output_type="np", **ask).frames
    found = decoded(latents).permute(0, 2, 3, 4, 1).numpy()
    assert found.shape == (3, FRAMES, HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(found, videos, atol=1e-4)


@torch.no_grad()
def test_half_precision_leaves_what_diffusers_leaves(build, pipeline):
    """Its tables of angles, its clock's embedding and its norms' weights, of `_keep_in_fp32_modules`."""
    model, whole, x = build(dtype="bfloat16", guidance=Guidance()), build(guidance=Guidance()), noise(3)
    dtypes = {key: weight.dtype for key, weight in model.backbone.network.state_dict().items()}
    kept = {key for key, dtype in dtypes.items() if dtype == torch.float32}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    assert {key.removeprefix("blocks.0.") for key in kept if not key.startswith("blocks.1.")} == {
        "scale_shift_table",
        "norm2.weight",
        "norm2.bias",
        *(f"condition_embedder.time_embedder.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    }
    assert model.backbone.network.rope.freqs_cos.equal(pipeline.transformer.rope.freqs_cos)
    t = torch.tensor([0.99893, 0.5, 0.01], dtype=torch.float64)
    v, exact = (each.velocity(torch.arange(3))(x, t) for each in (model, whole))
    assert v.dtype == torch.float32
    assert 0 < (v - exact).norm() < 0.03 * exact.norm()
    assert model.fingerprint == whole.fingerprint


def test_published_steps_are_planned(build):
    strategy = instantiate(OmegaConf.load(CONF / "stepsize" / "oss_comfyui.yaml"), schedule={"table": "wan"})
    model, published = build(), strategy.schedule.tables["wan"]
    problem = Problem(model.velocity(torch.arange(3)), noise(3), FlowSchedule(8.0).nodes(50), Euler(), XtMSE())
    steps = strategy.plan(problem, [20])[20]
    np.testing.assert_allclose(steps.times[:-1], published[:-1], rtol=0, atol=1e-12)
    with torch.no_grad():
        videos = model.generate(Euler(), steps, noise(2), torch.arange(2))
    assert videos.shape == (2, 3, FRAMES, HEIGHT, WIDTH)
    assert videos.std() > 0.01


# --------------------------------------------------------------------------------------------------------------
# Where they come from
# --------------------------------------------------------------------------------------------------------------


def test_the_second_time_the_text_encoder_is_not_loaded(build, monkeypatch):
    first = build()
    monkeypatch.setattr(UMT5EncoderModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert build().fingerprint == first.fingerprint


def test_the_weights_are_the_files_and_none_else(build, pipeline):
    model = build()
    assert model.backbone.state_dict().keys() == {f"network.{key}" for key in pipeline.transformer.state_dict()}
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"height": 488}, "height must be a multiple of 16 pixels, got 488"),
        ({"width": -16}, "width must be a multiple of 16 pixels, got -16"),
        ({"frames": 80}, r"frames must be 4 n \+ 1, such as 81, got 80"),
        ({"frames": -3}, r"frames must be 4 n \+ 1, such as 81, got -3"),
        ({"text_length": 0}, "text_length must be at least 1, got 0"),
        ({"size": "small"}, "size must be one of full, tiny, got 'small'"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_opened(build, asked, words):
    with pytest.raises(InstantiationException, match=words):
        build(checkpoint="nowhere", **asked)


def test_without_a_pipeline_the_error_says_where_it_is(build):
    with pytest.raises(InstantiationException, match=r"huggingface\.co/Wan-AI/Wan2\.1-T2V-1\.3B.*model\.size=tiny"):
        build(checkpoint=None)


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda f: change(f / "model_index.json", transformer_2=["d", "WanTransformer3DModel"]),
            "its transformer_2 is WanTransformer3DModel, that of a WanPipeline is None",
        ),
        (lambda f: change(f / "transformer" / "config.json", in_channels=36), "takes 36 channels, gives 8"),
        (lambda f: change(f / "transformer" / "config.json", text_dim=24), "gives 20 features, its transformer takes"),
        (lambda f: change(f / "transformer" / "config.json", ffn_dim=48), "is of another architecture"),
        (lambda f: change(f / "vae" / "config.json", base_dim=8), "checkpoint .*vae.* is of another architecture"),
        (lambda f: (f / "vae" / WEIGHTS).unlink(), "none of vae/diffusion_pytorch_model"),
    ],
)
def test_what_is_no_such_pipeline_is_refused(build, copy, spoil, words):
    spoil(copy)
    with pytest.raises(InstantiationException, match=words):
        build(checkpoint=str(copy))


# --------------------------------------------------------------------------------------------------------------
# At its sizes
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("wan2_1_1_3b", 1_418_996_800), ("wan2_1_14b", 14_288_491_584)])
def test_the_yaml_is_the_public_model(name, count):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [f"model={name}"])
    full = OmegaConf.to_container(cfg.model.sizes.full, resolve=True)
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**full["transformer"])
        text = UMT5EncoderModel(UMT5Config(**full["text_encoder"]))
        vae, default = AutoencoderKLWan(**full["vae"]), AutoencoderKLWan()
    assert sum(weight.numel() for weight in transformer.parameters()) == count
    assert sum(weight.numel() for weight in text.parameters()) == 5_680_910_336
    for key, value in full["vae"].items():
        assert vae.config[key] == default.config[key] == value  # diffusers' defaults are the public ones
    if name == "wan2_1_14b":
        with torch.device("meta"):
            default = WanTransformer3DModel()
        shapes = {key: weight.shape for key, weight in transformer.state_dict().items()}
        assert shapes == {key: weight.shape for key, weight in default.state_dict().items()}


@pytest.mark.slow
def test_tiny_runs_from_the_command_line(tmp_path):
    run_cli(
        "model=wan2_1_1_3b",
        "data=prompts",
        "scale=tiny",
        "noise_schedule.shift=5",
        "distance=select",
        "distance.frames=1",
        "num_teacher_steps=5",
        "num_steps=[3]",
        "data.search_samples=2",
        "data.eval_samples=2",
        "data.batch_size=2",
        "stepsize=[oss_comfyui,oss_shared]",
        "stepsize.oss_comfyui.schedule.table=wan",
        "logger=none",
        "trainer.enable_progress_bar=false",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
    assert {row["strategy"] for row in rows} == {"oss_comfyui", "oss_shared"}
    schedule = StepSchedule.load(tmp_path / "run" / "schedules" / "oss_shared_3.json")
    assert schedule.about("model")["name"] == "wan2_1_1_3b_tiny"
    with np.load(tmp_path / "run" / "samples.npz") as shown:
        assert shown["teacher"].shape[1:] == (5, 16, 32, 3)  # every frame
