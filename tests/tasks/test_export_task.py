"""task=export and task=import_sigmas by the command line."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from helpers import run_cli

from oss_exp.export.oss_scheduler import OSSScheduler
from oss_exp.schedule import Analytic, Free, SolverSteps, StepSchedule
from oss_exp.solvers import solver_of
from oss_exp.solvers.heun import Heun

FLOW = {"native": {"clock": "flow time"}}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def go(*settings: str) -> None:
        run_cli(*settings, "hydra.run.dir=run")

    return go


@pytest.fixture
def lists(tmp_path) -> StepSchedule:
    steps = StepSchedule([0.95, 0.5, 0.2, 0.0], Free(), provenance=FLOW)
    steps.save(tmp_path / "lists.json")
    return steps


def test_comfyui_and_back(run, lists, tmp_path, capsys):
    run("task=export", "task.schedule=lists.json", "exporter=comfyui", "task.output=comfy.json")
    out = capsys.readouterr().out
    assert "comfy.json: 3 steps for ComfyUI\nManualSigmas: 0.95, 0.5, 0.2, 0.0, with euler\n" in out
    assert "1.053 times less than in the search" in out
    nodes = json.loads((tmp_path / "comfy.json").read_text())
    assert nodes["sigmas"]["inputs"]["sigmas"] == "0.95, 0.5, 0.2, 0.0"
    run(
        "task=import_sigmas", "task.sigmas=comfy.json", "task.network=flow", "task.output=back.json"
    )
    again = StepSchedule.load(tmp_path / "back.json")
    assert torch.equal(again.times, lists.times)
    assert again.provenance == {"imported": {"sigmas": "comfy.json", "network": "flow"}}
    run(
        "task=import_sigmas",
        "task.sigmas=[14.6,0.9,0.0]",
        "task.network=eps",
        "task.output=back.json",
    )
    again = StepSchedule.load(tmp_path / "back.json")
    assert again.times.tolist() == pytest.approx([14.6 / 15.6, 0.9 / 1.9, 0.0])
    assert again.start_time == again.times[0]
    assert "denoise" not in capsys.readouterr().out


def test_the_sampler_comes_back(run, tmp_path, capsys):
    heun = {"_target_": "oss_exp.Heun", "clock": "t"}
    StepSchedule([0.95, 0.5, 0.0], provenance={**FLOW, "solver": heun}).save(tmp_path / "x.json")
    run("task=export", "task.schedule=x.json", "exporter=comfyui", "task.output=c.json")
    assert "with heun" in capsys.readouterr().out
    run("task=import_sigmas", "task.sigmas=c.json", "task.network=flow", "task.output=back.json")
    assert solver_of(StepSchedule.load(tmp_path / "back.json")) == Heun(clock="t")
    (tmp_path / "c.json").write_text(
        (tmp_path / "c.json").read_text().replace('"heun"', '"uni_pc"')
    )
    run("task=import_sigmas", "task.sigmas=c.json", "task.network=flow", "task.output=back.json")
    assert (
        "runs it with uni_pc, which has no name here; it is imported for Euler"
        in capsys.readouterr().out
    )


def test_one_of_two_lists_of_a_workflow(run, tmp_path, capsys):
    nodes = [
        {"id": i, "type": "ManualSigmas", "widgets_values": [f"{i / 10}, 0.5, 0.0"]}
        for i in (10, 8)
    ]
    (tmp_path / "two.json").write_text(json.dumps({"nodes": nodes}))
    run(
        "task=import_sigmas",
        "task.sigmas=two.json",
        "task.network=flow",
        "task.node=8",
        "task.output=back.json",
    )
    steps = StepSchedule.load(tmp_path / "back.json")
    assert steps.times.tolist() == [0.8, 0.5, 0.0]
    assert steps.provenance["imported"]["node"] == 8
    assert (
        "begins at flow time 0.8, as lists that change an image do (denoise < 1)"
        in capsys.readouterr().out
    )


def test_lists_of_sigma_over_alpha(run, tmp_path, capsys):
    StepSchedule([0.95, 0.5, 0.2, 0.0], Free()).save(tmp_path / "lists.json")
    run(
        "task=export",
        "task.schedule=lists.json",
        "exporter=k_diffusion",
        "task.exporter.network=eps",
    )
    sigmas = json.loads((tmp_path / "run" / "k_diffusion.json").read_text())
    assert sigmas == pytest.approx([19.0, 1.0, 0.25, 0.0])
    run(
        "task=export",
        "task.schedule=lists.json",
        "exporter=webui",
        "task.exporter.network=eps",
        "task.output=w.json",
    )
    assert json.loads((tmp_path / "w.json").read_text()) == pytest.approx(sigmas)
    assert "webUI_ExtraSchedulers, custom, with Euler: [" in capsys.readouterr().out


def test_diffusers_by_class_or_by_folder(run, lists, tmp_path, capsys):
    to = ["task=export", "task.schedule=lists.json", "exporter=diffusers", "task.output=d.json"]
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    scheduler.save_pretrained(tmp_path / "pipeline" / "scheduler")
    run(
        *to,
        "task.exporter.scheduler=pipeline",
        "task.exporter.height=1024",
        "task.exporter.width=1024",
    )
    given = json.loads((tmp_path / "d.json").read_text())
    assert given.pop("scheduler") == "FlowMatchEulerDiscreteScheduler"
    assert given.pop("runs") == {"network": "flow", "sigmas": lists.times.tolist()}
    assert given["mu"] == pytest.approx(1.15)
    scheduler.set_timesteps(**given)
    torch.testing.assert_close(scheduler.sigmas.double(), lists.times, rtol=0, atol=1e-6)
    assert "pipe(..., sigmas=[" in capsys.readouterr().out
    StepSchedule(lists.times).save(tmp_path / "lists.json")
    run(*to, "task.exporter.scheduler=EulerDiscreteScheduler")
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=json.loads((tmp_path / "d.json").read_text())["sigmas"])
    assert scheduler.sigmas.tolist() == pytest.approx([19.0, 1.0, 0.25, 0.0])


def test_a_scheduler_of_its_own(run, tmp_path):
    solver = {
        "_target_": "oss_exp.solvers.dpm_solver_pp.DPMSolverPP",
        "order": 2,
        "lower_order_final": True,
    }
    steps = StepSchedule(
        [0.9, 0.5, 0.2, 0.0],
        Analytic(torch.ones(1, 3)),
        steps=SolverSteps(torch.tensor([1, 2, 1])),
        provenance={"solver": solver},
    )
    steps.save(tmp_path / "x.json")
    run("task=export", "task.schedule=x.json", "exporter=oss_scheduler", "task.output=out/x.json")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"x.json", "x.mean.safetensors", "oss_scheduler.py"}
    scheduler = OSSScheduler.from_schedule(tmp_path / "out" / "x.json", DDIMScheduler().config)
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.weights[1][4] != 0  # the older answer


def test_a_folder_of_comfyui_nodes(run, lists, tmp_path, capsys):
    run(
        "task=export",
        "task.schedule=lists.json",
        "exporter=comfyui_nodes",
        "task.output=custom_nodes/oss_exp",
    )
    assert (tmp_path / "custom_nodes" / "oss_exp" / "schedules" / "3.json").is_file()
    assert "custom_nodes/oss_exp: 3 steps for ComfyUINodes\n" in capsys.readouterr().out
    run("task=export", "task.schedule=lists.json", "exporter=comfyui_nodes")
    assert (tmp_path / "run" / "comfyui_nodes" / "__init__.py").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "exporter=kdiff",
            "exporter=kdiff does not exist; did you mean k_diffusion? Choose from comfyui, comfyui_nodes",
        ),
        ("exporter=comfyui task.output=x.txt", "task.output must end in .json, got x.txt"),
        (
            "exporter=comfyui task.exporter.network=wan",
            "task.exporter.network must be one of flow, eps or null, got 'wan'",
        ),
        (
            "exporter=comfyui task.output=lists.json",
            "are the same file lists.json; choose another output",
        ),
        (
            "exporter=diffusers",
            "exporter=diffusers needs task.exporter.scheduler: a scheduler_config.json",
        ),
        (
            "exporter=diffusers task.exporter.scheduler=FluxPipeline",
            "neither a class of diffusers' schedulers nor a fi",
        ),
        (
            "exporter=diffusers task.exporter.scheduler=DDIMScheduler",
            "DDIMScheduler takes no times; export to oss_sche",
        ),
        (
            "exporter=diffusers task.exporter.height=512",
            "task.exporter.height and task.exporter.width belong together",
        ),
        ("", "You must specify 'exporter', e.g, exporter=<OPTION>"),
    ],
)
def test_wrong_settings_are_refused(run, lists, tmp_path, settings, message, capsys):
    with pytest.raises(SystemExit):
        run("task=export", "task.schedule=lists.json", *settings.split())
    assert message in capsys.readouterr().err
    assert {file.name for file in tmp_path.rglob("*.json")} == {"lists.json"}
