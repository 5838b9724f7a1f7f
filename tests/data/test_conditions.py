"""Conditions from a file: who gets which, what is refused, and that they reach the model with their own noises."""

import json

import exact_denoiser as exact
import numpy as np
import pytest
import torch
from helpers import run_cli

from oss_exp.data.conditions import ConditionedNoiseData
from oss_exp.data.noise import HELD_OUT
from oss_exp.evaluation.psnr import psnr
from oss_exp.noise import VPSchedule
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler, sample

ROWS = 20


@pytest.fixture
def file(tmp_path):
    """An .npz whose `spectra` have their row's number in every element, beside an array that is not asked for."""
    spectra = np.arange(1.0, ROWS + 1)[:, None, None] * np.ones((1, 4, 3))
    np.savez(
        tmp_path / "given.npz", spectra=spectra, names=np.array(["a", "b"]), scalar=np.array(1.0)
    )
    return str(tmp_path / "given.npz")


def data(file: str, **changes) -> ConditionedNoiseData:
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
    """{index: (the number in its condition, its noise)}"""
    return {
        int(batch["index"][i]): (float(batch["condition"][i, 0, 0]), batch["noise"][i])
        for batch in loader
        for i in range(len(batch["index"]))
    }


def rows(loader) -> list[float]:
    return [row for row, _ in items(loader).values()]


def test_search_and_held_out_samples_share_no_condition(file):
    search, per_sample = data(file, search_samples=12, eval_samples=8).predict_dataloader()
    held_out = data(file, search_samples=12, eval_samples=8).test_dataloader()
    assert sorted(rows(search) + rows(held_out)) == list(range(1, ROWS + 1))
    assert rows(per_sample) == rows(held_out)[:2]
    assert rows(search) != sorted(rows(search))  # a file's order often means something


def test_a_condition_depends_on_the_sample_alone(file):
    few, many = (
        items(data(file, batch_size=1).test_dataloader()),
        items(data(file, eval_samples=9).test_dataloader()),
    )
    assert all(many[i][0] == row and many[i][1].equal(noise) for i, (row, noise) in few.items())
    other = items(data(file, seed=8, search_samples=2).test_dataloader())
    assert {i: row for i, (row, _) in other.items()} == {
        i: row for i, (row, _) in few.items()
    }  # other noises only
    assert not any(other[i][1].equal(noise) for i, (_, noise) in few.items())


def test_conditions_have_the_shape_and_numbers_of_the_file(file):
    batch = next(iter(data(file).test_dataloader()))
    assert batch["condition"].shape == (4, 4, 3)
    assert batch["condition"].dtype == torch.float32
    assert batch["label"].tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("changes", "words"),
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
def test_wrong_settings(file, changes, words):
    with pytest.raises(ValueError, match=words):
        data(file, **changes)


def npz(file, array):
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


@pytest.mark.slow
def test_a_run_denoises_every_condition_from_its_own_noise(tmp_path):
    np.savez(tmp_path / "given.npz", deltasq_realisations=exact.spectra(ROWS).numpy())
    run_cli(
        "model=psdenoiser_21cm",
        "model._target_=exact_denoiser.build",
        "model.micro_batch=5",
        "noise_schedule=vp",
        "data=conditions",
        f"data.conditions={tmp_path / 'given.npz'}",
        "data.search_samples=8",
        "data.eval_samples=6",
        "data.batch_size=4",
        "num_teacher_steps=20",
        "num_steps=[4]",
        "stepsize=[vp,oss,oss_shared,oss_fit]",
        "stepsize.oss_shared.start=pinned",
        "logger=none",
        "trainer.enable_progress_bar=false",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    held_out = data(
        str(tmp_path / "given.npz"), key="deltasq_realisations", eval_samples=6
    ).test_dataloader()
    noise = torch.cat([batch["noise"] for batch in held_out])
    model, grid = exact.default(), VPSchedule(0.1, 20.0, 1e-3).nodes(20)
    velocity = model.velocity(torch.cat([batch["condition"] for batch in held_out]))
    teacher = sample(Euler(), velocity, noise * grid[0].float(), StepSchedule(grid))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {row["strategy"] for row in metrics["rows"]} == {"vp", "oss", "oss_shared", "oss_fit"}
    for row in metrics["rows"]:
        steps = StepSchedule.load(tmp_path / "run" / row["schedule"])
        student = sample(Euler(), velocity, noise * grid[0].float(), steps)
        expected = psnr(model.decode(student), model.decode(teacher))
        assert row["per_image"]["index"] == [HELD_OUT + i for i in range(6)]
        np.testing.assert_allclose(row["per_image"]["psnr"], expected.numpy(), atol=2e-3)
        if steps.mean is not None:
            assert steps.mean.shape == (1, *exact.EVENT)  # one for all, whatever their conditions
    best = max(metrics["rows"], key=lambda row: row["psnr"]["mean"])
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
