"""The task `certify` measures where a schedule holds, and runs outside of that warn."""

import inspect
import io
import json
import logging
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import run_cli
from omegaconf import OmegaConf

from oss_exp import files
from oss_exp.export import comfyui_nodes, oss_scheduler
from oss_exp.export.numbers import save_in_numbers
from oss_exp.export.oss_scheduler import OSSScheduler
from oss_exp.schedule import SolverSteps, StepSchedule
from oss_exp.schedule_file import Cell, Certificate
from oss_exp.tasks import certify
from oss_exp.tasks.certify import BASE, CellRecord, certificate_of, round_weights

CERTIFY = [
    "task=certify",
    "num_teacher_steps=8",
    "data.eval_samples=4",
    "data.classes=all",
    "stepsize=[ddim,fm]",
    "logger=none",
    "task.schedule=three.json",
    "task.axes.guidance=[1,3]",
    "task.axes.shift=[2]",
]
EVALUATE = [
    "task=evaluate",
    "task.schedule=three.json",
    "num_teacher_steps=8",
    "num_steps=[3]",
    "data.eval_samples=4",
    "data.classes=all",
    "logger=none",
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run task=certify in `tmp_path` with more settings."""
    monkeypatch.chdir(tmp_path)

    def run(*settings: str) -> None:
        run_cli(*CERTIFY, *settings)

    return run


@pytest.fixture(scope="module")
def schedule(tmp_path_factory) -> StepSchedule:
    """Three steps, searched on the shipped mixture."""
    folder = tmp_path_factory.mktemp("search")
    run_cli(
        "task=search",
        "stepsize=oss_shared",
        "num_teacher_steps=8",
        "num_steps=[3]",
        "data.classes=all",
        "data.search_samples=4",
        "logger=none",
        f"hydra.run.dir={folder}",
    )
    return StepSchedule.load(folder / "schedules" / "oss_shared_3.json")


@pytest.fixture
def searched(schedule, tmp_path, monkeypatch) -> StepSchedule:
    """The searched schedule as three.json in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    schedule.save("three.json")
    return schedule


# ------------------------------------------------------------------------------------------------
# The task
# ------------------------------------------------------------------------------------------------


def cell_files(folder: Path) -> dict[Path, bytes]:
    """Return the content of every file of measured cells."""
    return {file: file.read_bytes() for file in (folder / "c" / "cells").iterdir()}


@pytest.fixture(scope="module")
def certified(schedule, tmp_path_factory):
    """A certification that runs out of time and is continued, and what both runs print."""
    folder = tmp_path_factory.mktemp("certified")
    printed = [io.StringIO(), io.StringIO()]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        schedule.save("three.json")
        with redirect_stdout(printed[0]):
            run_cli(*CERTIFY, "hydra.run.dir=c", "task.max_minutes=1.0e-9")
        cells = cell_files(folder)
        with redirect_stdout(printed[1]):
            run_cli(*CERTIFY, "hydra.run.dir=c", "task.in_place=true")
    first, second = (stream.getvalue() for stream in printed)
    return SimpleNamespace(folder=folder, first=first, second=second, cells=cells)


@pytest.mark.slow
def test_a_certification_goes_on_where_its_time_ended(certified):
    stopped = "not measured within 1e-09 minutes: guidance=3, shift=2; the same command goes on"
    skipped = "skipped dtype=bfloat16, dtype=float16, dtype=float8_e4m3fn, dtype=int8: "

    assert stopped in certified.first
    assert skipped + "the model is exact and has no dtype" in certified.second
    assert certified.cells
    assert certified.cells.items() <= cell_files(certified.folder).items()


@pytest.mark.slow
def test_a_certificate_is_in_the_file_with_the_numbers_of_its_runs(certified):
    certificate = StepSchedule.load(certified.folder / "c/schedules/three.json").range
    base, guided, shifted = certificate.cells
    axes = [(cell.axis, cell.value) for cell in certificate.cells]

    assert certificate == StepSchedule.load(certified.folder / "three.json").range
    assert axes == [BASE, ("guidance", 3), ("shift", 2)]
    assert certificate.base["guidance"] == 1.0
    assert base.loss == 0
    assert base.gain > 0
    assert guided.loss == pytest.approx(base.psnr - guided.psnr)
    assert shifted.moved > guided.moved
    for cell in certificate.cells:
        assert cell.loss_interval[0] <= cell.loss <= cell.loss_interval[1]


@pytest.mark.slow
def test_a_certificate_has_a_page_and_a_picture(certified):
    page = (certified.folder / "c" / "report.html").read_text()

    assert "Where it holds" in page
    assert "guidance=3" in page
    assert (certified.folder / "c" / "certificate.png").is_file()


@pytest.mark.slow
def test_an_evaluation_warns_outside_of_the_certificate_only(certified, monkeypatch):
    monkeypatch.chdir(certified.folder)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_cli(*EVALUATE, "hydra.run.dir=e1")
    assert not [warning for warning in caught if "step schedule" in str(warning.message)]

    with pytest.warns(UserWarning, match=r"nothing was measured at guidance=7\.0, only at 1\.0, 3"):
        run_cli(*EVALUATE, "model.guidance.scale=7", "hydra.run.dir=e2")


@pytest.mark.slow
def test_a_solver_is_certified_under_the_name_of_its_class(run, tmp_path):
    StepSchedule([1.0, 0.5, 0.2, 0.0]).save("three.json")

    run(
        "hydra.run.dir=c",
        "task.allow_other_model=true",
        "task.axes.solver=[heun,euler]",
        "task.axes.shift=[]",
    )

    certificate = StepSchedule.load("c/schedules/three.json").range
    assert certificate.base["solver"] == "Euler"
    assert [cell.value for cell in certificate.cells if cell.axis == "solver"] == ["Heun"]


@pytest.mark.slow
def test_another_schedule_of_the_same_times_is_measured_anew(run, searched, tmp_path):
    one_cell = ["hydra.run.dir=c", "task.axes.guidance=[]", "task.axes.shift=[]"]
    run(*one_cell)
    before = StepSchedule.load("c/schedules/three.json").range.cells[0].psnr

    other_start = replace(searched.start, mean=searched.start.mean + 1)
    replace(searched, start=other_start).save("three.json")
    run(*one_cell)

    assert StepSchedule.load("c/schedules/three.json").range.cells[0].psnr != before


@pytest.mark.slow
def test_a_certification_goes_on_where_its_pictures_exceed_the_limit_of_assets(
    run, searched, monkeypatch
):
    first = ["hydra.run.dir=c", "task.axes.guidance=[]", "task.axes.shift=[]"]
    run(*first)

    def load(path, what, form=files.Provenance, limit=100):
        return files.load_asset(path, what, form, limit)

    monkeypatch.setattr(certify, "load_asset", load)

    run(*first, "task.axes.shift=[2]")

    moved = [cell.moved for cell in StepSchedule.load("c/schedules/three.json").range.cells]
    assert moved[0] is None
    assert moved[1] > 10


@pytest.mark.slow
def test_a_calibration_is_for_the_schedule_and_not_for_the_teacher(run, searched):
    task = ["task=calibrate", "task.samples=4", "data.search_samples=2", "stepsize=ddim"]
    same = ["num_teacher_steps=8", "data.classes=all", "logger=none", "hydra.run.dir=table"]
    run_cli(*task, *same)
    cell = ["task.axes.guidance=[]", "task.axes.shift=[]"]
    run(*cell, "hydra.run.dir=plain")
    run(*cell, "hydra.run.dir=calibrated", "solver.calibration=table/calibration.json")

    teachers = []
    values = []
    for folder in ("plain", "calibrated"):
        teachers.append(Path(folder, "cells", "teacher.safetensors").read_bytes())
        values.append(StepSchedule.load(f"{folder}/schedules/three.json").range.cells[0].psnr)
    assert teachers[0] == teachers[1]
    assert values[0] != values[1]


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("+task.axes.seed=[1]", "task.axes.seed is not one of dtype, guidance, shift"),
        ("stepsize=oss_ave", "compares with schedules by hand; set stepsize="),
    ],
)
def test_wrong_settings_are_refused(setting, message, searched, capsys):
    with pytest.raises(SystemExit):
        run_cli(*CERTIFY, setting, "hydra.run.dir=wrong")
    assert message in capsys.readouterr().err


def test_other_orders_than_those_of_the_schedule_are_refused(run, tmp_path, capsys):
    orders = SolverSteps(torch.tensor([1, 2, 1]))
    StepSchedule([1.0, 0.5, 0.2, 0.0], steps=orders).save("three.json")
    with pytest.raises(SystemExit):
        run("hydra.run.dir=c", "task.allow_other_model=true", "run_orders=fixed")
    assert "set run_orders=searched" in capsys.readouterr().err
    assert not (tmp_path / "c" / "cells").exists()


# ------------------------------------------------------------------------------------------------
# Inside and outside
# ------------------------------------------------------------------------------------------------


def cell(axis: str, value: object, loss: float) -> Cell:
    """A cell with 30 dB less this loss, and 20 dB by the baseline."""
    return Cell(
        axis=axis,
        value=value,
        n=8,
        psnr=30.0 - loss,
        psnr_interval=(29, 31),
        baseline=20.0,
        gain=1.0,
        gain_interval=(0, 2),
        loss=loss,
        loss_interval=(loss - 0.5, loss + 0.5),
        moved=None,
    )


RANGE = Certificate(
    baseline="fm",
    tolerance=1.0,
    base={"dtype": "float32", "guidance": 1.0, "shape": [4], "lora": "", "shift": None},
    cells=[
        cell("base", "as searched", 0.0),
        cell("guidance", 2.0, 0.5),
        cell("guidance", 5.0, 3.0),
        cell("dtype", "bfloat16", 0.1),
        cell("dtype", "fp8", 2.0),
        cell("lora", "x", 1.5),
    ],
    skipped={},
    calls=1,
)


def lost(setting: str, place: object, loss: float) -> str:
    """Return the warning of a setting nearest to a cell that lost this many dB."""
    interval = f"{loss - 0.5} to {loss + 0.5}"
    return (
        f"{setting} is outside of its range: "
        f"at {place} it lost {loss} dB ({interval}, n=8; gain +1.0)"
    )


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"guidance": 1.0, "dtype": "float32", "lora": "", "shape": [4], "shift": 7.0}, []),
        ({"guidance": None, "dtype": None}, []),
        ({"guidance": 2.0, "dtype": "bfloat16"}, []),
        ({"guidance": 1.7}, []),
        ({"guidance": 3.0}, [lost("guidance=3.0", 5.0, 3.0)]),
        ({"guidance": 7.0}, ["nothing was measured at guidance=7.0, only at 1.0, 2.0, 5.0"]),
        ({"dtype": "fp8"}, [lost("dtype=fp8", "fp8", 2.0)]),
        ({"dtype": "int8"}, ["nothing was measured at dtype=int8, only at float32, bfloat16, fp8"]),
        ({"lora": True}, [lost("lora=True", "x", 1.5)]),
        ({"lora": "y"}, ["nothing was measured at lora=y, only at , x"]),
        ({"shape": [5]}, ["nothing was measured at shape=[5], only at [4]"]),
        ({"shape": [2, 2]}, []),  # another layout
    ],
)
def test_a_setting_outside_of_the_range_is_named_with_its_loss(setting, expected):
    measured = json.loads(RANGE.model_dump_json())
    assert comfyui_nodes.outside(measured, setting) == expected
    assert comfyui_nodes.outside({}, setting) == []


def test_both_standalone_files_have_the_same_rule():
    assert inspect.getsource(comfyui_nodes.outside) == inspect.getsource(oss_scheduler.outside)


TWO_STEPS = StepSchedule(
    [1.0, 0.5, 0.0], provenance={"native": {"clock": "flow time"}}, range=RANGE
)


@pytest.fixture
def file(tmp_path) -> Path:
    """Two steps with the certificate RANGE, in the numbers that samplers read, as x.json."""
    return save_in_numbers(TWO_STEPS, tmp_path / "x.json")


def sample(scheduler: OSSScheduler, dtype: torch.dtype) -> None:
    """Run all steps of a scheduler."""
    x = torch.zeros(2, 4, dtype=dtype)
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample


def test_a_scheduler_warns_once_outside_of_its_range(file):
    scheduler = OSSScheduler.from_schedule(file)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(scheduler, torch.float32)
        sample(scheduler, torch.bfloat16)
    with pytest.warns(UserWarning, match="nothing was measured at dtype=float16"):
        sample(scheduler, torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(scheduler, torch.float16)
    lost = r"guidance=5\.0 is outside of its range: at 5\.0 it lost 3\.0 dB"
    with pytest.warns(UserWarning, match=lost):
        scheduler.check_range(guidance=5.0)


def test_a_certificate_comes_back_from_files_of_schedules_and_schedulers(file, tmp_path):
    scheduler = OSSScheduler.from_schedule(file)
    scheduler.save_pretrained(tmp_path / "saved")
    loaded = OSSScheduler.from_pretrained(tmp_path / "saved")
    saved = TWO_STEPS.save(tmp_path / "y.json")

    assert StepSchedule.load(saved).range == RANGE
    assert loaded.config["range"] == scheduler.config["range"]


NO_INTERVAL = {
    "axis": "dtype",
    "value": "float16",
    "loss": 3.0,
    "loss_interval": [],
    "n": 1,
    "gain": 0.0,
}


@pytest.mark.parametrize(
    "damaged",
    [
        {"base": 3},
        {"base": {"dtype": "float32"}, "cells": [7]},
        {"base": {"dtype": "float32"}, "cells": [NO_INTERVAL], "tolerance": 1.0},
    ],
)
def test_a_damaged_certificate_is_a_warning(damaged, file):
    nodes_schedule = replace(comfyui_nodes.load(file), measured=damaged)
    messages = comfyui_nodes.warn(nodes_schedule, {"dtype": "float16"})
    assert messages == ["its certificate is damaged; certify it again"]

    with pytest.warns(UserWarning, match="its certificate is damaged"):
        OSSScheduler(range=damaged).check_range(dtype="float16")


def test_a_sampler_of_comfyui_warns_once_and_describes_the_range(file, caplog):
    schedule = comfyui_nodes.load(file)
    comfyui_nodes.warned.clear()

    with caplog.at_level(logging.WARNING):
        for guidance in (1.0, 2.0, 5.0, 5.0):
            comfyui_nodes.warn(schedule, {"guidance": guidance})
    description = comfyui_nodes.describe(schedule)

    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["OSS schedule x: " + lost("guidance=5.0", 5.0, 3.0)]
    assert "guidance=5.0: 27.0 dB to its teacher, 20.0 by fm, loss 3.0, n=8" in description


# ------------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------------


def record(schedule: list[float], baseline: list[float]) -> CellRecord:
    """A measured cell of three samples with these PSNRs."""
    psnr = {"schedule": schedule, "fm": baseline}
    return CellRecord(key="", index=[0, 1, 2], psnr=psnr, moved=None, shape=[4], calls=5)


def test_the_intervals_are_paired():
    records = {
        BASE: record([20.0, 30.0, 40.0], [10.0, 20.0, 30.0]),
        ("dtype", "float16"): record([19.0, 29.0, 39.0], [0.0] * 3),
    }

    certificate = certificate_of(records, {"dtype": "float32"}, 0.5, {})

    base, half = certificate.cells
    assert half.loss_interval == pytest.approx((1.0, 1.0))  # though the samples differ by 10 dB
    assert base.gain_interval == pytest.approx((10.0, 10.0))
    assert certificate.calls == 10


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_weights_of_stages_are_not_rounded_and_their_cells_are_skipped(kind):
    cfg = OmegaConf.create({"model": {"dtype": "float32"}, "stages": "folder"})
    with pytest.raises(certify.Skipped, match="the network has stages"):
        certify.CHANGES["dtype"](cfg, kind)

    certify.CHANGES["dtype"](cfg, "bfloat16")
    assert cfg.model.dtype == "bfloat16"


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.5 / 127 + 1e-6), ("float8_e4m3fn", 2**-4)])
def test_rounded_weights_are_close(kind, bound):
    layer = torch.nn.Linear(16, 16)
    before = layer.weight.detach().clone()

    with torch.no_grad():
        round_weights(SimpleNamespace(backbone=layer), kind)

    error = (layer.weight.detach() - before).abs()
    worst = float((error / before.abs().amax(1, keepdim=True)).max())
    assert 0 < worst < bound
