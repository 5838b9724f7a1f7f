"""FLUX.1 behind canonical time, against diffusers itself on folders that it wrote."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from helpers import ORACLES, run_cli
from huggingface_hub.errors import GatedRepoError
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from oss_exp.cli import CONF
from oss_exp.distances import XtMSE
from oss_exp.models.families.flux import Flux
from oss_exp.models.text.encoders import clip_bytes
from oss_exp.noise import FlowSchedule, flux_shift
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler
from oss_exp.stepsize import Problem

PROMPTS = ["a red bicycle", "two cats, sleeping", "a bowl of oranges " * 20]  # the last is too long
HEIGHT, WIDTH = 48, 32
SHARDED = {"transformer": "diffusion_pytorch_model", "text_encoder_2": "model"}


@pytest.fixture(scope="module")
def yaml():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", ["model=flux_dev", "data=prompts"])


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("OSS_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> FluxPipeline:
    """Of random weights in several shards, and not of the sizes of model.size=tiny; `name_or_path` is its folder."""
    torch.manual_seed(0)
    tokenizer, ends = clip_bytes({"max_position_embeddings": 40})
    letters = "abcdefghijklmnopqrstuvwxyz,"
    words = [(word, -3.0) for word in ("<pad>", "</s>", "<unk>", "▁", *letters, "▁cats")]
    text = {"vocab_size": 600, "hidden_size": 24, "intermediate_size": 32, "max_position_embeddings": 40}
    parts = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=AutoencoderKL(
            latent_channels=8,
            block_out_channels=(8,) * 4,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=0.4,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text, num_hidden_layers=2, num_attention_heads=3, **ends)),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=40, d_model=20, d_kv=5, d_ff=32, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
            )
        ),
        tokenizer_2=T5Tokenizer(vocab=words, extra_ids=0),
        transformer=FluxTransformer2DModel(
            in_channels=32,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=12,
            num_attention_heads=3,
            joint_attention_dim=20,
            pooled_projection_dim=24,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 4),
        ),
    )
    for part in (parts.transformer, parts.text_encoder, parts.text_encoder_2):
        part.eval()
        for weight in part.parameters():
            weight.data += 0.05 * torch.randn_like(weight)  # nothing is zero, and prompts make a difference
    folder = tmp_path_factory.mktemp("pipeline")
    parts.save_pretrained(folder)
    for name in ("transformer", "text_encoder_2"):
        shutil.rmtree(folder / name)
        getattr(parts, name).save_pretrained(folder / name, max_shard_size="10KB")
        assert (folder / name / f"{SHARDED[name]}.safetensors.index.json").is_file()
    parts.set_progress_bar_config(disable=True)
    parts.register_to_config(_name_or_path=str(folder))
    return parts


@pytest.fixture
def copy(pipeline, tmp_path) -> Path:
    """Its folder, to change."""
    return Path(shutil.copytree(pipeline.config._name_or_path, tmp_path / "copy"))


@pytest.fixture
def build(yaml, pipeline):
    """model=flux_dev of the pipeline's folder and PROMPTS."""

    def make(**changes) -> Flux:
        settings = {"checkpoint": pipeline.config._name_or_path, "prompts": PROMPTS, "dtype": "float32"}
        settings |= {"height": HEIGHT, "width": WIDTH, "text_length": 30}
        return instantiate(yaml.model, **(settings | changes))

    return make


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 8, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1))


def packed(x: torch.Tensor) -> torch.Tensor:
    return FluxPipeline._pack_latents(x, *x.shape)


def unpacked(tokens: torch.Tensor) -> torch.Tensor:
    return FluxPipeline._unpack_latents(tokens, HEIGHT, WIDTH, 8)


# --------------------------------------------------------------------------------------------------------------
# The network and the sampler
# --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_network_gives_diffusers_velocity_at_any_time(build, pipeline):
    model, x = build(), noise(3)
    text, pooled, text_ids = pipeline.encode_prompt(PROMPTS, max_sequence_length=30)
    ids = pipeline._prepare_latent_image_ids(3, HEIGHT // 16, WIDTH // 16, "cpu", torch.float32)
    t = torch.tensor([0.003, 0.4567, 0.9989], dtype=torch.float64)
    expected = pipeline.transformer(
        hidden_states=packed(x),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=t.float(),
        guidance=torch.full((3,), 3.5),
        img_ids=ids,
        txt_ids=text_ids,
    ).sample
    found = model.velocity(torch.arange(3))(x, t)
    torch.testing.assert_close(found, unpacked(expected), rtol=0, atol=1e-5)
    assert (found - build(embedded_guidance=2.0).velocity(torch.arange(3))(x, t)).abs().max() > 1e-2
    assert (found - model.velocity(torch.tensor([1, 0, 0]))(x, t)).abs().amax((1, 2, 3)).min() > 1e-2


@torch.no_grad()
def test_pictures_are_those_of_the_whole_pipeline(build, pipeline, yaml):
    model, z, steps = build(), noise(3), 6
    ask = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": steps, "max_sequence_length": 30}
    expected = pipeline(PROMPTS, latents=packed(z), output_type="latent", return_dict=False, **ask)[0]
    images = pipeline(PROMPTS, latents=packed(z), output_type="np", **ask).images
    times = FlowSchedule(flux_shift(HEIGHT, WIDTH)).nodes(steps)
    schedule = StepSchedule(times)
    decoded, model.decoder = model.decoder, torch.nn.Identity()
    latents = model.generate(Euler(), schedule, z, torch.arange(3))
    torch.testing.assert_close(latents, unpacked(expected), rtol=0, atol=1e-4)
    assert (latents - z).std() > 0.1
    np.testing.assert_allclose(decoded(latents).permute(0, 2, 3, 1).numpy(), images, atol=1e-4)


@torch.no_grad()
def test_guidance_against_the_empty_prompt_is_besides(build, pipeline, yaml):
    model, x, t = build(guidance={"scale": 2.0}), noise(3), torch.full((3,), 0.6, dtype=torch.float64)
    ask = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 1, "max_sequence_length": 30}
    end = pipeline(
        PROMPTS, negative_prompt=[""] * 3, true_cfg_scale=2.0, latents=packed(x), output_type="latent", **ask
    ).images
    found = x - model.velocity(torch.arange(3))(x, torch.ones_like(t))
    torch.testing.assert_close(found, unpacked(end), rtol=0, atol=1e-4)


@torch.no_grad()
def test_half_precision_does_not_round_the_clock(build):
    whole, half = build(), build(dtype="bfloat16")
    assert {weight.dtype for weight in half.backbone.parameters()} == {torch.bfloat16}
    assert half.backbone.text.dtype == half.backbone.pooled.dtype == torch.bfloat16
    assert half.fingerprint == whole.fingerprint
    x = noise(1).expand(3, -1, -1, -1)
    t = torch.tensor([0.9980, 0.9970, 0.9962], dtype=torch.float64)  # all the same in bfloat16
    v = half.velocity(torch.tensor([0, 0, 0]))(x, t)
    assert v.dtype == torch.float32
    assert (v - whole.velocity(torch.tensor([0, 0, 0]))(x, t)).norm() < 0.05 * v.norm()
    assert (v[0] - v[1]).abs().max() > 1e-3
    assert (v[1] - v[2]).abs().max() > 1e-3


@pytest.mark.parametrize("table", ["flux", "chroma"])
def test_published_steps_are_planned(build, table):
    strategy = instantiate(OmegaConf.load(CONF / "stepsize" / "oss_comfyui.yaml"), schedule={"table": table})
    model, published = build(), strategy.schedule.tables[table]
    grid = FlowSchedule(flux_shift(HEIGHT, WIDTH)).nodes(50)
    problem = Problem(model.velocity(torch.arange(3)), noise(3), grid, Euler(), XtMSE())
    steps = strategy.plan(problem, [len(published) - 1])[len(published) - 1]
    np.testing.assert_allclose(steps.times[1:-1], published[1:-1], rtol=0, atol=1e-12)
    with torch.no_grad():
        images = model.generate(Euler(), steps, noise(2), torch.arange(2))
    assert images.shape == (2, 3, HEIGHT, WIDTH)
    assert images.std() > 0.01


# --------------------------------------------------------------------------------------------------------------
# The teacher's nodes
# --------------------------------------------------------------------------------------------------------------


PIXELS = {256: (256, 256), 1024: (512, 512), 4096: (1024, 1024), 2304: (576, 1024), 4032: (1008, 1024), 512: (256, 512)}


def test_shifts_of_diffusers():
    listed = json.loads((ORACLES / "fm_shift.json").read_text())["flux"]
    ours = [case for case in listed if case["max_shift"] == 1.15]  # the other is of OptimalSteps' script alone
    assert len(ours) == 24
    for case in ours:
        shift = flux_shift(*PIXELS[case["image_seq_len"]])
        assert np.log(shift) == pytest.approx(case["mu"], abs=1e-12)
        found = FlowSchedule(shift).nodes(case["num_steps"])
        np.testing.assert_allclose(found, case["sigmas"], rtol=0, atol=1e-6)


def test_nodes_follow_the_size_of_the_model():
    def shift(*overrides: str) -> float:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return instantiate(compose("config", [*overrides, "noise_schedule=flux"]).noise_schedule).shift

    assert shift("model=flux_dev") == flux_shift(1024, 1024) == pytest.approx(3.158, abs=1e-3)
    assert shift("model=flux_dev", "model.height=512", "model.width=768") == flux_shift(512, 768)
    assert shift("model=flux_dev", "model.size=tiny") == flux_shift(32, 48)


# --------------------------------------------------------------------------------------------------------------
# Where they come from
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_text_encoders_are_loaded_for_new_prompts_alone_and_freed(build, tmp_path, monkeypatch):
    loaded, read = [], T5EncoderModel.from_pretrained.__func__

    def watched(cls, *args, **kwargs):
        made = read(cls, *args, **kwargs)
        loaded.append(weakref.ref(made[0]))
        return made

    def alive(self, checkpoint):
        gc.collect()
        counts.append(sum(model() is not None for model in loaded))
        return load(self, checkpoint)

    counts, load = [], Flux._load
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", classmethod(watched))
    monkeypatch.setattr(Flux, "_load", alive)
    first = build()
    assert (len(loaded), counts) == (1, [0])  # gone before the transformer's weights are read
    second = build()
    assert len(loaded) == 1
    assert second.fingerprint == first.fingerprint
    assert build(prompts=["a lighthouse"]).fingerprint == first.fingerprint
    assert (len(loaded), counts) == (2, [0, 0, 0])


@pytest.mark.slow
def test_the_weights_are_the_files_and_none_else(build, pipeline):
    model = build()
    assert model.backbone.state_dict().keys() == {f"network.{key}" for key in pipeline.transformer.state_dict()}
    for key, weight in pipeline.transformer.state_dict().items():
        assert model.backbone.state_dict()[f"network.{key}"].equal(weight)


@pytest.mark.parametrize("size", [{"height": 1000}, {"width": 8}, {"height": -16}, {"width": 0}])
def test_pictures_that_are_no_whole_tokens_are_refused_before_anything_is_opened(build, size):
    with pytest.raises(InstantiationException, match=rf"{next(iter(size))} must be a multiple of 16 pixels"):
        build(checkpoint="nowhere", **size)
    with pytest.raises(ValueError, match="multiple of 16"):
        flux_shift(**{"height": 64, "width": 64} | size)


def test_a_gated_repository_says_what_to_do(build, monkeypatch):
    def refuse(*_, **__):
        raise GatedRepoError("403", response=type("Response", (), {"headers": {}, "request": None, "status_code": 403}))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(InstantiationException, match=r"accepted its licence.*black-forest-labs/FLUX\.1-dev.*tiny"):
        build(checkpoint=None)


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda f: change(f / "model_index.json", text_encoder_2=["t", "UMT5EncoderModel"]),
            "its text_encoder_2 is UM",
        ),
        (
            lambda f: change(f / "model_index.json", _class_name="X", controlnet=["d", "C"]),
            "controlnet is C, that of a",
        ),
        (lambda f: change(f / "transformer" / "config.json", out_channels=16), "takes 32 channels, gives 16"),
        (lambda f: change(f / "transformer" / "config.json", guidance_embeds=False), "embedded_guidance is 3.5.*none"),
        (lambda f: change(f / "transformer" / "config.json", joint_attention_dim=24), "gives 20 features.*takes 24"),
        (lambda f: change(f / "transformer" / "config.json", pooled_projection_dim=20), "gives 24 features.*takes 20"),
        (lambda f: change(f / "transformer" / "config.json", num_layers=3), "of another architecture"),
        (lambda f: next((f / "transformer").glob("*00002-of*")).unlink(), "download all shards into one folder"),
        (lambda f: (f / "tokenizer_2" / "tokenizer.json").unlink(), "none of tokenizer_2/vocab.json"),
        (lambda f: shutil.rmtree(f / "vae"), "none of vae/config.json"),
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
@pytest.mark.parametrize(("name", "count"), [("flux_dev", 11_901_408_320), ("flux_schnell", 11_891_178_560)])
def test_the_yaml_is_the_public_model(name, count):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [f"model={name}"])
    full = OmegaConf.to_container(cfg.model.sizes.full, resolve=True)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**full["transformer"])
        default = FluxTransformer2DModel(guidance_embeds=name == "flux_dev")  # diffusers' defaults are the public ones
        clip = CLIPTextModel(CLIPTextConfig(**full["text_encoder"]))
        t5 = T5EncoderModel(T5Config(**full["text_encoder_2"]))
        vae = AutoencoderKL(**full["vae"])
    assert sum(weight.numel() for weight in transformer.parameters()) == count
    shapes = {key: weight.shape for key, weight in transformer.state_dict().items()}
    assert shapes == {key: weight.shape for key, weight in default.state_dict().items()}
    counts = [sum(weight.numel() for weight in part.parameters()) for part in (clip, t5, vae)]
    assert counts == [123_060_480, 4_762_310_656, 83_819_683]


def test_random_weights_are_the_same_every_time(build):
    settings = {"size": "tiny", "checkpoint": None, "height": 32, "width": 48}
    tiny, again = (build(**settings) for _ in range(2))
    assert (tiny.name, tiny.fingerprint) == ("flux_dev_tiny", again.fingerprint)
    x, t = torch.randn(2, *tiny.event_shape), torch.full((2,), 0.7, dtype=torch.float64)
    v = tiny.velocity(torch.tensor([0, 1]))(x, t)
    assert v.equal(again.velocity(torch.tensor([0, 1]))(x, t))
    assert (v - tiny.velocity(torch.tensor([1, 1]))(x, t))[0].abs().max() > 1e-3  # it reads the prompt
    assert tiny.decode(x).shape == (2, 3, 32, 48)


@pytest.mark.slow
def test_tiny_runs_from_the_command_line(tmp_path):
    run_cli(
        "model=flux_dev",
        "data=prompts",
        "scale=tiny",
        "noise_schedule=flux",
        "num_teacher_steps=6",
        "num_steps=[3]",
        "data.search_samples=2",
        "data.eval_samples=3",
        "stepsize=[oss_comfyui,oss_shared]",
        "logger=none",
        "trainer.enable_progress_bar=false",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
    assert {row["strategy"] for row in rows} == {"oss_comfyui", "oss_shared"}
    schedule = StepSchedule.load(tmp_path / "run" / "schedules" / "oss_shared_3.json")
    assert schedule.about("model")["name"] == "flux_dev_tiny"
    assert schedule.about("native")["clock"] == "flow time"
