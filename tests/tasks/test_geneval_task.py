"""The task `geneval` on a small model of scenes: its files, and how a killed run goes on."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import kill_at, random_weights, run_cli, run_two_ranks, write_fashion
from models.pipelines.images import stable_diffusion

from oss_exp.calibration import Calibration
from oss_exp.data.scenes import wishes
from oss_exp.distances import XtMSE
from oss_exp.geneval.rules import TASKS
from oss_exp.models.families.mixture import GaussianMixture
from oss_exp.models.guidance import Guidance
from oss_exp.models.pipeline import Pipeline
from oss_exp.noise import FlowSchedule
from oss_exp.solvers import Euler, nfe
from oss_exp.tasks.geneval import Maker
from oss_exp.tasks.setting import Setting

SMALL = [
    "model=flux_scenes",
    "model.backbone.network.num_layers=1",
    "model.backbone.network.num_single_layers=1",
]
COUNT = 2  # pictures of a prompt


def write_garments(folder: Path) -> None:
    """Write both splits of Fashion-MNIST with 20 garments of stripes."""
    pixels = torch.zeros(20, 28, 28, dtype=torch.uint8)
    for number in range(20):
        pixels[number, 4 : 14 + number // 2, 6 : 22 : 1 + number % 3] = 200
    for split in ("train", "t10k"):
        write_fashion(folder, pixels, [i % 10 for i in range(20)], split)


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    """The weights of a detector that was trained for a moment."""
    folder = tmp_path_factory.mktemp("detector")
    write_garments(folder)
    run_cli(
        "task=fit_detector",
        f"images.root={folder}",
        "task.steps=12",
        "task.batch_size=8",
        f"task.output={folder / 'detector.safetensors'}",
        f"hydra.run.dir={folder / 'fit'}",
    )
    return folder / "detector.safetensors"


@pytest.fixture(scope="module")
def inputs(detector, tmp_path_factory) -> list[str]:
    """The settings of a run with random weights, on one prompt of each task."""
    folder = tmp_path_factory.mktemp("inputs")
    lines = [json.dumps(prompts[0]) + "\n" for prompts in wishes().values()]
    (folder / "prompts.jsonl").write_text("".join(lines))
    return [
        "task=geneval",
        *SMALL,
        random_weights(folder / "w.safetensors", *SMALL),
        f"data.prompts={folder / 'prompts.jsonl'}",
        f"task.detector.file={detector}",
        f"task.images_per_prompt={COUNT}",
        "data.search_samples=2",
        "data.batch_size=5",
        "num_teacher_steps=4",
        "num_steps=[2]",
        "stepsize=[ddim,oss_ave]",
        "logger=none",
    ]


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("geneval") / "run"
    run_cli(*inputs, f"hydra.run.dir={folder}")
    return folder


def results(folder: Path) -> dict:
    """Return the record of a run."""
    return json.loads((folder / "geneval.json").read_text())


def verdicts(folder: Path) -> list[list[dict]]:
    """Return the verdicts of every schedule of a run."""
    return [row["verdicts"] for row in results(folder)["rows"]]


@pytest.mark.slow
def test_every_prompt_has_its_pictures_and_verdicts(run):
    record = results(run)
    rows = record["rows"]

    assert [row["label"] for row in rows] == ["teacher", "ddim_2", "oss_ave_2"]
    assert [row["nfe"] for row in rows] == [4, 2, 2]
    assert [wish["tag"] for wish in record["prompts"]] == list(TASKS)
    for row in rows:
        numbers = [verdict["number"] for verdict in row["verdicts"]]
        assert numbers == list(range(6 * COUNT))
        assert len(list((run / "images" / row["label"]).glob("*.png"))) == 6 * COUNT


@pytest.mark.slow
def test_the_table_and_the_page_are_written(run):
    table = (run / "geneval.md").read_text()
    labels = [line.split("|")[1].strip() for line in table.splitlines()[2:5]]
    assert labels == ["teacher (4)", "ddim (2)", "oss_ave (2)"]
    assert table.count("| ddim (2) |") == 2  # scores, and their differences to the teacher's

    page = (run / "geneval.html").read_text()
    assert page.count("<img ") == 3 * 6 * COUNT
    assert not re.search(r"(src|href)=[\"']?https?:", page)


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same(run, inputs, tmp_path):
    run_two_ranks(*inputs, f"hydra.run.dir={tmp_path}", folder=tmp_path)
    assert verdicts(tmp_path) == verdicts(run)


@pytest.mark.slow
def test_ranks_go_on_with_fewer_batches_than_they_are(run, inputs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    picture = folder / "images" / "ddim_2" / "000003.png"
    picture.unlink()
    (folder / "verdicts" / "teacher" / "000005.jsonl").unlink()

    run_two_ranks(*inputs, f"hydra.run.dir={folder}", folder=tmp_path)

    assert picture.read_bytes() == (run / picture.relative_to(folder)).read_bytes()
    assert verdicts(folder) == verdicts(run)


@pytest.mark.slow
@pytest.mark.parametrize("awaited", ["images/ddim_2/*.png", "verdicts/teacher/*.jsonl"])
def test_a_killed_run_goes_on_with_what_is_missing(awaited, run, inputs, tmp_path):
    folder = tmp_path / "run"
    kill_at(awaited, folder, [*inputs, f"hydra.run.dir={folder}"])
    files = [*folder.rglob("*.png"), *folder.rglob("*.jsonl")]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert before

    run_cli(*inputs, f"hydra.run.dir={folder}")

    assert {file: file.stat().st_mtime_ns for file in files} == before
    assert verdicts(folder) == verdicts(run)
    for picture in (run / "images").rglob("*.png"):
        assert (folder / picture.relative_to(run)).read_bytes() == picture.read_bytes()


class Finetuned(GaussianMixture):
    """A model that was finetuned from the mixture and makes white pictures."""

    @property
    def original(self) -> GaussianMixture:
        return mixture(GaussianMixture)

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x0)


def mixture(kind: type[GaussianMixture]) -> GaussianMixture:
    """Return the mixture of digits as a model of this class."""
    return kind.from_asset("mixture_digits.safetensors", guidance=Guidance(), micro_batch=64)


def test_the_teacher_is_the_model_before_finetuning_without_calibration(tmp_path):
    """Of a table of five times the amplitude, too."""
    grid = FlowSchedule().nodes(4)
    table = Calibration(grid, torch.full_like(grid, -5), torch.full_like(grid, 5))
    batch = {
        "numbers": torch.arange(2),
        "prompts": torch.arange(2),
        "noise": torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
    }

    for name, kind, solver in (
        ("plain", GaussianMixture, Euler()),
        ("other", Finetuned, Euler(calibration=table)),
    ):
        setting = Setting(mixture(kind), grid, solver, XtMSE())
        schedules = {"teacher": setting.teacher, "ddim_4": setting.teacher}
        maker = Maker(setting, schedules, tmp_path / name, [[0, 1]], 0, 1)
        for loader in range(2):
            maker.predict_step(batch, 0, loader)

    def pictures(name: str, label: str) -> list[bytes]:
        files = sorted((tmp_path / name / "images" / label).iterdir())
        return [file.read_bytes() for file in files]

    assert pictures("other", "teacher") == pictures("plain", "teacher")
    assert pictures("other", "ddim_4") != pictures("plain", "ddim_4")


@pytest.mark.slow
def test_a_guided_pipeline_has_its_nfe_where_all_pictures_are_made(tmp_path):
    """Its calls tell that they cost two network rows."""

    def maker() -> Maker:
        family = stable_diffusion()
        model = Pipeline(family.pipe, family.prompts, **family.call)
        setting = Setting(model, model.noise_schedule.nodes(3), Euler(), XtMSE())
        return Maker(setting, {"teacher": setting.teacher}, tmp_path, [[0, 1]], 0, 1)

    first = maker()
    missing = first.missing()
    first.predict_step(first.dataset("teacher", missing["teacher"])[0], 0)
    second = maker()

    assert second.missing() == {"teacher": []}
    for made in (first, second):
        velocity = made.model.velocity(torch.zeros(1, dtype=torch.long))
        assert nfe(Euler(), made.setting.teacher, velocity) == 2 * 3


@pytest.mark.slow
def test_a_schedule_for_each_sample_is_refused_before_any_is_planned(inputs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_cli(*inputs, "stepsize=[ddim,oss]", f"hydra.run.dir={tmp_path}")
    assert "oss has a schedule for each sample" in capsys.readouterr().err
    assert not (tmp_path / "schedules").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task.images_per_prompt=0"], "task.images_per_prompt must be a whole number"),
        (["data.seed=1"], "holds a run with another data; go on with the same values"),
        (["data=noise", "~data.prompts"], "GenEval needs a model of prompts"),
        (
            ["task.detector.file=nowhere.safetensors"],
            "detector nowhere.safetensors is neither a path",
        ),
        (["data.prompts=prompts.txt"], "prompts.txt, line 1 is not complete JSON"),
    ],
)
def test_what_cannot_be_judged_is_refused(arguments, message, run, inputs, capsys):
    before = results(run)
    with pytest.raises(SystemExit):
        run_cli(*inputs, *arguments, f"hydra.run.dir={run}")
    assert message in capsys.readouterr().err
    assert results(run) == before
