"""Tables, pictures and logs of a run, and the report of a sweep of runs."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
from pathlib import Path

import pytest
import wandb
from helpers import result, run_cli
from omegaconf import OmegaConf
from PIL import Image

from oss_exp.evaluation.comparison import with_gains
from oss_exp.report.logging import log_run, wandb_logger
from oss_exp.report.page import gather
from oss_exp.report.results import metric_lines, read_run, read_schedules

SMALL = [
    "model=mixture_digits",
    "num_teacher_steps=20",
    "data.search_samples=6",
    "data.eval_samples=8",
    "data.per_sample=4",
    "trainer.enable_progress_bar=false",
]


# ------------------------------------------------------------------------------------------------
# A run
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a small comparison with the csv logger."""
    folder = tmp_path_factory.mktemp("report") / "run"
    run_cli(
        *SMALL,
        "num_steps=[2,4]",
        "stepsize=[edm,fm,oss,oss_shared]",
        "logger=csv",
        f"hydra.run.dir={folder}",
    )
    return folder


def table_of(folder: Path) -> list[list[str]]:
    """Return the header and the rows of table.md."""
    rows = []
    for line in (folder / "table.md").read_text().splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    header, _, *body = rows
    return [header, *body]


def data_of(page: str) -> dict:
    """Return the data that a page holds."""
    block = r'<script type="application/json" id="data">(.*?)</script>'
    (data,) = re.findall(block, page, re.DOTALL)
    return json.loads(data)


def test_the_table_has_a_row_for_every_schedule_with_its_measured_psnr(run):
    header, *rows = table_of(run)
    measured = {(r.strategy, str(r.num_steps)): str(r.psnr) for r in read_run(run)}
    column = header.index("PSNR, dB")
    gains = [row[header.index("gain, dB")] for row in rows]

    assert len(rows) == len(measured) == 8
    assert {(row[0], row[1]): row[column] for row in rows} == measured
    assert gains.count("*") == 2  # one best baseline a budget


def test_the_page_holds_the_table_the_schedules_and_the_pictures(run):
    page = (run / "report.html").read_text()
    for row in table_of(run):
        tag = "th" if row[0] == "strategy" else "td"
        assert "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) in page

    data = data_of(page)
    assert len(data["schedules"]["lines"]) == 8
    assert [panel["title"] for panel in data["curves"]["measured"]] == ["psnr against K"]
    assert [len(panel["lines"]) for panel in data["curves"]["costs"]] == [2, 2]
    # oss has schedules for 4 of the 8 samples, too few for a row.
    assert len(data["samples"]["rows"]) == 1 + 6


@pytest.mark.parametrize("name", ["schedules.png", "samples.png"])
def test_pictures_open_and_show_something(name, run):
    with Image.open(run / name) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 200
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_the_csv_logger_writes_psnr_and_gain_of_every_schedule(run):
    with (run / "csv" / "version_0" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    lines = with_gains(read_run(run))
    for line in lines:
        key = f"{line.result.strategy}/K{line.result.num_steps}"
        assert float(row[f"psnr/{key}"]) == pytest.approx(line.result.psnr.mean)
        assert (f"gain/{key}" in row) == (line.gain is not None)
    assert sum(name.startswith("psnr/") for name in row) == len(lines) == 8


def test_schedules_are_read_with_their_strategies(run):
    plans = {f"{name} {plan.num_steps}" for name, plan in read_schedules(run)}
    assert len(read_schedules(run)) == 8
    assert plans == {f"{name} {k}" for name in ("edm", "fm", "oss", "oss_shared") for k in (2, 4)}


KEYS = '{"model": 1, "teacher": 1, "solver": 1, "seed": 1, "rows": '
FOREIGN = {
    "a list": "[1, 2]",
    "a word": '"psnr"',
    "null": "null",
    "another object": '{"accuracy": 0.9}',
    "rows that are no rows": '{"rows": 3}',
    "rows of numbers": KEYS + "[3]}",
    "rows without a psnr": KEYS + '[{"strategy": "edm"}]}',
    "empty": "",
    "truncated": '{"rows": [',
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_metrics_of_a_foreign_kind_are_refused(kind, tmp_path):
    (tmp_path / "metrics.json").write_text(FOREIGN[kind])
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "metrics.json"))):
        read_run(tmp_path)


def test_metrics_whose_images_and_values_do_not_match_are_refused_by_name(run, tmp_path):
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["rows"][0]["per_image"]["psnr"].pop()
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "metrics.json"))):
        read_run(tmp_path)


# ------------------------------------------------------------------------------------------------
# A sweep
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """The folder of a sweep over two strategies and two budgets, gathered with task=report."""
    folder = tmp_path_factory.mktemp("sweep") / "2026-01-01" / "many"
    axes = ["stepsize=oss_shared,edm", "num_steps=[2],[4]"]
    run_cli("--multirun", *SMALL, *axes, "logger=wandb", f"hydra.sweep.dir={folder}")
    run_cli("task=report", f"sweep={folder}", f"hydra.run.dir={folder.parent / 'report'}")
    return folder


@pytest.mark.slow
def test_a_sweep_leaves_one_whole_folder_per_job(sweep):
    jobs = sorted(path.name for path in sweep.iterdir() if path.is_dir())
    assert jobs == ["0", "1", "2", "3"]
    settings = [[(r.strategy, r.num_steps) for r in read_run(sweep / job)] for job in jobs]
    assert settings == [[("oss_shared", 2)], [("oss_shared", 4)], [("edm", 2)], [("edm", 4)]]
    files = ["config.yaml", "table.md", "schedules.png", "samples.png", "report.html"]
    assert all((sweep / job / name).is_file() for job in jobs for name in files)


@pytest.mark.slow
def test_a_sweep_is_one_group_of_one_offline_run_per_job(sweep):
    names = set()
    for job in ("0", "1", "2", "3"):
        (run,) = (sweep / job / "wandb").glob("offline-run-*")
        (log,) = run.glob("*.wandb")
        data = log.read_bytes()
        assert re.search(rb"\x0f2026-01-01/many(?!/)", data)  # the group: a string of 15 bytes
        assert f"\x112026-01-01/many/{job}".encode() in data  # the name: 17
        assert b"psnr/" in data
        assert b"psnr against K" in data
        assert (b"cost per round" in data) == (job in "01")  # of the dynamic program
        assert b"schedules-mixture" in data  # the artifact
        names.add(log.name)
    assert len(names) == 4


@pytest.mark.slow
def test_a_gathered_sweep_is_one_table_with_a_row_per_job(sweep):
    header, *rows = table_of(sweep)
    assert header[:3] == ["run", "strategy", "K"]
    assert sorted(row[:3] for row in rows) == [
        ["0", "oss_shared", "2"],
        ["1", "oss_shared", "4"],
        ["2", "edm", "2"],
        ["3", "edm", "4"],
    ]


@pytest.mark.slow
def test_the_gains_of_a_sweep_are_over_the_baselines_of_its_other_jobs(sweep):
    header, *rows = table_of(sweep)
    gains = {row[0]: row[header.index("gain, dB")] for row in rows}
    assert gains["2"] == gains["3"] == "*"
    for job, rival in (("0", "2"), ("1", "3")):
        (searched,) = read_run(sweep / job)
        (baseline,) = read_run(sweep / rival)
        gain = searched.psnr.mean - baseline.psnr.mean
        assert gains[job].startswith(f"{gain:+.2f} ± ")


@pytest.mark.slow
def test_a_gathered_sweep_has_curves_across_its_jobs(sweep):
    (psnr,) = data_of((sweep / "report.html").read_text())["curves"]["measured"]
    means = {}
    for job in "0123":
        (measured,) = read_run(sweep / job)
        means[measured.strategy, measured.num_steps] = measured.psnr.mean

    assert psnr["title"] == "psnr against K"
    for line in psnr["lines"]:
        expected = [means[line["name"], k] for k in (2, 4)]
        assert line["x"] == [2, 4]
        assert line["y"] == pytest.approx(expected, abs=0.01)
        assert line["baseline"] == (line["name"] == "edm")


@pytest.mark.slow
def test_a_gathered_sweep_has_the_cost_of_every_round_of_its_searches(sweep):
    panels = data_of((sweep / "report.html").read_text())["curves"]["costs"]
    costs = []
    for job in ("0", "1"):
        (_, steps), *_ = read_schedules(sweep / job)
        costs.append(steps.about("planning")["cost_per_round"])

    assert [panel["title"] for panel in panels] == ["K = 2", "K = 4"]
    assert [panel["lines"][0]["x"] for panel in panels] == [[1, 2], [1, 2, 3, 4]]
    assert [panel["lines"][0]["y"] for panel in panels] == costs


CURVES = [("edm", 1, 2, "a"), ("ours", 2, 2, "a"), ("ours", 4, 4, "a"), ("ours", 5, 2, "b")]


def test_every_run_of_a_strategy_has_its_curve():
    runs = [result(name, {1: value}, nfe=k, run=run) for name, value, k, run in CURVES]
    fid = result("edm", {1: 3}, nfe=4, run="a", metrics={"fid": 7.0, "kid_std": 1.0})
    assert metric_lines(with_gains([*runs, fid])) == {
        "psnr": {"edm": {2: 1, 4: 3}, "ours (run a)": {2: 2, 4: 4}, "ours (run b)": {2: 5}},
        "fid": {"edm": {4: 7.0}},
    }


@pytest.mark.slow
def test_failed_jobs_are_explained_and_the_others_are_reported(tmp_path, capsys):
    """12 jobs, of which two ask for more steps than the teacher has."""
    budgets = "num_steps=1,2,3,4,5,99"
    folder = tmp_path / "sweep"
    few = ["data.eval_samples=2", "data.search_samples=2", "logger=none", "model=mixture_digits"]
    jobs = ["stepsize=edm,fm", budgets, f"hydra.sweep.dir={folder}"]
    with pytest.raises(SystemExit):
        run_cli("--multirun", *SMALL, *few, *jobs)
    assert "task=report sweep=FOLDER says which failed" in capsys.readouterr().err

    run_cli("task=report", f"sweep={folder}", f"hydra.run.dir={tmp_path / 'report'}")

    printed = capsys.readouterr().out
    assert len(list(folder.glob("*/metrics.json"))) == 10
    for text in (printed, (folder / "table.md").read_text(), (folder / "report.html").read_text()):
        assert "Failed, 2 of 12 runs:" in text
        assert "- 11: num_steps must be whole numbers from 1 to" in text
        assert "- 5: num_steps must be whole numbers" in text
        assert text.index("- 5: num_steps") < text.index("- 11: num_steps")


@pytest.fixture
def damaged(run, tmp_path) -> Path:
    """A folder of five copies of a run, of which all but `whole` are damaged."""
    for name in ("whole", "metrics", "teacher", "schedules", "link"):
        shutil.copytree(run, tmp_path / name)
    (tmp_path / "metrics" / "metrics.json").write_text("{")
    (tmp_path / "teacher" / "teacher.json").write_text('{"times": [0.5, 0.7]}')
    for name in ("schedules", "link"):
        shutil.rmtree(tmp_path / name / "schedules")
    (tmp_path / "link" / "schedules").symlink_to(run / "schedules")
    return tmp_path


@pytest.mark.slow
def test_damaged_runs_are_explained_and_the_others_are_reported(run, damaged, capsys):
    gather(damaged)

    printed = capsys.readouterr().out
    absent = damaged / "schedules" / "schedules"
    assert table_of(damaged) == table_of(run)
    assert "Failed, 4 of 5 runs:" in printed
    assert f"- schedules: {absent} has no schedules; restore them" in printed
    assert "- link: " in printed
    assert "leads out of its folder" in printed


@pytest.mark.slow
def test_a_report_that_fails_leaves_the_earlier_one(damaged):
    (damaged / "table.md").write_text("of an earlier report")
    (damaged / "config.yaml").write_bytes(b"\xff")  # which only the page reads

    with pytest.raises(ValueError, match="config"):
        gather(damaged)
    assert (damaged / "table.md").read_text() == "of an earlier report"


@pytest.mark.slow
def test_a_folder_of_damaged_runs_only_is_refused(damaged):
    shutil.rmtree(damaged / "whole")
    message = r"no run below .* can be reported\nFailed, 4 of 4 runs:\n"
    with pytest.raises(ValueError, match=message):
        gather(damaged)


@pytest.mark.slow
def test_a_gathered_sweep_has_a_page_and_a_picture(sweep):
    page = (sweep / "report.html").read_text()
    assert (sweep / "schedules.png").is_file()
    assert "Sweep of 4 runs" in page
    assert page.count("<tr class=") == 4
    names = sorted(line["name"] for line in data_of(page)["schedules"]["lines"])
    assert names == ["edm", "edm", "oss_shared", "oss_shared"]
    assert "<h2>Samples</h2>" not in page  # they are on the pages of the runs


@pytest.fixture
def logger(tmp_path, monkeypatch, capsys):
    """The logger of W&B in `a run`, asked to be online without a key."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    return wandb_logger(str(tmp_path / "a run"), "oss_exp", None)


@pytest.mark.slow
def test_without_a_key_the_run_is_logged_offline_with_a_warning(logger, tmp_path, capsys):
    logger.log_metrics({"loss": 1.0})

    folder = f"'{tmp_path}/a run'/wandb/offline-run-*"
    upload = f"To upload it later: wandb login; wandb sync {folder}"
    assert upload in capsys.readouterr().err
    assert len(list((tmp_path / "a run" / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_a_warning(logger, tmp_path, monkeypatch, capsys):
    def unreachable(*_):
        raise wandb.errors.CommError("no answer")

    monkeypatch.setattr("oss_exp.report.logging._log", unreachable)
    log_run(logger, OmegaConf.create({}), tmp_path / "a run")
    assert "no answer" in capsys.readouterr().err
