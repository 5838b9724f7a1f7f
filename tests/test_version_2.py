"""Files of format version 2, written by release 0.1, are read as they were then."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import mostly_slow, run_cli
from safetensors.torch import load_file

from oss_exp.calibration import Calibration
from oss_exp.models.families.mixture import GaussianMixture
from oss_exp.models.guidance import Guidance
from oss_exp.names import named_object
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, named_solver, nfe, sample

FILES = Path(__file__).parent / "version_2"
REPLAYS = json.loads((FILES / "replay.json").read_text())
SCHEDULES = sorted(
    str(path.relative_to(FILES))
    for path in FILES.glob("**/schedules/**/*.json")
    if ".mean." not in path.name
)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(FILES / "replay.safetensors")


def test_the_files_have_schedules_of_every_kind():
    schedules = [StepSchedule.load(FILES / name) for name in SCHEDULES]
    kinds = {(steps.kind, steps.per_sample, steps.orders is not None) for steps in schedules}

    assert {start for start, _, _ in kinds} >= {
        "free start",
        "pinned start",
        "analytic start",
        "analytic start, fitted steps",
        "pinned start, fitted steps",
    }
    assert len(kinds) >= 11


@pytest.mark.parametrize("name", mostly_slow(SCHEDULES, *SCHEDULES[::9]))
def test_a_schedule_saved_again_is_the_same(name, tmp_path):
    old = StepSchedule.load(FILES / name)
    path = old.save(tmp_path / "again.json")
    again = StepSchedule.load(path)
    record = json.loads(path.read_text())
    assert record["version"] == 3
    assert torch.equal(again.times, old.times)
    for key in ("kind", "start_time", "samples", "provenance"):
        assert getattr(again, key) == getattr(old, key)

    def tensors_of(steps: StepSchedule) -> tuple:
        return steps.mean, steps.orders, getattr(steps.steps, "weights", None)

    for value, expected in zip(tensors_of(again), tensors_of(old), strict=True):
        assert (value is None and expected is None) or torch.equal(value, expected)


@pytest.mark.parametrize(
    ("times", "samples"),
    [([1.0, 0.5, 0.0], [0]), ([[1.0, 0.5, 0.0]], None), ([], None), ([[]], [0])],
)
def test_times_that_do_not_fit_their_samples_are_refused(times, samples, tmp_path):
    paths = [FILES / name for name in SCHEDULES]
    pinned = next(path for path in paths if StepSchedule.load(path).kind == "pinned start")
    changes = {"times": times, "samples": samples, "orders": None}
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(json.loads(pinned.read_text()) | changes))

    words = r"field `times|times of shape|a step schedule needs at least two times"
    with pytest.raises(ValueError, match=rf"steps\.json: ({words})"):
        StepSchedule.load(path)


@pytest.mark.parametrize("name", mostly_slow(SCHEDULES, *SCHEDULES[::9]))
def test_a_schedule_names_public_objects_only(name, tmp_path):
    text = StepSchedule.load(FILES / name).save(tmp_path / "again.json").read_text()
    names = re.findall(r'"_target_": "([^"]*)"', text)
    for name in names:
        assert re.fullmatch(r"oss_exp\.([a-z]\w*|[A-Z]\w*(\.[a-z]\w*)?)", name)
        assert callable(named_object(name))


@pytest.mark.parametrize("name", mostly_slow(REPLAYS, *[*REPLAYS][::9]))
def test_a_schedule_replays_to_the_same_numbers(name, tensors, monkeypatch):
    """To rounding: the last bits depend on the processor."""
    monkeypatch.chdir(FILES.parents[1])  # one replay names a calibration by its path
    replay = REPLAYS[name]
    steps = StepSchedule.load(FILES / name)

    # The model and the sampler of the replay.
    guidance = Guidance(**replay["guidance"])
    model = GaussianMixture.from_asset(
        f"{replay['model']}.safetensors", guidance=guidance, micro_batch=1024
    ).double()
    condition = None if replay["condition"] is None else torch.tensor(replay["condition"])
    if replay["samples"] is not None:
        steps = steps.rows(replay["samples"])
    solver = Euler()
    if replay["solver"] is not None:
        calibration = replay["solver"]["calibration"]
        solver = dataclasses.replace(named_solver(steps.about("solver")), calibration=calibration)
    velocity = model.velocity(condition)
    noise = tensors[replay["noise"]] * replay["start_time"]
    x0 = sample(solver, velocity, noise, steps, group=condition)

    torch.testing.assert_close(x0, tensors[replay["x0"]], rtol=1e-12, atol=1e-12)
    assert nfe(solver, steps, velocity) == replay["nfe"]


@pytest.mark.parametrize("name", ["calibration.json", "calibration_per_channel.json"])
def test_a_calibration_loads(name):
    assert len(Calibration.load(FILES / name).times) == 21


NETWORK = [
    "model=dit_fashion",
    "model.event_shape=[1,8,8]",
    "model.backbone.size=8",
    "model.backbone.num_layers=1",
    "model.backbone.num_attention_heads=2",
    "model.backbone.attention_head_dim=8",
    f"model.checkpoint={FILES / 'base' / 'base.safetensors'}",
]
SHORT = [
    "num_teacher_steps=10",
    "data.search_samples=2",
    "data.eval_samples=4",
    "data.per_sample=4",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stages", "stages_lora"])
def test_a_folder_of_stages_gives_the_same_samples(name, tmp_path):
    stages = FILES / name
    evaluation = [
        f"stages={stages}",
        f"task.schedule={stages / 'schedule.json'}",
        f"hydra.run.dir={tmp_path}",
    ]
    run_cli("task=evaluate", *NETWORK, *SHORT, *evaluation, "data.batch_size=4", "logger=none")
    (old,) = json.loads((FILES / f"{name}.metrics.json").read_text())["rows"]
    (new,) = json.loads((tmp_path / "metrics.json").read_text())["rows"]

    assert new["per_image"]["index"] == old["per_image"]["index"]
    assert new["per_image"]["psnr"] == pytest.approx(old["per_image"]["psnr"], abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run_search", "run_compare"])
def test_an_older_run_continues_by_its_own_command(name, tmp_path):
    """It plans nothing again, and measures the same."""
    old = FILES / "run" / name
    folder = tmp_path / "run"
    shutil.copytree(old, folder)
    run_cli(*yaml.safe_load((old / "overrides.yaml").read_text()), f"hydra.run.dir={folder}")
    for file in (old / "schedules").iterdir():
        assert (folder / "schedules" / file.name).read_bytes() == file.read_bytes()

    if name == "run_compare":
        before = json.loads((old / "metrics.json").read_text())["rows"]
        after = json.loads((folder / "metrics.json").read_text())["rows"]
        assert [row["schedule"] for row in after] == [row["schedule"] for row in before]
        for row, expected in zip(after, before, strict=True):
            psnr = expected["per_image"]["psnr"]
            assert row["per_image"]["psnr"] == pytest.approx(psnr, abs=2e-4)


def test_an_older_run_of_another_command_is_refused(tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(FILES / "run" / "run_search", folder)
    overrides = yaml.safe_load((folder / "overrides.yaml").read_text())
    with pytest.raises(SystemExit):
        run_cli(*overrides, "solver.order=1", f"hydra.run.dir={folder}")
    assert "holds a run with another solver" in capsys.readouterr().err
