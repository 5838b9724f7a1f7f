"""The tasks `export` and `import_sigmas` by the command line."""

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
    """Run the command line in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def go(*settings: str) -> None:
        run_cli(*settings, "hydra.run.dir=run")

    return go


@pytest.fixture
def lists(tmp_path) -> StepSchedule:
    """Three steps in flow time, as lists.json."""
    steps = StepSchedule([0.95, 0.5, 0.2, 0.0], Free(), provenance=FLOW)
    steps.save(tmp_path / "lists.json")
    return steps


EXPORT = ["task=export", "task.schedule=lists.json"]


def imported(run, sigmas: str, network: str, *more: str) -> StepSchedule:
    """Import a list of sigmas as back.json; return its schedule."""
    source = [f"task.sigmas={sigmas}", f"task.network={network}"]
    run("task=import_sigmas", *source, "task.output=back.json", *more)
    return StepSchedule.load("back.json")


def test_a_list_goes_to_comfyui_and_back(run, lists, tmp_path, capsys):
    run(*EXPORT, "exporter=comfyui", "task.output=comfy.json")
    out = capsys.readouterr().out
    assert "comfy.json: 3 steps for ComfyUI\nManualSigmas: 0.95, 0.5, 0.2, 0.0, with euler\n" in out
    assert "1.053 times less than in the search" in out
    nodes = json.loads((tmp_path / "comfy.json").read_text())
    assert nodes["sigmas"]["inputs"]["sigmas"] == "0.95, 0.5, 0.2, 0.0"

    steps = imported(run, "comfy.json", "flow")
    assert torch.equal(steps.times, lists.times)
    assert steps.provenance == {"imported": {"sigmas": "comfy.json", "network": "flow"}}
    assert "denoise" not in capsys.readouterr().out


def test_sigmas_of_a_network_of_noise_are_those_over_alpha(run, capsys):
    steps = imported(run, "[14.6,0.9,0.0]", "eps")
    assert steps.times.tolist() == pytest.approx([14.6 / 15.6, 0.9 / 1.9, 0.0])
    assert steps.start_time == steps.times[0]
    assert "denoise" not in capsys.readouterr().out


def test_the_sampler_comes_back(run, tmp_path, capsys):
    heun = {"_target_": "oss_exp.Heun", "clock": "t"}
    StepSchedule([0.95, 0.5, 0.0], provenance={**FLOW, "solver": heun}).save(tmp_path / "x.json")
    run("task=export", "task.schedule=x.json", "exporter=comfyui", "task.output=c.json")
    assert "with heun" in capsys.readouterr().out
    assert solver_of(imported(run, "c.json", "flow")) == Heun(clock="t")


def test_an_unknown_sampler_is_imported_as_euler(run, lists, tmp_path, capsys):
    run(*EXPORT, "exporter=comfyui", "task.output=c.json")
    nodes = (tmp_path / "c.json").read_text()
    assert '"euler"' in nodes

    (tmp_path / "c.json").write_text(nodes.replace('"euler"', '"uni_pc"'))
    imported(run, "c.json", "flow")

    message = "runs it with uni_pc, which has no name here; it is imported for Euler"
    assert message in capsys.readouterr().out


def test_one_of_two_lists_of_a_workflow_is_chosen_by_its_node(run, tmp_path, capsys):
    nodes = []
    for i in (10, 8):
        values = [f"{i / 10}, 0.5, 0.0"]
        nodes.append({"id": i, "type": "ManualSigmas", "widgets_values": values})
    (tmp_path / "two.json").write_text(json.dumps({"nodes": nodes}))

    steps = imported(run, "two.json", "flow", "task.node=8")

    partial = "begins at flow time 0.8, as lists that change an image do (denoise < 1)"
    assert steps.times.tolist() == [0.8, 0.5, 0.0]
    assert steps.provenance["imported"]["node"] == 8
    assert partial in capsys.readouterr().out


def test_lists_for_networks_of_noise_are_of_sigma_over_alpha(run, tmp_path, capsys):
    StepSchedule([0.95, 0.5, 0.2, 0.0], Free()).save(tmp_path / "lists.json")
    eps = "task.exporter.network=eps"
    run(*EXPORT, "exporter=k_diffusion", eps)
    run(*EXPORT, "exporter=webui", eps, "task.output=w.json")

    expected = pytest.approx([19.0, 1.0, 0.25, 0.0])
    assert json.loads((tmp_path / "run" / "k_diffusion.json").read_text()) == expected
    assert json.loads((tmp_path / "w.json").read_text()) == expected
    assert "webUI_ExtraSchedulers, custom, with Euler: [" in capsys.readouterr().out


DIFFUSERS = [*EXPORT, "exporter=diffusers", "task.output=d.json"]


def test_a_scheduler_of_diffusers_is_named_by_the_folder_of_its_pipeline(
    run, lists, tmp_path, capsys
):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    scheduler.save_pretrained(tmp_path / "pipeline" / "scheduler")
    size = ["task.exporter.height=1024", "task.exporter.width=1024"]
    run(*DIFFUSERS, "task.exporter.scheduler=pipeline", *size)

    arguments = json.loads((tmp_path / "d.json").read_text())
    assert arguments.pop("scheduler") == "FlowMatchEulerDiscreteScheduler"
    assert arguments.pop("runs") == {"network": "flow", "sigmas": lists.times.tolist()}
    assert arguments["mu"] == pytest.approx(1.15)
    scheduler.set_timesteps(**arguments)
    torch.testing.assert_close(scheduler.sigmas.double(), lists.times, rtol=0, atol=1e-6)
    assert "pipe(..., sigmas=[" in capsys.readouterr().out


def test_a_scheduler_of_diffusers_is_named_by_its_class(run, lists, tmp_path):
    StepSchedule(lists.times).save(tmp_path / "lists.json")
    run(*DIFFUSERS, "task.exporter.scheduler=EulerDiscreteScheduler")

    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=json.loads((tmp_path / "d.json").read_text())["sigmas"])
    assert scheduler.sigmas.tolist() == pytest.approx([19.0, 1.0, 0.25, 0.0])


def test_a_schedule_with_orders_runs_in_the_scheduler_that_is_written_with_it(run, tmp_path):
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
    run(*EXPORT, "exporter=comfyui_nodes", "task.output=custom_nodes/oss_exp")
    assert (tmp_path / "custom_nodes" / "oss_exp" / "schedules" / "3.json").is_file()
    assert "custom_nodes/oss_exp: 3 steps for ComfyUINodes\n" in capsys.readouterr().out

    run(*EXPORT, "exporter=comfyui_nodes")
    assert (tmp_path / "run" / "comfyui_nodes" / "__init__.py").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "exporter=kdiff",
            "exporter=kdiff does not exist; did you mean k_diffusion? Choose from comfyui",
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
        run(*EXPORT, *settings.split())
    assert message in capsys.readouterr().err
    assert {file.name for file in tmp_path.rglob("*.json")} == {"lists.json"}
