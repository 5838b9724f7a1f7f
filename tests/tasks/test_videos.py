"""A video model through the whole job: PSNR by frames, moving pictures, metrics of frames."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import metrics_of, random_weights, run_cli
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from oss_exp.cli import CONF
from oss_exp.evaluation.metrics import FID
from oss_exp.evaluation.pictures import as_bytes, encoded, frames_of, reduced
from oss_exp.evaluation.psnr import psnr

SMALL = [
    "model=video_fashion",
    "model.backbone.network.num_layers=1",
    "model.backbone.network.features=16",
    "model.backbone.network.num_heads=4",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a comparison of four videos."""
    folder = tmp_path_factory.mktemp("videos")
    run_cli(
        *SMALL,
        random_weights(folder / "w.safetensors", *SMALL),
        "data=prompts",
        "data.prompts=moving_fashion.txt",
        "data.search_samples=2",
        "data.eval_samples=4",
        "data.per_sample=2",
        "data.batch_size=3",
        "num_teacher_steps=6",
        "num_steps=[2]",
        "stepsize=[ddim,oss_shared]",
        "distance=select",
        "distance.frames=4",
        "metric=[fid]",
        "evaluation.save_images=npz",
        "logger=wandb",
        f"hydra.run.dir={folder / 'run'}",
    )
    return folder / "run"


def videos(run, name: str) -> torch.Tensor:
    """Return the saved videos of a schedule (n, C, F, H, W) in [0, 1]."""
    with np.load(run / "images" / f"{name}.npz") as file:
        return torch.from_numpy(file["arr_0"]).double().movedim(4, 1) / 255


@pytest.mark.slow
def test_psnr_is_by_frames(run):
    rows = metrics_of(run)["rows"]
    assert videos(run, "teacher").shape == (4, 1, 8, 32, 32)
    for row in rows:
        expected = psnr(videos(run, f"{row['strategy']}_2"), videos(run, "teacher"))
        np.testing.assert_allclose(row["per_image"]["psnr"], expected, atol=0.05)  # bytes


@pytest.mark.slow
def test_frames_are_the_images_of_other_metrics(run):
    fid = metrics_of(run)["rows"][0]["metrics"]["fid"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config").evaluation
    metric = FID(instantiate(cfg.extractor), instantiate(cfg.reference), num_images=None)
    frames = frames_of(videos(run, "ddim_2")).float()
    metric.update(frames, frames, torch.zeros(len(frames)))
    assert fid == pytest.approx(metric.compute()["fid"], rel=1e-2)  # bytes


@pytest.mark.slow
def test_the_report_moves(run):
    picture = Image.open(run / "samples.gif")
    assert picture.n_frames == 8
    pictures = []
    for frame in range(8):
        picture.seek(frame)
        pictures.append(np.asarray(picture.convert("RGB")))
    assert all((one != other).any() for one, other in pairwise(pictures))
    assert '"frames":8' in (run / "report.html").read_text()
    assert list(run.rglob("*.gif"))[1:], "W&B has its copy"


@pytest.mark.slow
def test_the_middle_frame_is_shown_on_its_way(run):
    with np.load(run / "trajectories.npz") as trajectories, np.load(run / "samples.npz") as samples:
        for label in samples:
            assert np.array_equal(trajectories[f"x0/{label}"][:, -1], samples[label][:, 4])
        assert trajectories["x0/ddim K=2"].shape == (4, 3, 32, 32, 1)


def test_a_video_is_encoded_as_it_is():
    frames = np.random.default_rng(0).integers(0, 2, (3, 4, 5, 1), dtype=np.uint8) * 255
    picture = Image.open(io.BytesIO(encoded(frames)))
    assert picture.format == "GIF"
    for number, frame in enumerate(frames):
        picture.seek(number)
        assert np.array_equal(np.asarray(picture.convert("L")), frame[..., 0])


def test_a_picture_is_encoded_without_loss():
    rgb = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded(rgb)))), rgb)


def test_large_pictures_are_shown_small():
    wide = torch.rand(2, 3, 5, 40, 1024)
    assert reduced(wide).shape == (2, 3, 5, 10, 256)
    expected = torch.nn.functional.interpolate(wide[:, :, 2], (10, 256), mode="area")
    torch.testing.assert_close(reduced(wide)[:, :, 2], expected)
    assert torch.equal(reduced(wide[:, :, 2]), expected)
    assert reduced(wide[:0]).shape == (0, 3, 5, 10, 256)  # so that an empty batch joins others


def test_small_pictures_are_shown_as_they_are():
    small = torch.rand(2, 3, 5, 32, 32)
    assert reduced(small) is small
    assert as_bytes(small).shape == (2, 5, 32, 32, 3)
