"""The metrics of a run are those of the images it saves, on any number of ranks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import metrics_of, run_cli, run_two_ranks
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from oss_exp.data.noise import HELD_OUT
from oss_exp.evaluation.classifier import FashionFeatures
from oss_exp.evaluation.metrics import FID, KID, ClassAgreement
from oss_exp.evaluation.statistics import Reference
from oss_exp.schedule import StepSchedule
from oss_exp.tasks import evaluate

SMALL = [
    "model=mixture_fashion",
    "data.classes=all",
    "stepsize=[fm,oss]",
    "num_steps=[3]",
    "num_teacher_steps=6",
    "data.search_samples=2",
    "data.per_sample=4",
    "data.eval_samples=99",
    "data.batch_size=20",
    "logger=none",
]
METRICS = ["metric=[fid,kid,precision_recall,class_agreement]", "metric.kid.subset_size=16"]


def measured(folder, *more: str) -> dict:
    """Run a small comparison with every metric of distributions; return its measurements."""
    run_cli(*SMALL, *METRICS, *more, f"hydra.run.dir={folder}")
    return metrics_of(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, measured(folder, "evaluation.save_images=npz")


def saved(folder, name: str) -> torch.Tensor:
    """Return the saved images of a schedule (n, C, H, W) in [0, 1]."""
    with np.load(folder / "images" / f"{name}.npz") as file:
        return torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2) / 255


@pytest.mark.slow
def test_the_metrics_are_those_of_the_saved_images(run):
    folder, metrics = run
    extractor = FashionFeatures.from_asset()
    reference = Reference.load("fashion_mnist_test.npz")
    rows = {row["strategy"]: row["metrics"] for row in metrics["rows"]}
    labels = torch.arange(99) % 10

    for name, values in (("teacher", metrics["teacher_metrics"]), ("fm_3", rows["fm"])):
        images = saved(folder, name)
        assert images.shape == (99, 1, 28, 28)
        for metric in (FID(extractor, reference, num_images=99), ClassAgreement(extractor)):
            metric.update(images, images, labels)
            (key, value), *_ = metric.compute().items()
            assert values[key] == pytest.approx(value, rel=0.02, abs=0.5)  # saved images are bytes
        assert set(values) == {"fid", "kid", "kid_std", "precision", "recall", "class_agreement"}


@pytest.mark.slow
def test_schedules_of_single_samples_have_no_distribution(run):
    folder, metrics = run
    with_values = {row["strategy"]: bool(row["metrics"]) for row in metrics["rows"]}
    table = (folder / "table.md").read_text()

    assert with_values == {"fm": True, "oss": False}
    assert "| fid | kid | kid_std | precision | recall | class_agreement |" in table
    assert "fid" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_ranks_share_the_work_and_agree(run, tmp_path):
    """99 samples on two ranks: one is repeated by the sampler, and must not count twice."""
    more = [
        "evaluation.save_images=npz",
        "stepsize=fm",
        "metric.fid.num_images=99",
        f"hydra.run.dir={tmp_path}",
    ]

    run_two_ranks(*SMALL, *METRICS, *more, folder=tmp_path)

    metrics = metrics_of(tmp_path)["teacher_metrics"]
    for name, value in run[1]["teacher_metrics"].items():
        assert metrics[name] == pytest.approx(value, rel=1e-4)
    assert torch.equal(saved(tmp_path, "teacher"), saved(run[0], "teacher"))


@pytest.mark.slow
def test_png_files_are_named_by_sample(run, tmp_path):
    run_cli(*SMALL, "evaluation.save_images=png", "stepsize=fm", f"hydra.run.dir={tmp_path}")
    files = sorted((tmp_path / "images" / "fm_3").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(99)]
    picture = torch.from_numpy(np.array(Image.open(files[7])))
    assert torch.equal(picture, (saved(run[0], "fm_3")[7, 0] * 255).round().byte())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluation.save_images=jpg"], "evaluation.save_images must be one of png, npz or null"),
        (["metric=[fid]", "metric.fid.num_images=100"], "FID of 99 images where 100 are expected"),
        (["metric=[fid]", "evaluation.reference.path=nowhere.npz"], "statistics nowhere.npz"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_cli(*SMALL, "stepsize=fm", *arguments, f"hydra.run.dir={tmp_path}")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "metrics.json").exists()


RANDOM_FEATURES = ["evaluation.extractor._target_=oss_exp.RandomFeatures"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["metric=[fdi]"],
            "metric=fdi does not exist; did you mean fid? Choose from class_agreement, ",
        ),
        (["metric=[lpips]"], "metric.lpips.weights is not set"),
        (["metric=[lpips]", "metric.lpips.weights=w.pth"], "LPIPS weights w.pth do not exist; get"),
        (
            ["metric=class_agreement", "data.classes=null"],
            "metric=class_agreement needs classes, and the samples have",
        ),
        (
            ["metric=clip_score", "metric.clip_score.checkpoint=x"],
            "metric=clip_score needs prompts, and the model",
        ),
        (
            ["metric=class_agreement", *RANDOM_FEATURES],
            "metric=class_agreement needs a classifier, and evaluation.",
        ),
    ],
)
def test_a_metric_without_what_it_needs_is_refused_before_any_work(
    arguments, message, tmp_path, capsys
):
    with pytest.raises(SystemExit):
        run_cli(*SMALL, "stepsize=fm", *arguments, f"hydra.run.dir={tmp_path}")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "schedules").exists()


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["fid", "kid", "precision_recall", "class_agreement"])
def test_an_extractor_for_other_images_is_refused_before_any_work(metric, tmp_path, capsys):
    few = ["metric.kid.subset_size=16"] if metric == "kid" else []
    with pytest.raises(SystemExit):
        run_cli(
            *SMALL, "model=mixture_digits", f"metric=[{metric}]", *few, f"hydra.run.dir={tmp_path}"
        )
    assert f"metric.{metric}: fashion_features sees grey images" in capsys.readouterr().err
    assert not (tmp_path / "schedules").exists()


# ------------------------------------------------------------------------------------------------
# What a metric needs, and what remains where one fails
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            "metric=kid",
            "metric.kid: KID needs at least 1000 images on both sides, got 99 generated ones and ",
        ),
        (
            "metric=precision_recall metric.precision_recall.k=99",
            "PrecisionRecall needs at least 100",
        ),
        (
            "metric=fid metric.fid.num_images=50000",
            "metric.fid: FID of 99 images where 50000 are expected",
        ),
        (
            "metric=lpips",
            "metric.lpips.weights is not set; it must be text or a path to torchvision's weights",
        ),
        ("metric=lpips metric.lpips.weights=none.pth", "none.pth"),
    ],
)
def test_a_metric_is_refused_before_anything_is_planned(metric, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_cli(*SMALL, *metric.split(), f"hydra.run.dir={tmp_path}")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "schedules").exists()


FEW = ["stepsize=fm", "data.eval_samples=20", "metric=[fid,kid]", "metric.kid.subset_size=16"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict:
    """The row of an undisturbed measurement of FEW."""
    folder = tmp_path_factory.mktemp("expected")
    run_cli(*SMALL, *FEW, f"hydra.run.dir={folder}")
    return metrics_of(folder)["rows"][0]


def fails(*_):
    raise ValueError("no such luck")


@pytest.mark.slow
def test_the_other_measurements_are_kept_where_a_metric_fails(
    expected, tmp_path, capsys, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(KID, "compute", fails)
        with pytest.raises(SystemExit):
            run_cli(*SMALL, *FEW, "metric.kid.subset_size=20", f"hydra.run.dir={tmp_path}")

    assert "oss-exp: metric.kid: no such luck; the rest is in" in capsys.readouterr().err
    (row,) = metrics_of(tmp_path)["rows"]
    assert row["metrics"] == {"fid": expected["metrics"]["fid"]}
    assert row["psnr"] == expected["psnr"]

    # The corrected command measures no image again: other subsets of the same features.
    monkeypatch.setattr(evaluate, "psnr", None)
    run_cli(*SMALL, *FEW, f"hydra.run.dir={tmp_path}")

    (row,) = metrics_of(tmp_path)["rows"]
    assert {key: row[key] for key in ("metrics", "psnr", "nfe")} == {
        key: expected[key] for key in ("metrics", "psnr", "nfe")
    }
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.slow
def test_another_metric_is_measured_in_the_same_folder(tmp_path):
    few = ["stepsize=fm", "data.eval_samples=20"]
    schedule = tmp_path / "schedules" / "fm_3.json"
    run_cli(*SMALL, *few, "metric=fid", f"hydra.run.dir={tmp_path}")
    before = schedule.stat().st_mtime_ns

    run_cli(*SMALL, *few, "metric=class_agreement", f"hydra.run.dir={tmp_path}")

    (row,) = metrics_of(tmp_path)["rows"]
    assert list(row["metrics"]) == ["class_agreement"]
    assert schedule.stat().st_mtime_ns == before


@pytest.mark.slow
def test_another_schedule_at_the_same_path_is_measured_anew(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    command = [*SMALL, "task=evaluate", f"task.schedule={file}", "task.allow_other_model=true"]
    command += ["data.eval_samples=20", "metric=fid"]

    # A run that is stopped when all is seen.
    StepSchedule([1.0, 0.5, 0.0]).save(file)
    with monkeypatch.context() as patch:
        patch.setattr(FID, "compute", fails)
        with pytest.raises(SystemExit):
            run_cli(*command, f"hydra.run.dir={tmp_path / 'run'}")
    assert list((tmp_path / "run" / "evaluation").iterdir())

    # The same command on other times.
    StepSchedule([1.0, 0.7, 0.0]).save(file)
    rows = []
    for name in ("run", "undisturbed"):
        run_cli(*command, f"hydra.run.dir={tmp_path / name}")
        rows.append(metrics_of(tmp_path / name)["rows"])
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_guided_pipeline_has_its_nfe_where_nothing_is_left_to_measure(tmp_path, monkeypatch):
    """Its calls tell that they cost two network rows; after all of them the run is stopped."""
    command = ["model=sd15", "scale=tiny", "stepsize=pipeline", "num_teacher_steps=6"]
    command += ["num_steps=[3]", "data.search_samples=2", "data.eval_samples=2", "logger=none"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "KEPT_EVERY", -1)
        patch.setattr(evaluate.EvaluateModule, "_write", fails)
        with pytest.raises(SystemExit):
            run_cli(*command, f"hydra.run.dir={tmp_path}")

    monkeypatch.setattr(evaluate, "psnr", None)
    run_cli(*command, f"hydra.run.dir={tmp_path}")

    assert [row["nfe"] for row in metrics_of(tmp_path)["rows"]] == [2 * 3]


def test_pictures_are_kept_in_host_memory(monkeypatch):
    """A tensor without content is on a GPU that need not exist."""
    with FakeTensorMode():
        on_device = torch.zeros(4, 8, 8, 1, dtype=torch.uint8, device="cuda")
    monkeypatch.setattr(evaluate, "as_bytes", lambda images: on_device)
    module = SimpleNamespace(metrics={}, save_images="npz", eval_samples=4, pictures={"fm": []})
    images = torch.rand(4, 1, 8, 8)
    batch = {"index": HELD_OUT + torch.arange(4)}

    evaluate.EvaluateModule._record(module, "fm", batch, images, images, batch["index"] > 0)

    ((_, pictures),) = module.pictures["fm"]
    assert pictures.device.type == "cpu"
