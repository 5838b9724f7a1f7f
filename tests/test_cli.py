"""The command line answers wrong input by one message and exit code 1 or 2, with no results."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import mostly_slow, run_cli
from PIL import Image

from oss_exp.cli import CONF, SWEPT, main
from oss_exp.files import ASSETS, load_asset, save_asset
from oss_exp.models.families.mixture import GaussianMixture

SMALL = [
    "model=mixture_digits",
    "num_teacher_steps=20",
    "num_steps=[2]",
    "stepsize=edm",
    "data.search_samples=6",
    "data.eval_samples=8",
    "data.per_sample=4",
    "logger=none",
    "trainer.enable_progress_bar=false",
    "hydra.run.dir=run",
    "hydra.sweep.dir=sweep",
]
GROUPS = [
    "model",
    "noise_schedule",
    "solver",
    "distance",
    "stepsize",
    "data",
    "trainer",
    "logger",
    "task",
    "paths",
    "experiment",
]


def test_the_version_is_that_of_the_package(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["oss-exp", "--version"])
    main()
    assert capsys.readouterr().out == f"oss-exp {importlib.metadata.version('oss_exp')}\n"


@pytest.mark.parametrize("argument", ["--help", "task=certify --help", "--version", "solver=huen"])
def test_what_needs_no_torch_does_not_wait_for_it(argument):
    program = """
import sys
from oss_exp.cli import main
try:
    main()
finally:
    assert not {"torch", "lightning"} & set(sys.modules)
"""
    command = [sys.executable, "-c", program, *argument.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert "AssertionError" not in result.stderr
    assert result.returncode == ("huen" in argument)


def oss_exp(folder: Path, *arguments: str) -> int:
    """Run the command line in `folder` and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        try:
            run_cli(*arguments)
        except SystemExit as stop:
            return stop.code
    return 0


def is_result(path: Path) -> bool:
    """Return whether a file is a result, or a part of one."""
    return "schedules" in path.parts or path.name == "metrics.json" or path.suffix == ".tmp"


@pytest.fixture
def refused(tmp_path, capsys):
    """A function that runs a command, expects a refusal, and returns its message."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        code = oss_exp(tmp_path, *arguments)
        error = capsys.readouterr().err
        assert code in (1, 2), f"exit code {code}, stderr: {error}"
        assert error.strip()
        assert "Traceback" not in error, error
        assert error.count("oss-exp:") <= 1, error
        assert "--multirun" in arguments or "Error executing job" not in error, error
        files = [path for folder in ("run", "sweep") for path in (tmp_path / folder).rglob("*")]

        assert not any(is_result(path) for path in files)
        message = error.partition("oss-exp: ")[2]  # what precedes it repeats the command line
        return message or error

    return run


# --------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_a_wrong_option_is_answered_with_the_group_and_its_options(group, refused):
    error = refused(*SMALL, f"{group}=wrong")
    assert f"{group}=wrong" in error
    assert all(file.stem in error for file in (CONF / group).glob("*.yaml"))


WRONG_VALUES = [
    ("stepsize=os", ["stepsize=os", "oss_shared"]),
    ("num_steps=[0]", ["num_steps", "from 1 to 20", "[0]"]),
    ("num_steps=[-1]", ["num_steps", "from 1 to 20", "[-1]"]),
    ("num_steps=[21]", ["num_steps", "from 1 to 20", "[21]", "num_teacher_steps"]),
    ("num_steps=2.5", ["num_steps", "list", "[5,10]"]),
    ("num_steps=[]", ["num_steps", "from 1 to 20"]),
    ("num_steps=[2.5]", ["num_steps", "whole numbers", "2.5"]),
    ("num_steps=[two]", ["num_steps", "whole numbers", "two"]),
    ("num_steps=[2,two]", ["num_steps", "whole numbers", "two"]),
    ("num_steps=[[2]]", ["num_steps", "whole numbers", "[2]"]),
    ("num_steps=null", ["num_steps", "list"]),
    ("num_teacher_steps=0", ["num_teacher_steps", "at least 1", "0"]),
    ("num_teacher_steps=ten", ["num_teacher_steps", "whole number", "ten"]),
    ("num_step=[5]", ["num_step"]),
    ("data.search_sample=5", ["search_sample"]),
    ("data.classes=some", ["data.classes", "some"]),
    ("data.classes=[99]", ["data.classes", "0 to 9", "99"]),
    ("data.classes=3", ["data.classes", "list", "3"]),
    ("data.classes=[]", ["data.classes"]),
    ("data.classes=[cat]", ["data.classes", "cat"]),
    ("data.search_samples=0", ["search_samples", "from 1 to"]),
    ("data.eval_samples=0", ["eval_samples", "from 1 to"]),
    ("data.per_sample=0", ["per_sample", "at least 1"]),
    ("data.batch_size=0", ["batch_size", "at least 1"]),
    ("data.search_samples=many", ["data.search_samples", "many"]),
    ("data.seed=-1", ["seed", "-1"]),
    ("model.guidance.scale=3 data.classes=null", ["guidance", "data.classes"]),
    ("model.micro_batch=0", ["micro_batch", "at least 1"]),
    ("model.file=none.safetensors", ["none.safetensors", "mixture_digits.safetensors"]),
    ("noise_schedule.shift=-1", ["shift", "from 1e-06 to", "-1"]),
    ("noise_schedule.shift=big", ["shift", "big"]),
    ("trainer.accelerator=abacus", ["trainer", "abacus"]),
    ("run_orders=any", ["run_orders", "one of searched, fixed", "any"]),
    ("distance.norm=3", ["norm", "one of 1, 2", "3"]),
    ("distance=perceptual distance.layer=nose", ["distance.layer", "responsibilities"]),
    ("distance=inception distance.extractor.weights=w.pth", ["Inception weights", "w.pth"]),
    ("distance=inception", ["weights"]),
    ("solver=dpm_solver_pp solver.order=0", ["order", "1 to 3", "0"]),
    ("solver=dpm_solver_pp solver.order=4", ["order", "1 to 3", "4"]),
    ("solver=unipc solver.order=two", ["order", "whole number", "two"]),
    ("solver=unipc solver.variant=bh3", ["variant", "one of bh1, bh2", "bh3"]),
    ("solver=adams_bashforth solver.order=2.5", ["order", "whole number", "2.5"]),
    ("solver=heun solver.clock=x", ["clock", "one of t, sigma"]),
    ("solver=ipndm solver.weights=best", ["weights", "one of uniform, exact"]),
    ("solver.calibration=none.json", ["calibration none.json", "does not exist"]),
    ("stepsize=oss_fit stepsize.oss_fit.ridge=-1", ["ridge", "above 0", "-1"]),
    ("stepsize=oss_fit stepsize.oss_fit.history=0", ["history", "at least 1", "0"]),
    ("stepsize=oss_fit distance=x0_mse", ["oss_fit", "xt_mse"]),
    ("stepsize=oss_shared stepsize.oss_shared.max_order=0", ["max_order", "at least 1", "0"]),
    ("stepsize=dm stepsize.dm.p=-1", ["p must be", "above 0", "-1"]),
    ("stepsize=gits stepsize.gits.num_nodes=1", ["GITS", "1"]),
    ("stepsize=gits stepsize.gits.coeff=0", ["coeff", "from 0.1 to 10"]),
    ("stepsize=gits stepsize.gits.metric=bdev", ["metric", "dev", "bdev"]),
    ("stepsize=gits stepsize.gits.num_nodes=many", ["num_nodes", "many"]),
    ("stepsize=gits stepsize.gits.afs=maybe", ["afs", "true or false", "maybe"]),
    ("stepsize=ld3 stepsize.ld3.learning_rate=fast", ["learning_rate", "fast"]),
    ("solver=deis solver.beta_d=big", ["beta_d", "number", "big"]),
    ("solver=deis solver.beta_min=big", ["beta_min", "number", "big"]),
    (
        "solver=unipc solver.lower_order_final=maybe",
        ["lower_order_final", "true or false", "maybe"],
    ),
    ("solver=dpm2 solver.r=2", ["r must be", "2"]),
    ("distance=perceptual distance.min_time=late", ["min_time", "late"]),
    ("stepsize=ays stepsize.ays.schedule.table=sd9", ["sd9", "sd15", "sdxl"]),
    ("stepsize=ld3 stepsize.ld3.iterations=0", ["iterations", "at least 1"]),
    ("stepsize=ld3 data.search_samples=1", ["ld3", "two or more"]),
    ("task=calibrate task.samples=0", ["task.samples", "1 to"]),
    ("stepsize.edm.start=free", ["start", "free"]),
    ("stepsize.edm.schedule.rho=0", ["rho", "from 0.1 to 100"]),
    ("stepsize.edm.schedule.sigma_min=100", ["sigma_min", "100"]),
]


@pytest.mark.parametrize(("override", "words"), mostly_slow(WRONG_VALUES, *WRONG_VALUES[::9]))
def test_a_wrong_value_is_named(override, words, refused):
    error = refused(*SMALL, *override.split())
    assert [word for word in words if word not in error] == [], error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "override", "words"),
    [
        ("oss_shared", "band={stride:6,width:1}", ["band.stride", "power of two", "6"]),
        ("oss_shared", "band={strid:8,width:1}", ["stride", "strid"]),
        ("oss_shared", "band={stride:8,width:0}", ["width", "at least 1"]),
        ("oss_shared", "band={stride:four,width:1}", ["stride", "four"]),
        ("oss_shared", "band=8", ["band", "8"]),
        ("oss_shared", "objective=best", ["objective", "log_mean", "best"]),
        ("oss_shared", "refine=maybe", ["refine", "maybe"]),
        ("oss", "start=early", ["start", "pinned", "early"]),
        ("oss", "chunk=0", ["chunk", "0"]),
        ("oss_ave", "aggregate=mode", ["aggregate", "median", "mode"]),
    ],
)
def test_a_wrong_setting_of_a_strategy_is_named(strategy, override, words, refused):
    error = refused(*SMALL, f"stepsize={strategy}", f"stepsize.{strategy}.{override}")
    assert [word for word in words if word not in error] == [], error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_answered_with_the_trainer_that_works(refused):
    assert "trainer=cpu" in refused(*SMALL, "trainer=gpu")
    assert "trainer=cpu" in refused("task=pretrain", "model=unet_fashion", "trainer=gpu")


@pytest.mark.slow
def test_a_sweep_with_two_devices_a_job_is_refused(refused):
    error = refused("--multirun", *SMALL, "trainer.devices=2", "num_steps=[2],[3]")
    assert SWEPT in error
    assert "trainer.devices=2" in error
    assert "trainer=cpu" in error


@pytest.mark.slow
def test_machines_that_cannot_find_each_other_are_refused(refused, monkeypatch):
    for name in ("MASTER_ADDR", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    error = refused(*SMALL, "trainer=ddp", "trainer.accelerator=cpu", "trainer.num_nodes=2")
    assert "nothing says where the other machines are" in error
    assert "torchrun" in error

    error = refused(*SMALL, "trainer=ddp", "trainer.accelerator=cpu", "trainer.num_nodes=0")
    assert "positive" in error
    assert "trainer=cpu" not in error  # it would not help


@pytest.mark.slow
def test_a_sweep_on_slurm_where_there_is_none_is_refused(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    error = refused("--multirun", *SMALL, "hydra/launcher=submitit_slurm", "data.seed=1,2")
    assert "hydra/launcher=submitit_slurm needs SLURM's `srun`" in error
    assert SWEPT in error


def test_a_sweep_without_a_job_says_nothing_of_others(refused):
    error = refused("--multirun", *SMALL, "teacher_steps=9,10")
    assert "did you mean num_teacher_steps?" in error
    assert SWEPT not in error


def test_a_guidance_that_is_no_number_is_named(refused):
    assert "guidance" in refused(*SMALL, "data.classes=all", "model.guidance.scale=much")


def test_an_unknown_flag_is_a_usage_error(refused):
    assert "--evaluate" in refused(*SMALL, "--evaluate")


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder of schedules: edm_2, oss_2 (per sample) and oss_shared_2 (analytic)."""
    folder = tmp_path_factory.mktemp("saved")
    assert oss_exp(folder, *SMALL, "task=search", "stepsize=[edm,oss,oss_shared]") == 0
    return folder / "run" / "schedules"


def record(saved: Path) -> dict:
    """Return the content of a good schedule file."""
    return json.loads((saved / "edm_2.json").read_text())


WRONG_SCHEDULES = {
    "empty": (lambda good: "", "is empty"),
    "truncated": (lambda good: json.dumps(good)[:-40], "not complete JSON"),
    "not JSON": (lambda good: "1.0, 0.5, 0.0", "JSON"),
    "a list": (lambda good: "[1.0, 0.5, 0.0]", "must be an object"),
    "another format": (lambda good: json.dumps({**good, "format": "x"}), "is of another format"),
    "another version": (lambda good: json.dumps({**good, "version": 99}), "is of another version"),
    "increasing": (
        lambda good: json.dumps({**good, "times": [0.5, 0.9, 0.0]}),
        "strictly decrease",
    ),
    "NaN": (lambda good: json.dumps({**good, "times": [1.0, float("nan"), 0.0]}), "finite"),
    "words for times": (
        lambda good: json.dumps({**good, "times": ["1", "0.5", "0"]}),
        "step schedule",
    ),
    "no times": (
        lambda good: json.dumps({k: v for k, v in good.items() if k != "times"}),
        "field `times` is missing",
    ),
    "no model": (
        lambda good: json.dumps({**good, "provenance": {}}),
        "task.allow_other_model=true",
    ),
    "null model": (
        lambda good: json.dumps({**good, "provenance": {"model": None}}),
        "schedule.json",
    ),
    "a word for the model": (
        lambda good: json.dumps({**good, "provenance": {"model": "digits"}}),
        "schedule.json",
    ),
    "a mean that is not there": (
        lambda good: json.dumps(
            {
                **good,
                "start": {
                    "kind": "analytic",
                    "start_time": 1.0,
                    "mean": {"file": "x.safetensors", "sha256": "0" * 64},
                },
            }
        ),
        "x.safetensors does not exist",
    ),
}


@pytest.mark.parametrize("fault", mostly_slow(WRONG_SCHEDULES, "truncated", "no times"))
def test_a_step_schedule_that_cannot_be_used_is_named_with_its_fault(
    fault, refused, saved, tmp_path
):
    text, words = WRONG_SCHEDULES[fault]
    path = tmp_path / "schedule.json"
    path.write_text(text(record(saved)))
    error = refused(*SMALL, "task=evaluate", f"task.schedule={path}")

    assert str(tmp_path) in error
    assert words in error


def test_a_missing_step_schedule_is_named(refused):
    assert "nowhere.json does not exist" in refused(
        *SMALL, "task=evaluate", "task.schedule=nowhere.json"
    )


def test_a_step_schedule_for_another_model_is_refused(refused, saved):
    error = refused(
        *SMALL, "model=mixture_fashion", "task=evaluate", f"task.schedule={saved / 'edm_2.json'}"
    )
    assert "mixture_digits" in error
    assert "mixture_fashion" in error


def other_weights(folder: Path) -> Path:
    """Save a mixture like mixture_digits with other means, and return its file."""
    path = folder / "mixture_digits.safetensors"
    tensors, about = load_asset(ASSETS / path.name, "mixture")
    about = about.model_dump(include={"name", "event_shape"})
    save_asset(path, {**tensors, "means": 0.9 * tensors["means"]}, about)
    return path


@pytest.mark.slow
def test_other_weights_run_only_if_allowed(refused, saved, tmp_path, capsys):
    arguments = [*SMALL, "task=evaluate", f"task.schedule={saved / 'oss_shared_2.json'}"]
    arguments.append(f"model.file={other_weights(tmp_path)}")

    assert "task.allow_other_model=true" in refused(*arguments)
    assert oss_exp(tmp_path, *arguments, "task.allow_other_model=true") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["rows"][0]["strategy"] == "oss_shared"


@pytest.mark.slow
def test_a_model_of_another_shape_is_refused_even_if_allowed(refused, saved):
    arguments = ["model=mixture_fashion", "task=evaluate", "task.allow_other_model=true"]
    error = refused(*SMALL, *arguments, f"task.schedule={saved / 'oss_shared_2.json'}")
    assert "shape" in error


@pytest.mark.slow
@pytest.mark.parametrize(("searched", "measured"), [("null", "all"), ("all", "null")])
def test_an_analytic_start_runs_only_with_the_classes_it_has_means_of(
    searched, measured, refused, tmp_path
):
    arguments = [*SMALL, "task=search", "stepsize=oss_shared", "hydra.run.dir=searched"]
    assert oss_exp(tmp_path, *arguments, f"data.classes={searched}") == 0
    path = tmp_path / "searched/schedules/oss_shared_2.json"

    assert "class" in refused(
        *SMALL, "task=evaluate", f"task.schedule={path}", f"data.classes={measured}"
    )


def test_a_schedule_per_sample_does_not_run_on_the_noises_of_another_seed(refused, saved):
    assert "seed" in refused(
        *SMALL, "task=evaluate", f"task.schedule={saved / 'oss_2.json'}", "data.seed=1"
    )


def test_a_mixture_with_one_flipped_byte_is_refused(refused, tmp_path):
    path = tmp_path / "mixture_digits.safetensors"
    for suffix in (".safetensors", ".json"):
        shutil.copy(ASSETS / f"mixture_digits{suffix}", tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    error = refused(*SMALL, f"model.file={path}")

    assert str(path) in error
    assert "SHA-256" in error


@pytest.mark.parametrize(
    "override", ["task.schedule=step=5/x.json", "task.schedule=~/x.json", "task.schedule=a(1).json"]
)
def test_an_override_that_cannot_be_read_is_named_with_its_quoting(override, refused):
    error = refused(*SMALL, "task=evaluate", override)
    value = override.partition("=")[2]
    assert (
        f"{override} cannot be read as it is; quote its value: 'task.schedule=\"{value}\"'" in error
    )


@pytest.mark.slow
def test_a_tilde_is_the_home_folder_in_every_path(refused, saved, tmp_path, monkeypatch):
    """In files that are read by a library and in files that are written too."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "a=1").mkdir(parents=True)
    shutil.copy(saved / "edm_2.json", tmp_path / "home" / "a=1")
    export = ["exporter=comfyui", 'task.schedule="~/a=1/edm_2.json"', 'task.output="~/out.json"']

    assert oss_exp(tmp_path, "task=export", *export, "logger=none", "hydra.run.dir=run") == 0
    assert (tmp_path / "home" / "out.json").is_file()
    assert not (tmp_path / "~").exists()

    (tmp_path / "run").rename(tmp_path / "old")
    error = refused(*SMALL, 'model.file="~/w.safetensors"')
    assert str(tmp_path / "home" / "w.safetensors") in error
    assert str(tmp_path / "home" / "stages") in refused(*SMALL, 'stages="~/stages"')


def test_a_run_folder_called_tilde_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    error = refused(*SMALL, 'hydra.run.dir="~/run"')
    assert f"would be a folder called ~; write hydra.run.dir={tmp_path}/home/run" in error


def test_checkpoints_of_other_programs_are_not_loaded(refused, tmp_path, monkeypatch):
    """On a cluster Lightning loads any hpc_ckpt_*.ckpt in a run folder."""
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "job")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "hpc_ckpt_1.ckpt").write_bytes(b"x")
    assert "hpc_ckpt_1.ckpt is not of this program" in refused(*SMALL)


def test_a_report_needs_runs(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "metrics.json" in refused("task=report", "sweep=empty", "hydra.run.dir=run")
    assert "sweep" in refused("task=report", "hydra.run.dir=run")


def test_fitting_needs_images(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    error = refused("task=fit_mixture", "images.root=empty", "hydra.run.dir=run")
    assert "train-images-idx3-ubyte" in error
    assert "images.root" in error
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.slow
def test_a_mixture_is_fitted_to_images_in_folders_if_these_are_classes(refused, tmp_path):
    draw = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (8, 8), np.uint8)).save(path)
    fit = [
        "task=fit_mixture",
        "images=image_folder",
        "images.size=8",
        "images.channels=1",
        "task.output=x.safetensors",
        "task.clusters=1",
        "task.rank=2",
    ]

    message = refused(*fit, f"images.root={tmp_path / 'images' / 'a'}", "hydra.run.dir=run")
    words = "images has no classes to fit; give images in a folder for each class"
    assert message.startswith(words)

    assert oss_exp(tmp_path, *fit, f"images.root={tmp_path / 'images'}", "hydra.run.dir=run") == 0
    assert GaussianMixture.from_asset(tmp_path / "x.safetensors").event_shape == (1, 8, 8)


def test_a_run_folder_that_cannot_be_made_is_named(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused(*SMALL, "hydra.run.dir=file")


# --------------------------------------------------------------------------------------------------
# The process
# --------------------------------------------------------------------------------------------------


def process(folder: Path, *arguments: str) -> subprocess.Popen:
    """Start `python -m oss_exp` in a folder."""
    command = [sys.executable, "-m", "oss_exp", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_the_help_of_the_module_names_the_commands_and_every_group(tmp_path, capsys):
    with process(tmp_path, "--help") as module:
        assert oss_exp(tmp_path, "--help") == 0
        text = capsys.readouterr().out
        words = set(re.findall(r"\w+", text))
        assert set(GROUPS) - {"base", "hydra", "paths"} <= words
        assert {file.stem for file in (CONF / "task").glob("*.yaml")} <= words
        output, error = module.communicate(timeout=60)
    assert (module.returncode, output.strip(), error) == (0, text.strip(), "")


def test_the_script_is_the_command():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="oss-exp")
    assert script.load() is main
