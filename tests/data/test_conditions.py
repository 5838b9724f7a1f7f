"""Conditions from a file: which sample has which, and that the model gets them."""

import exact_denoiser as exact
import numpy as np
import pytest
import torch
from helpers import metrics_of, run_cli

from oss_exp.data.conditions import ConditionedNoiseData
from oss_exp.data.noise import HELD_OUT
from oss_exp.evaluation.psnr import psnr
from oss_exp.noise import VPSchedule
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, sample

ROWS = 20


@pytest.fixture
def file(tmp_path):
    """An .npz file whose spectra have the number of their row (from 1) in every element."""
    spectra = np.arange(1.0, ROWS + 1)[:, None, None] * np.ones((1, 4, 3))
    path = tmp_path / "given.npz"
    np.savez(path, spectra=spectra, names=np.array(["a", "b"]), scalar=np.array(1.0))
    return str(path)


def data(file: str, **changes) -> ConditionedNoiseData:
    """Return data of small counts, with changed settings."""
    settings = {
        "event_shape": (1, 4, 3),
        "num_classes": None,
        "conditions": file,
        "key": "spectra",
        "seed": 0,
        "search_samples": 6,
        "eval_samples": 5,
        "per_sample": 2,
        "batch_size": 4,
    }
    return ConditionedNoiseData(**(settings | changes))


def items(loader) -> dict[int, tuple[float, torch.Tensor]]:
    """Return the row and the noise of every sample by its index."""
    result = {}
    for batch in loader:
        rows = batch["condition"][:, 0, 0].tolist()
        for i, row, noise in zip(batch["index"].tolist(), rows, batch["noise"], strict=True):
            result[i] = (row, noise)
    return result


def rows(loader) -> list[float]:
    """Return the row of every sample."""
    return [row for row, _ in items(loader).values()]


def test_search_and_held_out_samples_share_no_condition(file):
    search, per_sample = data(file, search_samples=12, eval_samples=8).predict_dataloader()
    held_out = data(file, search_samples=12, eval_samples=8).test_dataloader()
    assert sorted(rows(search) + rows(held_out)) == list(range(1, ROWS + 1))
    assert rows(per_sample) == rows(held_out)[:2]
    assert rows(search) != sorted(rows(search))  # a file's order often means something


def test_a_condition_depends_on_the_sample_alone(file):
    few = items(data(file, batch_size=1).test_dataloader())
    many = items(data(file, eval_samples=9).test_dataloader())
    other = items(data(file, seed=8, search_samples=2).test_dataloader())

    assert other.keys() == few.keys()
    for i, (row, noise) in few.items():
        assert many[i][0] == other[i][0] == row
        assert many[i][1].equal(noise)
        assert not other[i][1].equal(noise)


def test_conditions_have_the_shape_and_numbers_of_the_file(file):
    batch = next(iter(data(file).test_dataloader()))
    assert batch["condition"].shape == (4, 4, 3)
    assert batch["condition"].dtype == torch.float32
    assert batch["label"].tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"search_samples": 16},
            "has 20 conditions, too few for search_samples=16 and eval_samples=5",
        ),
        (
            {"key": "images"},
            r"have no array 'images'; set data\.key to one of spectra, names, scalar",
        ),
        ({"key": "names"}, "names must be numbers, a condition in each row"),
        ({"key": "scalar"}, "scalar must be numbers, a condition in each row"),
        ({"num_classes": 10}, "has no classes and the model has 10"),
        ({"search_samples": 0}, r"search_samples must be from 1 to .*, got 0"),
    ],
)
def test_wrong_settings_are_refused(file, changes, message):
    with pytest.raises(ValueError, match=message):
        data(file, **changes)


def npz(file, array):
    """Write an array as the spectra of an .npz file."""
    np.savez(file, spectra=array)


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write(b""),
        lambda file: file.write(b"text"),
        lambda file: file.write(b"PK\x03\x04 and no more"),
        lambda file: npz(file, np.array([object()])),  # would be unpickled
        lambda file: np.save(file, np.ones((30, 4, 3))),
    ],
    ids=["empty", "text", "cut", "pickle", "npy"],
)
def test_files_that_are_not_arrays_are_refused(tmp_path, write):
    path = tmp_path / "given.npz"
    with path.open("wb") as file:
        write(file)
    with pytest.raises(ValueError, match=r"given\.npz cannot be read as an \.npz file"):
        data(str(path))


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz do not exist; set data\.conditions"):
        data("nowhere.npz")


@pytest.fixture(scope="module")
def spectra(tmp_path_factory) -> str:
    """A file of conditions of the exact denoiser."""
    path = tmp_path_factory.mktemp("spectra") / "given.npz"
    np.savez(path, deltasq_realisations=exact.spectra(ROWS).numpy())
    return str(path)


@pytest.fixture(scope="module")
def run(spectra, tmp_path_factory):
    """The folder of a comparison on these conditions."""
    folder = tmp_path_factory.mktemp("conditions") / "run"
    run_cli(
        "model=psdenoiser_21cm",
        "model._target_=exact_denoiser.build",
        "model.micro_batch=5",
        "noise_schedule=vp",
        "data=conditions",
        f"data.conditions={spectra}",
        "data.search_samples=8",
        "data.eval_samples=6",
        "data.batch_size=4",
        "num_teacher_steps=20",
        "num_steps=[4]",
        "stepsize=[vp,oss,oss_shared,oss_fit]",
        "stepsize.oss_shared.start=pinned",
        "logger=none",
        "trainer.enable_progress_bar=false",
        f"hydra.run.dir={folder}",
    )
    return folder


@pytest.mark.slow
def test_a_run_denoises_every_condition_from_its_own_noise(run, spectra):
    held_out = data(spectra, key="deltasq_realisations", eval_samples=6).test_dataloader()
    batches = list(held_out)
    model = exact.default()
    grid = VPSchedule(0.1, 20.0, 1e-3).nodes(20)
    start = torch.cat([batch["noise"] for batch in batches]) * grid[0].float()
    velocity = model.velocity(torch.cat([batch["condition"] for batch in batches]))
    teacher = sample(Euler(), velocity, start, StepSchedule(grid))

    for row in metrics_of(run)["rows"]:
        steps = StepSchedule.load(run / row["schedule"])
        student = sample(Euler(), velocity, start, steps)
        expected = psnr(model.decode(student), model.decode(teacher))
        assert row["per_image"]["index"] == [HELD_OUT + i for i in range(6)]
        np.testing.assert_allclose(row["per_image"]["psnr"], expected.numpy(), atol=2e-3)


@pytest.mark.slow
def test_the_mean_of_a_start_is_one_for_all_conditions(run):
    for row in metrics_of(run)["rows"]:
        mean = StepSchedule.load(run / row["schedule"]).mean
        assert mean is None or mean.shape == (1, *exact.EVENT)


@pytest.mark.slow
def test_a_searched_schedule_is_the_best_on_conditions(run):
    best = max(metrics_of(run)["rows"], key=lambda row: row["psnr"]["mean"])
    assert {row["strategy"] for row in metrics_of(run)["rows"]} == {
        "vp",
        "oss",
        "oss_shared",
        "oss_fit",
    }
    assert best["strategy"].startswith("oss")


def test_a_model_of_conditions_says_what_to_give_it(tmp_path, capsys):
    settings = [
        "model=psdenoiser_21cm",
        "model._target_=exact_denoiser.build",
        "noise_schedule=vp",
        "logger=none",
    ]
    with pytest.raises(SystemExit):
        run_cli(*settings, "stepsize=vp", f"hydra.run.dir={tmp_path}")
    assert "set data=conditions data.conditions=FILE.npz" in capsys.readouterr().err
