"""task=certify: where a schedule holds, in its file, and the warnings that come of it."""

import inspect
import json
import logging
import warnings
from dataclasses import replace

import pytest
import torch
from helpers import run_cli

from oss_exp.export import comfyui_nodes, oss_scheduler
from oss_exp.export.numbers import save_in_numbers
from oss_exp.export.oss_scheduler import OSSScheduler
from oss_exp.schedule import StepSchedule
from oss_exp.schedule_file import Cell, Certificate
from oss_exp.tasks.certify import BASE, CellRecord, certificate_of, round_weights

CERTIFY = [
    "task=certify",
    "num_teacher_steps=8",
    "data.eval_samples=4",
    "stepsize=[ddim,fm]",
    "logger=none",
]
CERTIFY += [
    "task.schedule=three.json",
    "data.classes=all",
    "task.axes.guidance=[1,3]",
    "task.axes.shift=[2]",
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def go(*settings: str) -> None:
        run_cli(*CERTIFY, *settings)

    return go


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """three.json, of the shipped mixture."""
    monkeypatch.chdir(tmp_path)
    common = [
        "num_teacher_steps=8",
        "num_steps=[3]",
        "data.classes=all",
        "data.search_samples=4",
        "logger=none",
    ]
    run_cli("task=search", "stepsize=oss_shared", *common, "hydra.run.dir=searched")
    steps = StepSchedule.load("searched/schedules/oss_shared_3.json")
    steps.save("three.json")
    return steps


@pytest.mark.slow
def test_a_certificate(run, searched, tmp_path, capsys):
    """Its numbers are those of the runs, it is whole in the file, and it goes on where it stopped."""
    run("hydra.run.dir=c", "task.max_minutes=1.0e-9")
    out = capsys.readouterr().out
    assert "not measured within 1e-09 minutes: guidance=3, shift=2; the same command goes on" in out
    kept = {file: file.read_bytes() for file in (tmp_path / "c" / "cells").iterdir()}
    run("hydra.run.dir=c", "task.in_place=true")
    out = capsys.readouterr().out
    assert (
        "skipped dtype=bfloat16, dtype=float16, dtype=float8_e4m3fn, dtype=int8: the model is exact and has no dtype"
        in out
    )
    assert {file: file.read_bytes() for file in kept} == kept
    found = StepSchedule.load("c/schedules/three.json").range
    assert found == StepSchedule.load("three.json").range
    base, guided, shifted = found.cells
    assert [(cell.axis, cell.value) for cell in found.cells] == [
        BASE,
        ("guidance", 3),
        ("shift", 2),
    ]
    assert found.base["guidance"] == 1.0
    assert base.loss == 0
    assert base.gain > 0
    assert guided.loss == pytest.approx(base.psnr - guided.psnr)
    for cell in found.cells:
        assert cell.loss_interval[0] <= cell.loss <= cell.loss_interval[1]
    page = (tmp_path / "c" / "report.html").read_text()
    assert "Where it holds" in page
    assert "guidance=3" in page
    assert (tmp_path / "c" / "certificate.png").is_file()
    assert shifted.moved > guided.moved

    # task=evaluate, inside and outside.
    measure = [
        "task=evaluate",
        "task.schedule=three.json",
        "num_teacher_steps=8",
        "data.eval_samples=4",
        "logger=none",
    ]
    measure += ["data.classes=all", "num_steps=[3]"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_cli(*measure, "hydra.run.dir=e1")
    assert not [each for each in caught if "step schedule" in str(each.message)]
    with pytest.warns(UserWarning, match=r"nothing was measured at guidance=7\.0, only at 1\.0, 3"):
        run_cli(*measure, "model.guidance.scale=7", "hydra.run.dir=e2")


@pytest.mark.slow
def test_solvers_are_called_as_runs_call_them(run, tmp_path):
    """Their classes: a run with a solver that was measured is inside."""
    StepSchedule([1.0, 0.5, 0.2, 0.0]).save("three.json")
    run(
        "hydra.run.dir=c",
        "task.allow_other_model=true",
        "task.axes.solver=[heun,euler]",
        "task.axes.shift=[]",
    )
    found = StepSchedule.load("c/schedules/three.json").range
    assert found.base["solver"] == "Euler"
    assert [cell.value for cell in found.cells if cell.axis == "solver"] == ["Heun"]


@pytest.mark.slow
def test_another_schedule_of_the_same_times_is_measured_anew(run, searched, tmp_path):
    run("hydra.run.dir=c", "task.axes.guidance=[]", "task.axes.shift=[]")
    before = StepSchedule.load("c/schedules/three.json").range.cells[0].psnr
    replace(searched, start=replace(searched.start, mean=searched.start.mean + 1)).save(
        "three.json"
    )
    run("hydra.run.dir=c", "task.axes.guidance=[]", "task.axes.shift=[]")
    assert StepSchedule.load("c/schedules/three.json").range.cells[0].psnr != before


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("shift=[x]", "task.axes.shift must have finite numbers, got x"),
        (
            "teacher_steps=[8,2.5]",
            "task.axes.teacher_steps must have whole numbers from 1, got 2.5",
        ),
        ("solver=[nosuch]", "task.axes.solver=nosuch is not in conf/solver"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_measured(axis, message, run, tmp_path, capsys):
    StepSchedule([1.0, 0.5, 0.2, 0.0]).save("three.json")
    with pytest.raises(SystemExit):
        run("hydra.run.dir=c", "task.allow_other_model=true", f"task.axes.{axis}")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c" / "cells").exists()


RANGE = Certificate(
    baseline="fm",
    tolerance=1.0,
    base={"dtype": "float32", "guidance": 1.0, "shape": [4], "lora": "", "shift": None},
    cells=[
        Cell(axis=axis, value=value, n=8, psnr=30.0 - loss, psnr_interval=(29, 31), baseline=20.0, gain=1.0,
             gain_interval=(0, 2), loss=loss, loss_interval=(loss - 0.5, loss + 0.5), moved=None)
        for axis, value, loss in [("base", "as searched", 0.0), ("guidance", 2.0, 0.5), ("guidance", 5.0, 3.0),
                                  ("dtype", "bfloat16", 0.1), ("dtype", "fp8", 2.0), ("lora", "x", 1.5)]
    ],
    skipped={},
    calls=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ({"guidance": 1.0, "dtype": "float32", "lora": "", "shape": [4], "shift": 7.0}, []),
        ({"guidance": None, "dtype": None}, []),
        ({"guidance": 2.0, "dtype": "bfloat16"}, []),
        ({"guidance": 1.7}, []),
        (
            {"guidance": 3.0},
            [
                "guidance=3.0 is outside of its range: at 5.0 it lost 3.0 dB (2.5 to 3.5, n=8; gain +1.0)"
            ],
        ),
        ({"guidance": 7.0}, ["nothing was measured at guidance=7.0, only at 1.0, 2.0, 5.0"]),
        (
            {"dtype": "fp8"},
            [
                "dtype=fp8 is outside of its range: at fp8 it lost 2.0 dB (1.5 to 2.5, n=8; gain +1.0)"
            ],
        ),
        ({"dtype": "int8"}, ["nothing was measured at dtype=int8, only at float32, bfloat16, fp8"]),
        (
            {"lora": True},
            ["lora=True is outside of its range: at x it lost 1.5 dB (1.0 to 2.0, n=8; gain +1.0)"],
        ),
        ({"lora": "y"}, ["nothing was measured at lora=y, only at , x"]),
        ({"shape": [5]}, ["nothing was measured at shape=[5], only at [4]"]),
        ({"shape": [2, 2]}, []),  # another layout
    ],
)
def test_what_is_outside(setting, found):
    measured = json.loads(RANGE.model_dump_json())
    assert comfyui_nodes.outside(measured, setting) == found
    assert comfyui_nodes.outside({}, setting) == []


def test_both_files_have_one_rule():
    """Each is alone where it runs."""
    assert inspect.getsource(comfyui_nodes.outside) == inspect.getsource(oss_scheduler.outside)


def test_schedulers_and_samplers_warn_once(tmp_path, caplog):
    steps = StepSchedule(
        [1.0, 0.5, 0.0], provenance={"native": {"clock": "flow time"}}, range=RANGE
    )
    file = save_in_numbers(steps, tmp_path / "x.json")
    scheduler = OSSScheduler.from_schedule(file)

    def call(dtype: torch.dtype) -> None:
        x = torch.zeros(2, 4, dtype=dtype)
        scheduler.set_timesteps(2)
        for t in scheduler.timesteps:
            x = scheduler.step(x, t, x).prev_sample

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(torch.float32)
        call(torch.bfloat16)
    with pytest.warns(UserWarning, match="nothing was measured at dtype=float16"):
        call(torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(torch.float16)
    with pytest.warns(
        UserWarning, match=r"guidance=5\.0 is outside of its range: at 5\.0 it lost 3\.0 dB"
    ):
        scheduler.check_range(guidance=5.0)
    again = StepSchedule.load(steps.save(tmp_path / "y.json"))
    assert again.range == RANGE
    scheduler.save_pretrained(tmp_path / "saved")
    assert (
        OSSScheduler.from_pretrained(tmp_path / "saved").config["range"]
        == scheduler.config["range"]
    )

    no_interval = {
        "axis": "dtype",
        "value": "float16",
        "loss": 3.0,
        "loss_interval": [],
        "n": 1,
        "gain": 0.0,
    }
    for damaged in (
        {"base": 3},
        {"base": {"dtype": "float32"}, "cells": [7]},
        {"base": {"dtype": "float32"}, "cells": [no_interval], "tolerance": 1.0},
    ):
        found = comfyui_nodes.warn(
            replace(comfyui_nodes.load(file), measured=damaged), {"dtype": "float16"}
        )
        assert found == ["its certificate is damaged; certify it again"]
        scheduler = OSSScheduler(range=damaged)
        with pytest.warns(UserWarning, match="its certificate is damaged"):
            scheduler.check_range(dtype="float16")

    schedule = comfyui_nodes.load(file)
    comfyui_nodes.said.clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for guidance in (1.0, 2.0, 5.0, 5.0):
            comfyui_nodes.warn(schedule, {"guidance": guidance})
    assert [record.getMessage() for record in caplog.records] == [
        "OSS schedule x: guidance=5.0 is outside of its range: at 5.0 it lost 3.0 dB (2.5 to 3.5, n=8; gain +1.0)"
    ]
    assert (
        "guidance=5.0: 27.0 dB to its teacher, 20.0 by fm, loss 3.0, n=8"
        in comfyui_nodes.describe(schedule)
    )


def test_the_intervals_are_paired():
    def cell(own: list[float], other: list[float]) -> CellRecord:
        return CellRecord(
            key="",
            index=[0, 1, 2],
            psnr={"schedule": own, "fm": other},
            moved=None,
            shape=[4],
            calls=5,
        )

    found = {
        BASE: cell([20.0, 30.0, 40.0], [10.0, 20.0, 30.0]),
        ("dtype", "float16"): cell([19.0, 29.0, 39.0], [0.0] * 3),
    }
    made = certificate_of(found, {"dtype": "float32"}, 0.5, {})
    assert made.cells[1].loss_interval == pytest.approx(
        (1.0, 1.0)
    )  # whatever the samples' own differences
    assert made.cells[0].gain_interval == pytest.approx((10.0, 10.0))
    assert made.calls == 10


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_rounded_weights_are_close(kind):
    layer = torch.nn.Linear(16, 16)
    before = layer.weight.detach().clone()

    class Holder:
        backbone = layer

    with torch.no_grad():
        round_weights(Holder(), kind)
    worst = ((layer.weight.detach() - before).abs() / before.abs().amax(1, keepdim=True)).max()
    assert 0 < float(worst) < {"int8": 0.5 / 127 + 1e-6, "float8_e4m3fn": 2**-4}[kind]


@pytest.mark.slow
def test_wrong_settings_are_refused(searched, tmp_path, capsys):
    for settings, message in [
        (["+task.axes.seed=[1]"], "task.axes.seed is not one of dtype, guidance, shift"),
        (["stepsize=oss_ave"], "compares with schedules by hand; set stepsize="),
    ]:
        with pytest.raises(SystemExit):
            run_cli(*CERTIFY, *settings, f"hydra.run.dir=wrong/{len(message)}")
        assert message in capsys.readouterr().err
