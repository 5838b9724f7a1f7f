"""Every preset is a call of its pipeline, and runs the main job at its tiny size."""

import inspect
import json
import re
import shlex
from pathlib import Path

import diffusers
import pytest
from helpers import run_cli
from models.common import composed
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model_state_dict

from oss_exp.cli import CONF
from oss_exp.models.pipeline import Pipeline
from oss_exp.models.pipeline.calls import SuspendedCalls
from oss_exp.models.tiny import TINY, pictures, tiny
from oss_exp.schedule import StepSchedule


def is_preset(file: Path) -> bool:
    text = file.read_text()
    return file.stem != "pipeline" and "pipeline:" in text and "_target_" not in text


PRESETS = sorted(file.stem for file in (CONF / "model").glob("*.yaml") if is_preset(file))
DOCUMENT = (CONF.parent / "docs" / "pipelines.md").read_text()
COMMANDS = "\n".join(re.findall(r"```bash\n(.*?)\n```", DOCUMENT, re.DOTALL)).splitlines()
COMMANDS += re.findall(r"^\| [^|]* \| `(oss-exp [^`]*)`", DOCUMENT, re.MULTILINE)
ROW = r"^\| `(\w+)` \| \[([\w./-]+)\]\(https://huggingface.co/\2\) \| (\d+) x (\d+)"
LISTED = {
    name: (hub, int(height), int(width))
    for name, hub, height, width in re.findall(ROW, DOCUMENT, re.MULTILINE)
}
SHORT = [
    "num_teacher_steps=6",
    "num_steps=[3]",
    "data.search_samples=2",
    "data.eval_samples=2",
    "data.per_sample=2",
]
SHORT += ["logger=none", "trainer.enable_progress_bar=false"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_call_of_its_class(preset):
    cfg = composed(f"model={preset}")
    assert cfg.model.name == preset
    assert (cfg.model.pipeline, cfg.model.call.height, cfg.model.call.width) == LISTED[preset]
    assert (cfg.data.prompts, cfg.start) == ("prompts.txt", "pinned")
    assert cfg.noise_schedule._target_ == "oss_exp.PipelineSchedule"
    assert {strategy.get("start") for strategy in cfg.stepsize.values()} == {"pinned"}

    kind = getattr(diffusers, cfg.model.pipeline_class)
    takes = inspect.signature(kind.__call__).parameters
    call = OmegaConf.to_container(cfg.model.call)

    assert call.keys() <= takes.keys()
    assert {"height", "width"} <= call.keys()
    assert ("num_frames" in call) == ("num_frames" in takes)

    small = TINY[cfg.model.pipeline_class].call
    assert small.keys() <= takes.keys()
    assert small["height"] * small["width"] < 1e-2 * call["height"] * call["width"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_runs_the_main_job_at_tiny_size(preset, tmp_path):
    if preset == "wan2_2_i2v":
        pytest.importorskip("ftfy")  # the pipeline needs it
    run_cli(f"model={preset}", "scale=tiny", *SHORT, f"hydra.run.dir={tmp_path}")
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]

    assert {row["strategy"] for row in rows} == {"pipeline", "oss_shared", "oss_fit"}
    assert max(rows, key=lambda row: row["psnr"]["mean"])["strategy"] != "pipeline"

    steps = StepSchedule.load(tmp_path / "schedules" / "oss_shared_3.json")
    assert steps.about("model")["name"] == f"{preset}_tiny"

    cfg = composed(f"model={preset}")
    pipe, _ = tiny(cfg.model.pipeline_class, cfg.model.call)
    assert steps.scheduler(pipe.scheduler).config.times == steps.times.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_documentation_run_at_tiny_size(command, tmp_path, monkeypatch):
    if "wan2_2_i2v" in command:
        pytest.importorskip("ftfy")  # the pipeline needs it
    monkeypatch.chdir(tmp_path)
    pictures(1, 40)[0].save("photo.png")
    pipe, _ = tiny("StableDiffusionPipeline", {})
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights("style", unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    _, *words = shlex.split(command)
    words = [word for word in words if not word.startswith("num_steps=")]
    run_cli(*words, "scale=tiny", *SHORT, "hydra.run.dir=run")

    assert list(Path("run", "schedules").glob("*_3.json"))
    assert all(
        "_tiny" in file.read_text() for file in Path("run", "schedules").glob("oss_*_3.json")
    )


def test_a_pipeline_is_on_its_device_before_it_is_called(tmp_path, monkeypatch):
    events = []
    begin, move = SuspendedCalls.begin, Pipeline._apply
    monkeypatch.setattr(
        SuspendedCalls, "begin", lambda *a, **k: events.append("called") or begin(*a, **k)
    )
    monkeypatch.setattr(Pipeline, "_apply", lambda *a: events.append("moved") or move(*a))
    run_cli("model=sd15", "scale=tiny", *SHORT, f"hydra.run.dir={tmp_path}")
    assert events[0] == "moved"
    assert "called" in events


def test_the_documentation_lists_all_presets():
    assert sorted(LISTED) == PRESETS


def test_the_command_line_overrides_a_preset():
    cfg = composed(
        "model=sdxl", "noise_schedule=ddim", "stepsize=oss_shared", "stepsize.oss_shared.start=free"
    )
    assert cfg.noise_schedule._target_ == "oss_exp.DDIMSchedule"
    assert cfg.stepsize.oss_shared.start == "free"


def test_an_image_that_is_missing_is_asked_for_before_anything_is_loaded(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_cli("model=wan2_2_i2v", "model.pipeline=nowhere", *SHORT, f"hydra.run.dir={tmp_path}")

    assert "WanImageToVideoPipeline needs image; add call.image=FILE" in capsys.readouterr().err

    with pytest.raises(SystemExit):
        run_cli(
            "model=wan2_2_i2v",
            "scale=tiny",
            "model.call.image=no.png",
            *SHORT,
            f"hydra.run.dir={tmp_path}",
        )

    assert "image no.png cannot be read" in capsys.readouterr().err


def test_a_class_without_a_small_pipeline_says_which_have_one(tmp_path, capsys):
    words = [
        "model=pipeline",
        "model.pipeline=x",
        "model.pipeline_class=MochiPipeline",
        "scale=tiny",
        *SHORT,
    ]

    with pytest.raises(SystemExit):
        run_cli(*words, f"hydra.run.dir={tmp_path}")

    assert "model.pipeline_class=MochiPipeline has no size=tiny; " in capsys.readouterr().err
