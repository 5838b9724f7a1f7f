"""A run of task=calibrate on the digits mixture: its table is the teacher's, its curves are the students'."""

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
    return Calibration.load(folder / "calibration.json")


def curves(folder: Path) -> dict[tuple[str, bool], dict]:
    found = json.loads((folder / "amplitude.json").read_text())["curves"]
    return {(c["strategy"], c["calibrated"]): c for c in found}


def noises(classes: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    items = list(NoiseDataset(0, 0, 25, (1, 8, 8), classes))
    return torch.stack([item["noise"] for item in items]), torch.tensor(
        [item["label"] for item in items]
    )


def model(guidance: float = 1.0) -> GaussianMixture:
    return GaussianMixture.from_asset(
        "mixture_digits.safetensors", guidance=Guidance(guidance), micro_batch=4096
    )


def means(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, B, *E) -> low and high (P,)."""
    low, high = zip(*(amplitude(x, False) for x in states), strict=True)
    return torch.stack(low).mean(1), torch.stack(high).mean(1)


def same(one: Calibration, two: Calibration) -> bool:
    return all(
        getattr(one, name).allclose(getattr(two, name), rtol=0, atol=1e-5)
        for name in ("times", "low", "high")
    )


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    return oss_exp(tmp_path_factory.mktemp("calibrated") / "run")


@pytest.mark.slow
def test_it_leaves_exactly_these_files(calibrated):
    left = {
        path.relative_to(calibrated).as_posix() for path in calibrated.rglob("*") if path.is_file()
    }
    plans = {f"schedules/{name}" for name in ("ddim_3.json", "oss_shared_3.json")}
    plans |= {f"schedules/oss_shared_3.mean.{suffix}" for suffix in ("json", "safetensors")}
    expected = {
        "config.yaml",
        "schedules.png",
        "calibration.json",
        "amplitude.json",
        "amplitude.png",
        *plans,
    }
    expected.add("teacher.json")
    assert left == expected | {".lock"} | {
        f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")
    }


def test_the_table_is_that_of_the_teacher(calibrated):
    found, (noise, _) = table(calibrated), noises()
    low, high = means(trajectory(Euler(), model().velocity(None), noise, GRID))
    assert same(found, Calibration(GRID, low, high))
    # At t = 1 it is standard normal noise.
    assert (float(found.low[0]), float(found.high[0])) == pytest.approx((-1.645, 1.645), abs=0.15)


def test_it_says_what_made_it(calibrated):
    about = table(calibrated).provenance
    assert (about["model"]["name"], about["model"]["sha256"]) == (
        "mixture_digits",
        model().fingerprint,
    )
    assert about["teacher"]["num_steps"] == 20
    assert about["teacher"]["noise_schedule"] == {"_target_": "oss_exp.FlowSchedule", "shift": 1.0}
    assert about["solver"]["_target_"] == "oss_exp.Euler"
    assert (about["samples"], about["seed"]) == (25, 0)
    table(calibrated).check(model().fingerprint, "mixture_digits", GRID)


@pytest.mark.parametrize("strategy", ["ddim", "oss_shared"])
def test_the_curves_of_a_student_are_those_of_its_schedule(strategy, calibrated):
    steps, (noise, _) = StepSchedule.load(calibrated / "schedules" / f"{strategy}_3.json"), noises()
    velocity, calibration = model().velocity(None), table(calibrated)
    plain, corrected = curves(calibrated)[strategy, False], curves(calibrated)[strategy, True]
    assert plain["times"] == steps.times.tolist()
    assert corrected["times"] == [t for t in steps.times[:-1].tolist() for _ in range(2)] + [0.0]
    for curve, solver in ((plain, Euler()), (corrected, Euler(calibration=calibration))):
        low, high = means(sample(solver, velocity, noise, steps)[None])
        assert (curve["low"][-1], curve["high"][-1]) == pytest.approx(
            (float(low), float(high)), abs=1e-5
        )
    for edge, expected in zip(("low", "high"), calibration.at(steps.times[:-1]), strict=True):
        assert corrected[edge][1:-1:2] == pytest.approx(
            expected.tolist(), abs=1e-5
        )  # as the network sees it
        assert corrected[edge][0] == plain[edge][0]  # as it arrives
        assert corrected[edge][2] != pytest.approx(plain[edge][2], abs=1e-5)


def test_the_curve_of_the_teacher_is_the_table(calibrated):
    teacher, found = curves(calibrated)["teacher", False], table(calibrated)
    assert (teacher["times"], teacher["low"], teacher["high"]) == tuple(
        getattr(found, name).tolist() for name in ("times", "low", "high")
    )


def test_the_picture_opens_and_shows_every_curve(calibrated):
    with Image.open(calibrated / "amplitude.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(pixels) > 400 * 400
    for color in (
        [0x1F, 0x77, 0xB4],
        [0xD6, 0x27, 0x28],
        [0x99, 0x99, 0x99],
    ):  # calibrated, uncalibrated, teacher
        assert (pixels == color).all(1).sum() > 200


@pytest.mark.slow
def test_the_batch_size_changes_nothing(calibrated, tmp_path):
    assert same(
        table(oss_exp(tmp_path / "run", "data.batch_size=4", "stepsize=ddim")), table(calibrated)
    )


class Threads(Collective):
    """Ranks that are threads of this process: everyone's tensors are added where all have called."""

    def __init__(self, world: int):
        self.barrier, self.tensors = threading.Barrier(world, timeout=60), {}

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.tensors[threading.get_ident()] = tensor
        self.barrier.wait()
        total = sum(self.tensors.values())
        self.barrier.wait()
        return total


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_gives_the_table_and_the_curves_of_one(
    world, calibrated, tmp_path, monkeypatch
):
    """25 samples in batches of 4; every rank sees its own part, in its own number of batches."""
    ranks = Threads(world)
    monkeypatch.setattr(calibrate, "DistributedCollective", lambda: ranks)
    noise, labels = noises()
    students = {
        (name, 3): StepSchedule.load(calibrated / "schedules" / f"{name}_3.json")
        for name in ("ddim", "oss_shared")
    }

    def run(rank: int) -> None:
        setting = Setting(model(), GRID, Euler(), XtMSE(norm=2))
        module = calibrate.CalibrateModule(
            setting, students, tmp_path / f"{rank}", {"model": None}, False, False
        )
        module._trainer = SimpleNamespace(strategy=SimpleNamespace(barrier=lambda _: None))
        mine = torch.arange(rank, 25, world)
        with torch.no_grad():
            for part in mine.split(4):
                module.predict_step({"index": part, "noise": noise[part], "label": labels[part]}, 0)
            module.on_predict_epoch_end()

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(run, range(world)))
    for rank in range(world):
        folder = tmp_path / f"{rank}"
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
    one, whole = table(folder), table(calibrated)
    assert one.per_channel
    assert one.last_step_only
    assert one.low.shape == (21, 1)
    assert one.low[:, 0].allclose(whole.low, rtol=0, atol=1e-5)
    curve = np.array(curves(folder)["edm", True]["low"])[:, 0]
    arrives, seen = curve[:-1:2], curve[1::2]
    assert (arrives[:-1] == seen[:-1]).all()
    assert arrives[-1] != seen[-1]
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
    ("arguments", "words"),
    [
        (["task.samples=0"], "task.samples must be a whole number from 1"),
        (["task.samples=2.5"], "task.samples must be a whole number from 1"),
        (["task.per_channel=often"], "task.per_channel must be true or false, got 'often'"),
        (["stepsize=[ddim,oss]"], "stepsize oss plans one schedule per sample"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        oss_exp(tmp_path / "run", *arguments)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "schedules").exists()


@pytest.mark.slow
def test_a_calibrated_solver_is_refused(calibrated, tmp_path, capsys):
    with pytest.raises(SystemExit):
        oss_exp(tmp_path / "run", f"solver.calibration={calibrated / 'calibration.json'}")
    assert "set solver.calibration=null" in capsys.readouterr().err
