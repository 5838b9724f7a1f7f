"""Every task on a GPU: the schedules of the CPU within a stated tolerance, and the same bits from run to run.

`pytest -m gpu`. OSS_EXP_GPU_TESTS=cpu runs the same tests on the CPU, to see that they would run.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import UniPCMultistepScheduler
from helpers import run_cli

import oss_exp
from experiments.kill_test.run import TASKS
from oss_exp.models.tiny import tiny
from oss_exp.schedule import StepSchedule

pytestmark = pytest.mark.gpu

TRAINER = f"trainer={os.environ.get('OSS_EXP_GPU_TESTS', 'gpu')}"
QUIET = ["logger=none", "trainer.enable_progress_bar=false"]
UNET = ["model=unet_fashion", "num_teacher_steps=12", "num_steps=[3]", "data.search_samples=4"]
UNET += ["data.eval_samples=8", "data.per_sample=4", "data.classes=all", *QUIET]
SEARCHES = "stepsize=[ddim,oss,oss_ave,oss_shared,oss_fit]"
NODES = 1  # by which a network's schedule may differ from the CPU's, for its rounding is another
DECIBELS = 0.1  # by which its mean PSNR may
BF16_DECIBELS = 3.0  # the same of weights in bfloat16


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def run(place):
    """A function: the run folder of some settings, run once under each name."""

    @cache
    def folder(name: str, *settings: str) -> Path:
        run_cli(*settings, f"hydra.run.dir={place / name}")
        return place / name

    return folder


def schedules(folder: Path) -> dict[str, StepSchedule]:
    files = (folder / "schedules").glob("*[0-9].json")
    return {file.stem: StepSchedule.load(file) for file in files}


def content(folder: Path) -> dict[str, bytes | dict]:
    """What a run gave, seconds aside: its schedules, their tensors, every image's PSNR."""
    found: dict[str, bytes | dict] = {}
    for file in sorted((folder / "schedules").iterdir()):
        if file.suffix == ".safetensors":
            found[file.name] = file.read_bytes()
        else:
            found[file.name] = json.loads(file.read_text())
            found[file.name].get("provenance", {}).pop("planning", None)
    if (folder / "metrics.json").exists():
        rows = json.loads((folder / "metrics.json").read_text())["rows"]
        found["psnr"] = {f"{row['strategy']} {row['num_steps']}": row["per_image"] for row in rows}
    return found


def psnr(folder: Path) -> dict[tuple[str, int], float]:
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    return {(row["strategy"], row["num_steps"]): row["psnr"]["mean"] for row in rows}


def require_near(folder: Path, expected: Path) -> None:
    """Assert that schedules are the same within NODES nodes of the teacher's grid, and PSNR within DECIBELS."""
    grid = torch.tensor(json.loads((expected / "teacher.json").read_text())["times"])
    found, wanted = schedules(folder), schedules(expected)
    assert found.keys() == wanted.keys()
    for name, plan in found.items():
        positions = [
            (grid - times[..., None].to(grid)).abs().argmin(-1)
            for times in (plan.times, wanted[name].times)
        ]
        assert (positions[0] - positions[1]).abs().max() <= NODES, name
    if (expected / "metrics.json").exists():
        assert psnr(folder) == pytest.approx(psnr(expected), abs=DECIBELS)


def test_search_of_an_exact_model_gives_the_schedules_of_the_cpu(run):
    settings = [*TASKS["search"], *QUIET]
    gpu, cpu = run("search", *settings, TRAINER), run("search_cpu", *settings, "trainer=cpu")
    require_near(gpu, cpu)


def test_compare_gives_the_schedules_and_the_psnr_of_the_cpu(run):
    gpu = run("compare", *UNET, SEARCHES, TRAINER)
    require_near(gpu, run("compare_cpu", *UNET, SEARCHES, "trainer=cpu"))
    assert (gpu / "report.html").is_file()


def test_a_second_run_gives_the_same_bits(run):
    first, second = (run(name, *UNET, SEARCHES, TRAINER) for name in ("compare", "compare_again"))
    assert content(first) == content(second)


def test_evaluate_gives_the_psnr_of_the_comparison(run):
    compared = run("compare", *UNET, SEARCHES, TRAINER)
    saved = f"task.schedule={compared / 'schedules' / 'oss_shared_3.json'}"
    evaluated = run("evaluate", "task=evaluate", *UNET, saved, TRAINER)
    assert psnr(evaluated)["oss_shared", 3] == psnr(compared)["oss_shared", 3]


def test_states_in_host_memory_change_nothing(run):
    settings = [*UNET, "task=search", "stepsize=[oss_ave,oss_shared]"]
    inside, outside = (
        run("inside", *settings, TRAINER),
        run("outside", *settings, TRAINER, "offload_states=true"),
    )
    found, expected = schedules(outside), schedules(inside)
    assert {name: plan.times.tolist() for name, plan in found.items()} == {
        name: plan.times.tolist() for name, plan in expected.items()
    }


def test_weights_in_bfloat16(run):
    settings = [*UNET, "stepsize=[ddim,oss_shared]"]
    single = run("float32", *settings, TRAINER)
    half = run("bfloat16", *settings, TRAINER, "model.dtype=bfloat16")
    assert psnr(half) == pytest.approx(psnr(single), abs=BF16_DECIBELS)


def test_metrics_count_on_the_device(run):
    settings = [*UNET, "stepsize=ddim", "metric=[fid,class_agreement]"]
    values = [
        json.loads((run(name, *settings, trainer) / "metrics.json").read_text())["rows"][0][
            "metrics"
        ]
        for name, trainer in (("metrics", TRAINER), ("metrics_cpu", "trainer=cpu"))
    ]
    assert values[0] == pytest.approx(values[1], rel=0.02)


def test_pretraining_and_finetuning_go_on_where_they_were(run, place):
    steps = [setting for setting in TASKS["pretrain"] if "max_steps" not in setting]
    trained = run("pretrain", *steps, "task.max_steps=3", TRAINER)
    longer = run("resumed", *steps, "task.max_steps=5", f"task.resume={trained}", TRAINER)
    losses = json.loads((longer / "training.json").read_text())["losses"]
    assert len(losses) == 5
    assert all(0 < loss < 10 for loss in losses)
    weights = safetensors.torch.load_file(longer / "dit_fashion.safetensors")
    assert all(bool(weight.isfinite().all()) for weight in weights.values())

    settings = [setting.format(pretrain=longer) for setting in TASKS["finetune"]]
    tuned = run("finetune", *settings, TRAINER)
    assert (tuned / "finetune.json").is_file()


@pytest.mark.parametrize("preset", ["flux_dev", "sd15", "wan2_1_1_3b"])
def test_pipelines(run, preset):
    short = [
        "scale=tiny",
        "num_teacher_steps=6",
        "num_steps=[2]",
        "stepsize=[pipeline,oss_shared]",
        *QUIET,
    ]
    gpu = run(preset, f"model={preset}", *short, TRAINER)
    require_near(gpu, run(f"{preset}_cpu", f"model={preset}", *short, "trainer=cpu"))


def test_a_pipeline_whose_scheduler_keeps_its_noise_levels_in_host_memory():
    pipe, call = tiny("WanPipeline", {})
    pipe.scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    pipe.to("cpu" if TRAINER == "trainer=cpu" else "cuda")
    model = oss_exp.Pipeline(pipe, ["a fox", "a boat"], **call)
    steps = oss_exp.search(model, num_steps=2, num_teacher_steps=6)
    assert steps.num_steps == 2
