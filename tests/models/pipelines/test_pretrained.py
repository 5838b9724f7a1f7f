"""A pipeline's folder is a model of the command line, also with adapters."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers import run_cli
from models.pipelines.images import stable_diffusion
from models.pipelines.parts import PROMPTS
from peft import LoraConfig, get_peft_model_state_dict

from oss_exp.models.pipeline import Pipeline
from oss_exp.schedule import StepSchedule

CALL = {"height": 24, "width": 24, "guidance_scale": 3.0}
MODEL = [
    "model=pipeline",
    "model.dtype=float32",
    "model.call={height: 24, width: 24, guidance_scale: 3.0}",
]
SMALL = [
    "data=prompts",
    "num_teacher_steps=8",
    "num_steps=[2]",
    "data.search_samples=2",
    "data.eval_samples=2",
]
SMALL += [
    "data.per_sample=2",
    "stepsize=[ddim,oss_shared]",
    "stepsize.oss_shared.start=pinned",
    "logger=none",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    stable_diffusion().pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(folder) -> Path:
    """A LoRA of the U-Net's attention, as trainings save it."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    weights = get_peft_model_state_dict(pipe.unet)
    StableDiffusionPipeline.save_lora_weights(folder / "lora", unet_lora_layers=weights)
    return folder / "lora"


def velocity(**settings) -> torch.Tensor:
    """Return the velocity of a folder's pipeline at t = 0.5."""
    model = Pipeline.from_pretrained(prompts=PROMPTS, dtype="float32", call=CALL, **settings)
    x = torch.randn(2, *model.event_shape, generator=torch.Generator().manual_seed(0))
    return model.velocity(None)(x, torch.full((2,), 0.5, dtype=torch.float64))


def test_a_folder_is_the_pipeline_that_was_saved(folder):
    torch.manual_seed(0)
    model = Pipeline(stable_diffusion().pipe, PROMPTS, **CALL)
    x = torch.randn(2, *model.event_shape, generator=torch.Generator().manual_seed(0))
    expected = model.velocity(None)(x, torch.full((2,), 0.5, dtype=torch.float64))
    assert torch.equal(velocity(pipeline=folder), expected)
    assert torch.equal(
        velocity(pipeline=folder, pipeline_class="StableDiffusionPipeline"), expected
    )


def test_a_chain_too_long_for_the_memory_is_refused(tmp_path):
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"_class_name": "DDIMScheduler", "num_train_timesteps": 10**12}))
    with pytest.raises(
        ValueError, match=rf"{file}: field `num_train_timesteps` must be at most 100000, got 10"
    ):
        Pipeline.from_pretrained(tmp_path, PROMPTS)


def test_a_part_may_have_a_dtype_of_its_own(folder):
    dtype = {"default": "bfloat16", "vae": "float32"}
    pipe = Pipeline.from_pretrained(folder, PROMPTS, dtype=dtype, call=CALL).pipe
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32


@pytest.mark.slow
def test_an_adapter_is_another_model(folder, lora):
    plain = Pipeline.from_pretrained(folder, PROMPTS, dtype="float32", call=CALL)
    adapted = Pipeline.from_pretrained(folder, PROMPTS, dtype="float32", call=CALL, loras=[lora])
    assert adapted.fingerprint != plain.fingerprint
    assert not torch.allclose(
        velocity(pipeline=folder, loras=[lora]), velocity(pipeline=folder), atol=1e-3
    )


@pytest.mark.slow
def test_the_main_job_runs_on_a_folder(folder, tmp_path):
    run_cli(
        *MODEL,
        f"model.pipeline={folder}",
        "noise_schedule=pipeline",
        *SMALL,
        f"hydra.run.dir={tmp_path}",
    )

    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert {row["strategy"]: row["nfe"] for row in rows} == {
        "ddim": 4,
        "oss_shared": 4,
    }  # guided, two rows a step

    steps = StepSchedule.load(tmp_path / "schedules" / "oss_shared_2.json")
    assert steps.about("teacher")["noise_schedule"] == {"_target_": "oss_exp.PipelineSchedule"}

    nodes = Pipeline.from_pretrained(
        folder, PROMPTS, dtype="float32", call=CALL
    ).noise_schedule.nodes(8)
    assert set(steps.times.tolist()) <= set(nodes.tolist())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["model.pipeline=nowhere"],
            "pipeline nowhere is neither a folder that diffusers' save_pretrained wrote",
        ),
        (
            ["model.pipeline={folder}", "model.pipeline_class=Pipe"],
            "pipeline_class=Pipe is no pipeline of diffusers",
        ),
        (
            ["model.pipeline={folder}", "model.call={{heigth: 3}}"],
            "takes no heigth; it takes, among others, height",
        ),
        (
            ["model.pipeline={folder}", "model.call={{num_inference_steps: 3}}"],
            "num_inference_steps of the call is for the search",
        ),
        (
            ["model=mixture_digits", "noise_schedule=pipeline"],
            "model=mixture_digits is no pipeline",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings, message, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = [] if settings[0].startswith("model=") else MODEL[:2]
    small = [setting for setting in SMALL if model or not setting.startswith("data=")]
    chosen = [setting.format(folder=folder) for setting in settings]
    with pytest.raises(SystemExit):
        run_cli(*model, *chosen, *small, f"hydra.run.dir={tmp_path}")
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("quantization", ["float8", "int8"])
@pytest.mark.parametrize("adapted", [False, True])
def test_quantised_weights(folder, lora, quantization, adapted):
    """The velocity is near that of the whole weights, and the fingerprint is another."""
    if quantization == "int8":
        pytest.importorskip("torchao")
    loras = [lora] if adapted else []
    plain = Pipeline.from_pretrained(folder, PROMPTS, dtype="float32", call=CALL, loras=loras)
    model = Pipeline.from_pretrained(
        folder, PROMPTS, dtype="float32", call=CALL, loras=loras, quantization=quantization
    )

    assert model.fingerprint != plain.fingerprint

    expected = velocity(pipeline=folder, loras=loras)
    result = velocity(pipeline=folder, loras=loras, quantization=quantization)
    difference = float((result - expected).norm() / expected.norm())

    assert 1e-4 < difference < 0.2


def test_quantisation_without_its_package_is_refused(folder, monkeypatch):
    monkeypatch.setattr("oss_exp.models.pipeline.quantization.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="quantization=nf4 needs bitsandbytes, which is not installed: pip install"
    ):
        Pipeline.from_pretrained(folder, PROMPTS, quantization="nf4")
