"""The task `calibrate`: its table is the teacher's, and its curves are the students'."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import run_cli
from PIL import Image

from oss_exp.calibration import Calibration, amplitude
from oss_exp.data.noise import NoiseDataset
from oss_exp.distances import XtMSE
from oss_exp.models.families.mixture import GaussianMixture
from oss_exp.models.guidance import Guidance
from oss_exp.noise import FlowSchedule
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, sample, trajectory
from oss_exp.stepsize import Collective
from oss_exp.tasks import calibrate
from oss_exp.tasks.setting import Setting

SMALL = [
    "task=calibrate",
    "model=mixture_digits",
    "num_teacher_steps=20",
    "num_steps=[3]",
    "task.samples=25",
    "data.search_samples=6",
    "logger=none",
    "trainer.enable_progress_bar=false",
]
GRID = FlowSchedule(shift=1.0).nodes(20)


def oss_exp(folder: Path, *arguments: str) -> Path:
    """Run the command line with `folder` as the run folder, which is returned."""
    run_cli(*SMALL, *arguments, f"hydra.run.dir={folder}")
    return folder


def table(folder: Path) -> Calibration:
    """Return the table that a run wrote."""
    return Calibration.load(folder / "calibration.json")


def curves(folder: Path) -> dict[tuple[str, bool], dict]:
    """Return the curve of every strategy, uncalibrated (False) and calibrated (True)."""
    records = json.loads((folder / "amplitude.json").read_text())["curves"]
    return {(record["strategy"], record["calibrated"]): record for record in records}


def noises(classes: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the noises (25, 1, 8, 8) and labels (25,) of the samples of a run."""
    items = list(NoiseDataset(0, 0, 25, (1, 8, 8), classes))
    labels = torch.tensor([item["label"] for item in items])
    return torch.stack([item["noise"] for item in items]), labels


def model(guidance: float = 1.0) -> GaussianMixture:
    return GaussianMixture.from_asset(
        "mixture_digits.safetensors", guidance=Guidance(guidance), micro_batch=4096
    )


def means(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean low and high amplitude (P,) of states (P, B, *E)."""
    low, high = zip(*(amplitude(x, False) for x in states), strict=True)
    return torch.stack(low).mean(1), torch.stack(high).mean(1)


def same(one: Calibration, two: Calibration) -> bool:
    """Say whether two tables are equal up to rounding."""
    pairs = [(getattr(one, name), getattr(two, name)) for name in ("times", "low", "high")]
    return all(first.allclose(second, rtol=0, atol=1e-5) for first, second in pairs)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    return oss_exp(tmp_path_factory.mktemp("calibrated") / "run")


@pytest.mark.slow
def test_it_leaves_exactly_these_files(calibrated):
    files = {path for path in calibrated.rglob("*") if path.is_file()}
    expected = {
        ".hydra/config.yaml",
        ".hydra/hydra.yaml",
        ".hydra/overrides.yaml",
        ".lock",
        "amplitude.json",
        "amplitude.png",
        "calibration.json",
        "config.yaml",
        "schedules.png",
        "schedules/ddim_3.json",
        "schedules/oss_shared_3.json",
        "schedules/oss_shared_3.mean.json",
        "schedules/oss_shared_3.mean.safetensors",
        "teacher.json",
    }
    assert {path.relative_to(calibrated).as_posix() for path in files} == expected


def test_the_table_is_that_of_the_teacher(calibrated):
    result = table(calibrated)
    noise, _ = noises()
    low, high = means(trajectory(Euler(), model().velocity(None), noise, GRID))

    assert same(result, Calibration(GRID, low, high))
    # At t = 1 it is standard normal noise.
    assert float(result.low[0]) == pytest.approx(-1.645, abs=0.15)
    assert float(result.high[0]) == pytest.approx(1.645, abs=0.15)


def test_the_table_records_its_origin(calibrated):
    origin = table(calibrated).provenance

    assert origin["model"]["name"] == "mixture_digits"
    assert origin["model"]["sha256"] == model().fingerprint
    assert origin["teacher"]["num_steps"] == 20
    assert origin["teacher"]["noise_schedule"] == {"_target_": "oss_exp.FlowSchedule", "shift": 1.0}
    assert origin["solver"]["_target_"] == "oss_exp.Euler"
    assert (origin["samples"], origin["seed"]) == (25, 0)
    table(calibrated).check(model().fingerprint, "mixture_digits", GRID)


@pytest.mark.parametrize("strategy", ["ddim", "oss_shared"])
def test_the_curves_of_a_student_are_those_of_its_schedule(strategy, calibrated):
    steps = StepSchedule.load(calibrated / "schedules" / f"{strategy}_3.json")
    noise, _ = noises()
    velocity = model().velocity(None)
    calibration = table(calibrated)
    plain = curves(calibrated)[strategy, False]
    corrected = curves(calibrated)[strategy, True]

    # Times: the calibrated curve has each state twice, before and after its correction.
    twice = [t for t in steps.times[:-1].tolist() for _ in range(2)]
    assert plain["times"] == steps.times.tolist()
    assert corrected["times"] == [*twice, 0.0]

    # Samples.
    for curve, solver in ((plain, Euler()), (corrected, Euler(calibration=calibration))):
        low, high = means(sample(solver, velocity, noise, steps)[None])
        assert curve["low"][-1] == pytest.approx(float(low), abs=1e-5)
        assert curve["high"][-1] == pytest.approx(float(high), abs=1e-5)

    # States on the way.
    for edge, expected in zip(("low", "high"), calibration.at(steps.times[:-1]), strict=True):
        network_input = corrected[edge][1:-1:2]
        assert network_input == pytest.approx(expected.tolist(), abs=1e-5)
        assert corrected[edge][0] == plain[edge][0]
        assert corrected[edge][2] != pytest.approx(plain[edge][2], abs=1e-5)


def test_the_curve_of_the_teacher_is_the_table(calibrated):
    teacher = curves(calibrated)["teacher", False]
    expected = table(calibrated)
    for name in ("times", "low", "high"):
        assert teacher[name] == getattr(expected, name).tolist()


COLORS = {
    "calibrated": [0x1F, 0x77, 0xB4],
    "uncalibrated": [0xD6, 0x27, 0x28],
    "teacher": [0x99, 0x99, 0x99],
}


def test_the_picture_opens_and_shows_every_curve(calibrated):
    with Image.open(calibrated / "amplitude.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(pixels) > 400 * 400
    for color in COLORS.values():
        assert (pixels == color).all(1).sum() > 200


@pytest.mark.slow
def test_the_batch_size_changes_nothing(calibrated, tmp_path):
    folder = oss_exp(tmp_path / "run", "data.batch_size=4", "stepsize=ddim")
    assert same(table(folder), table(calibrated))


class Threads(Collective):
    """Ranks that are threads of this process and add their tensors once all have called."""

    def __init__(self, world: int):
        self.barrier = threading.Barrier(world, timeout=60)
        self.tensors = {}

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.tensors[threading.get_ident()] = tensor
        self.barrier.wait()
        total = sum(self.tensors.values())
        self.barrier.wait()
        return total


def calibrate_part(folder: Path, indices: torch.Tensor, students: dict) -> None:
    """Calibrate as one rank, which has these samples of all, in batches of 4."""
    noise, labels = noises()
    setting = Setting(model(), GRID, Euler(), XtMSE(norm=2))
    module = calibrate.CalibrateModule(setting, students, folder, {"model": None}, False, False)
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(barrier=lambda _: None))
    with torch.no_grad():
        for part in indices.split(4):
            module.predict_step({"index": part, "noise": noise[part], "label": labels[part]}, 0)
        module.on_predict_epoch_end()


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_gives_the_table_and_the_curves_of_one(
    world, calibrated, tmp_path, monkeypatch
):
    ranks = Threads(world)
    monkeypatch.setattr(calibrate, "DistributedCollective", lambda: ranks)
    students = {}
    for name in ("ddim", "oss_shared"):
        students[name, 3] = StepSchedule.load(calibrated / "schedules" / f"{name}_3.json")

    def run(rank: int) -> None:
        calibrate_part(tmp_path / f"{rank}", torch.arange(rank, 25, world), students)

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(run, range(world)))

    for folder in (tmp_path / f"{rank}" for rank in range(world)):
        assert same(table(folder), table(calibrated))
        assert table(folder).provenance["samples"] == 25
        for label, curve in curves(calibrated).items():
            assert curves(folder)[label]["low"] == pytest.approx(curve["low"], abs=1e-5)


@pytest.mark.slow
def test_a_table_of_each_channel_and_the_last_step_only(calibrated, tmp_path):
    """The digits have one channel, so the tables are the same."""
    folder = oss_exp(
        tmp_path / "run", "task.per_channel=true", "task.last_step_only=true", "stepsize=[edm,fm]"
    )

    per_channel = table(folder)
    assert per_channel.per_channel
    assert per_channel.last_step_only
    assert per_channel.low.shape == (21, 1)
    assert per_channel.low[:, 0].allclose(table(calibrated).low, rtol=0, atol=1e-5)

    curve = np.array(curves(folder)["edm", True]["low"])[:, 0]
    states = curve[:-1:2]
    network_inputs = curve[1::2]
    assert (states[:-1] == network_inputs[:-1]).all()
    assert states[-1] != network_inputs[-1]
    assert (folder / "amplitude.png").exists()


@pytest.mark.slow
def test_conditions_and_guidance_are_those_of_the_run(tmp_path):
    folder = oss_exp(
        tmp_path / "run", "data.classes=[1,7]", "model.guidance.scale=2", "stepsize=oss_shared"
    )
    noise, labels = noises([1, 7])

    low, high = means(trajectory(Euler(), model(2.0).velocity(labels, Guidance(2.0)), noise, GRID))
    assert same(table(folder), Calibration(GRID, low, high))
    assert table(folder).provenance["model"]["classes"] == [1, 7]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task.samples=0"], "task.samples must be a whole number from 1"),
        (["task.samples=2.5"], "task.samples must be a whole number from 1"),
        (["task.per_channel=often"], "task.per_channel must be true or false, got 'often'"),
        (["stepsize=[ddim,oss]"], "stepsize oss plans one schedule per sample"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        oss_exp(tmp_path / "run", *arguments)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "schedules").exists()


@pytest.mark.slow
def test_a_calibrated_solver_is_refused(calibrated, tmp_path, capsys):
    with pytest.raises(SystemExit):
        oss_exp(tmp_path / "run", f"solver.calibration={calibrated / 'calibration.json'}")
    assert "set solver.calibration=null" in capsys.readouterr().err
