"""Pipelines of diffusers behind canonical time, against diffusers itself on folders that it wrote."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from helpers import run_cli
from huggingface_hub.errors import EntryNotFoundError
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from oss_exp.cli import CONF
from oss_exp.models.families.stable_diffusion import StableDiffusion, VPVelocity, trained_as
from oss_exp.models.guidance import Guidance
from oss_exp.models.text.encoders import clip_bytes
from oss_exp.noise import DDPMPath, linear_betas
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, sample

PROMPTS = [
    "a red bicycle",
    "two cats, sleeping",
    "a bowl of oranges",
    "a bowl of oranges " * 20,
]  # the last is too long


@pytest.fixture(scope="module")
def yaml():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", ["model=sd15", "data=prompts"])


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("OSS_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> StableDiffusionPipeline:
    """Of random weights, and not of the sizes of model.size=tiny; `name_or_path` is its folder."""
    torch.manual_seed(0)
    text = {"vocab_size": 600, "hidden_size": 24, "intermediate_size": 32, "max_position_embeddings": 40}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 3, "bos_token_id": 512, "eos_token_id": 513}
    parts = StableDiffusionPipeline(
        vae=AutoencoderKL(
            latent_channels=4,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=0.3,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)).eval(),
        tokenizer=clip_bytes({"max_position_embeddings": 40})[0],
        unet=UNet2DConditionModel(
            sample_size=12,
            cross_attention_dim=24,
            attention_head_dim=4,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for weight in (weight for part in (parts.unet, parts.text_encoder) for weight in part.parameters()):
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
    """model=sd15 of the pipeline's folder and PROMPTS."""

    def make(**changes) -> StableDiffusion:
        settings = {"checkpoint": pipeline.config._name_or_path, "prompts": PROMPTS}
        return instantiate(yaml.model, **(settings | changes))

    return make


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 4, 12, 12, generator=torch.Generator().manual_seed(1))


def encoded(pipeline, prompts: list[str]) -> torch.Tensor:
    """By diffusers, guidance's half first."""
    conditional, free = pipeline.encode_prompt(prompts, "cpu", 1, True)
    return torch.cat([free, conditional])


# --------------------------------------------------------------------------------------------------------------
# The parts
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_the_network_gives_the_pipelines_eps_at_any_time(build, pipeline):
    model, x = build(guidance=Guidance()), noise(4)
    for tau in (3.0, 250.5, 998.9):
        t = model.path.canonical(torch.tensor([tau], dtype=torch.float64)).expand(4)
        native = x * model.path.scale(t)[:, None, None, None].float()
        text = encoded(pipeline, PROMPTS).chunk(2)[1]
        eps = pipeline.unet(native, torch.tensor(tau), encoder_hidden_states=text).sample
        found = model.velocity(torch.arange(4))(x, t) * float(1 - t[0]) + x  # v = (eps - x) / (1 - t)
        torch.testing.assert_close(found, eps, rtol=0, atol=1e-5)


@torch.no_grad()
def test_guidance_mixes_the_prompt_and_the_empty_one(build):
    model, alone = build(dtype="float64"), build(dtype="float64", guidance=Guidance())
    x, t, numbers = noise(3).double(), torch.full((3,), 0.6, dtype=torch.float64), torch.tensor([2, 0, 2])
    conditional, free = alone.velocity(numbers)(x, t), alone._velocity(x, t, torch.full((3,), -1))
    assert (conditional - free).abs().max() > 1e-2
    expected = conditional + 6.5 * (conditional - free)
    torch.testing.assert_close(model.velocity(numbers)(x, t), expected, rtol=0, atol=1e-10)


@pytest.mark.slow
@torch.no_grad()
def test_pictures_are_those_of_the_whole_pipeline(build, pipeline):
    """Euler in canonical time at DDIM's indices is DDIM: the pipeline's own call, end to end."""
    model, z, steps = build(), noise(4), 8
    expected = pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=7.5, latents=z, output_type="latent", return_dict=False
    )[0]
    images = pipeline(PROMPTS, num_inference_steps=steps, guidance_scale=7.5, latents=z, output_type="np").images
    pipeline.scheduler.set_timesteps(steps)
    times = model.path.canonical(pipeline.scheduler.timesteps.double())
    schedule = StepSchedule(torch.cat([times, torch.zeros(1)]).double())
    first = z / model.path.scale(times[:1]).float()
    decoded, model.decoder = model.decoder, torch.nn.Identity()
    latents = model.generate(Euler(), schedule, first, torch.arange(4))
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    assert latents.std() > 0.1
    np.testing.assert_allclose(decoded(latents).permute(0, 2, 3, 1).numpy(), images, atol=1e-4)


def test_half_precision_is_of_the_network_alone(build):
    model, x, t = build(dtype="bfloat16"), noise(4), torch.full((4,), 0.5, dtype=torch.float64)
    assert model.backbone.table.dtype == torch.bfloat16
    half, whole = (each.velocity(torch.arange(4))(x, t) for each in (model, build()))
    assert half.dtype == torch.float32
    assert (half - whole).norm() < 0.1 * whole.norm()
    assert model.fingerprint == build().fingerprint


@torch.no_grad()
def test_v_prediction_is_read_from_the_folder(build, pipeline, copy):
    change(copy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", beta_schedule="linear")
    model, x = build(checkpoint=str(copy), guidance=Guidance()), noise(4)
    t = model.path.canonical(torch.full((4,), 400.0, dtype=torch.float64))
    native = x * model.path.scale(t)[:, None, None, None].float()
    scheduler = DDIMScheduler.from_config(json.loads((copy / "scheduler" / "scheduler_config.json").read_text()))
    text = encoded(pipeline, PROMPTS).chunk(2)[1]
    v = pipeline.unet(native, torch.tensor(400.0), encoder_hidden_states=text).sample
    scheduler.set_timesteps(5)
    x0 = scheduler.step(v, 400, native).pred_original_sample
    found = x - model.velocity(torch.arange(4))(x, t) * float(t[0])
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-4)


def test_training_and_sampling_of_v_prediction_agree():
    path = DDPMPath(linear_betas(1000, 1e-4, 0.02))
    kind = VPVelocity(path, 0.99)
    x0, eps = noise(5).double(), noise(10)[5:].double()
    t = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.98], dtype=torch.float64)
    rows = t[:, None, None, None]
    found = kind.velocity(kind.answer(x0, eps, t), (1 - rows) * x0 + rows * eps, t)
    torch.testing.assert_close(found, eps - x0, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------------------------------
# Where they come from
# --------------------------------------------------------------------------------------------------------------


def test_the_second_time_the_text_encoder_is_not_loaded(build, pipeline, monkeypatch):
    first = build()
    monkeypatch.setattr(CLIPTextModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    second = build()
    assert second.backbone.table.equal(first.backbone.table)
    assert second.fingerprint == first.fingerprint


def test_the_fingerprint_is_of_both_networks_and_not_of_their_layout(build, copy):
    original = build().fingerprint
    file = copy / "text_encoder" / "model.safetensors"
    older = {f"text_model.{key}": tensor for key, tensor in load_file(file).items()}
    older["text_model.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(older, file, {"format": "pt"})
    assert build(checkpoint=str(copy)).fingerprint == original
    older["text_model.final_layer_norm.bias"] += 1
    save_file(older, file, {"format": "pt"})
    changed = build(checkpoint=str(copy))
    assert changed.fingerprint != original
    assert not changed.backbone.table.equal(build().backbone.table)  # of a cache that holds both


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def lack_a_weight(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: change(f / "model_index.json", unet=["diffusers", "UNet2DModel"]), "its unet is UNet2DModel"),
        (lambda f: change(f / "model_index.json", text_encoder_2=["t", "CLIPTextModel"]), "its text_encoder_2 is CLIP"),
        (lambda f: change(f / "model_index.json", vae=[None, None]), "its vae is None, that of .* is AutoencoderKL"),
        (lambda f: change(f / "unet" / "config.json", in_channels=9), "takes 9 channels, gives 4.*not of inpainting"),
        (lambda f: change(f / "unet" / "config.json", block_out_channels=[16, 64]), "is of another architecture"),
        (lambda f: (f / "model_index.json").write_text("[]"), "must be an object"),
        (
            lambda f: change(f / "unet" / "config.json", cross_attention_dim=32),
            "gives 24 features, its unet takes 32",
        ),
        (lambda f: change(f / "scheduler" / "scheduler_config.json", beta_schedule="sigmoid"), "beta_schedule=sigmoid"),
        (
            lambda f: change(f / "scheduler" / "scheduler_config.json", prediction_type="sample"),
            "prediction_type=sample",
        ),
        (
            lambda f: change(f / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True),
            "zero_snr=true and prediction_type=epsilon, which says nothing",
        ),
        (lambda f: (f / "unet" / UNET).write_bytes(b"\x10"), "is cut short"),
        (lambda f: (f / "text_encoder" / "config.json").write_text("{"), "is not complete JSON"),
        (lack_a_weight, "lacks 1 weights of CLIPTextModel"),
    ],
)
def test_what_is_no_such_pipeline_is_refused(build, copy, spoil, words):
    spoil(copy)
    with pytest.raises(InstantiationException) as raised:
        build(checkpoint=str(copy))
    assert isinstance(raised.value.__cause__, ValueError)
    assert raised.match(words)


UNET = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("part", ["model_index.json", f"unet/{UNET}", "tokenizer", "vae", "scheduler"])
def test_what_is_missing_is_named_with_where_to_get_it(build, copy, part):
    (shutil.rmtree if (copy / part).is_dir() else Path.unlink)(copy / part)
    with pytest.raises(InstantiationException, match=rf"{part}.*huggingface\.co/stable-diffusion-v1-5") as raised:
        build(checkpoint=str(copy))
    assert isinstance(raised.value.__cause__, FileNotFoundError)


def test_a_hub_is_asked_for_all_that_is_needed_and_no_more(build, copy, tmp_path, monkeypatch):
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"large")

    def fetch(repository: str, file: str, revision: str | None, **options) -> str:
        assert (repository, revision) == ("owner/name", "v1")
        if not (copy / file).is_file():
            raise EntryNotFoundError(f"404 {file}")
        (tmp_path / "snapshot" / file).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(copy / file, tmp_path / "snapshot" / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    model = build(checkpoint="owner/name@v1")
    assert model.fingerprint == build().fingerprint
    assert {file.name for file in (tmp_path / "snapshot" / "unet").iterdir()} == {"config.json", UNET}


@pytest.mark.parametrize("checkpoint", ["nowhere/at/all", "no-such-owner/no-such-pipeline", None])
def test_without_a_pipeline_the_error_says_where_it_is(build, checkpoint):
    with pytest.raises(InstantiationException, match=r"huggingface\.co/stable-diffusion-v1-5.*model\.size=tiny"):
        build(checkpoint=checkpoint)


def test_a_single_file_is_not_a_pipeline(build, copy):
    with pytest.raises(InstantiationException, match="should be a pipeline folder; make one with"):
        build(checkpoint=str(copy / "unet" / UNET))


@pytest.mark.parametrize("condition", [None, torch.ones(2, 3, 4), torch.tensor([0.5])])
def test_a_model_of_prompts_says_how_to_give_them(build, condition):
    with pytest.raises(ValueError, match="set data=prompts"):
        build().velocity(condition)


@pytest.mark.parametrize("number", [-1, 4])
def test_numbers_that_no_prompt_has(build, number):
    with pytest.raises(ValueError, match="has 4 prompts"):
        build().velocity(torch.tensor([0, number]))


def test_sizes(build):
    with pytest.raises(InstantiationException, match=r"size must be one of full, tiny, got 'small'"):
        build(size="small")


# --------------------------------------------------------------------------------------------------------------
# At its sizes
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_yaml_is_stable_diffusion_15(yaml):
    from omegaconf import OmegaConf

    full = OmegaConf.to_container(yaml.model.sizes.full, resolve=True)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**full["unet"])
        text = CLIPTextModel(CLIPTextConfig(**full["text_encoder"]))
        vae = AutoencoderKL(**full["vae"])
    counts = [sum(weight.numel() for weight in part.parameters()) for part in (unet, text, vae)]
    assert counts == [859_520_964, 123_060_480, 83_653_863]  # as published
    kind = trained_as(full["scheduler"])
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ratio = kind.path.canonical(torch.arange(1000.0, dtype=torch.float64))
    alphas_cumprod = (1 - ratio) ** 2 / ((1 - ratio) ** 2 + ratio**2)
    torch.testing.assert_close(alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=0, atol=1e-6)
    assert kind.time_max == pytest.approx(float(ratio[-1]))


def test_a_chain_without_signal_at_its_end_runs_as_in_diffusers():
    """From t = 1 exactly, for v-prediction; and what a config leaves out is as in diffusers."""
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}
    own = DDIMScheduler(**config, timestep_spacing="trailing", clip_sample=False)
    kind = trained_as(config)
    assert kind.time_max == 1
    own.set_timesteps(5)

    def network(latents: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        return (0.5 * latents + clock.view(-1, 1) / 400).sin()

    noise = latents = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in own.timesteps:
        latents = own.step(network(latents, t), t, latents).prev_sample

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return kind.velocity(network(*kind.question(x, t)), x, t)

    times = kind.path.canonical(torch.cat([own.timesteps.double(), torch.tensor([-1.0])]))
    assert times[0] == 1
    torch.testing.assert_close(sample(Euler(), velocity, noise, StepSchedule(times)), latents, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", [".fp16.safetensors", ".bin", ".fp16.bin"])
def test_a_folder_of_other_names_and_half_precision_is_the_same_model(form, copy, build):
    for file in list(copy.glob("*/*.safetensors")):
        tensors = {key: each.half() if "fp16" in form else each for key, each in load_file(file).items()}
        if form.endswith(".bin"):
            name = "pytorch_model" if file.stem == "model" else file.stem
            torch.save(tensors, file.with_name(f"{name}{form}"))
        else:
            save_file(tensors, file.with_name(f"{file.stem}{form}"))
        file.unlink()
    x, t, prompts = torch.randn(2, 4, 12, 12), torch.tensor([0.9, 0.4], dtype=torch.float64), torch.tensor([0, 1])
    found, expected = (model.velocity(prompts)(x, t) for model in (build(checkpoint=str(copy)), build()))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 if "fp16" in form else 1e-5)


@pytest.mark.slow
def test_tiny_runs_from_the_command_line(tmp_path):
    (tmp_path / "two.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n')
    run_cli(
        "model=sd15",
        "model.size=tiny",
        "data=prompts",
        f"data.prompts={tmp_path / 'two.jsonl'}",
        "data.search_samples=2",
        "data.eval_samples=3",
        "num_teacher_steps=6",
        "num_steps=[3]",
        "stepsize=[ddim,oss_shared]",
        "logger=none",
        "trainer.enable_progress_bar=false",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
    assert {row["strategy"]: row["psnr"]["mean"] > 20 for row in rows} == {"ddim": True, "oss_shared": True}
    assert len(list((tmp_path / "cache" / "prompts").iterdir())) == 3  # and the empty one
    schedule = StepSchedule.load(tmp_path / "run" / "schedules" / "oss_shared_3.json")
    assert schedule.about("model")["name"] == "sd15_tiny"


def test_random_weights_are_the_same_every_time(build):
    tiny, again = (build(size="tiny", checkpoint=None) for _ in range(2))
    assert tiny.fingerprint == again.fingerprint
    x, t = noise(2)[:, :, :8, :8], torch.full((2,), 0.7, dtype=torch.float64)
    v = tiny.velocity(torch.tensor([0, 1]))(x, t)
    assert v.equal(again.velocity(torch.tensor([0, 1]))(x, t))
    assert (v - tiny.velocity(torch.tensor([1, 1]))(x, t))[0].abs().max() > 1e-3  # it reads the prompt
    pixels = tiny.decode(x)
    assert pixels.shape == (2, 3, 16, 16)
    assert 0 <= float(pixels.min()) < float(pixels.max()) <= 1
