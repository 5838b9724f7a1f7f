"""Tables, pictures and pages: the comparison is the one done by hand, and a run or a sweep becomes a report."""

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
    """Run folder of a small comparison with the csv logger."""
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
    """Header and rows of table.md."""
    lines = [
        line for line in (folder / "table.md").read_text().splitlines() if line.startswith("|")
    ]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells[0], *cells[2:]]


def test_the_table_has_a_row_for_every_schedule_with_its_measured_psnr(run):
    header, *rows = table_of(run)
    measured = {(r.strategy, str(r.num_steps)): str(r.psnr) for r in read_run(run)}
    assert len(measured) == 8
    column = header.index("PSNR, dB")
    assert {(row[0], row[1]): row[column] for row in rows} == measured
    assert len(rows) == 8
    assert (
        sum(row[header.index("gain, dB")] == "*" for row in rows) == 2
    )  # one best baseline a budget


def test_the_page_holds_the_table_the_schedules_and_the_pictures(run):
    page = (run / "report.html").read_text()
    for row in table_of(run):
        tag = "th" if row[0] == "strategy" else "td"
        assert "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) in page
    data = data_of(page)
    assert len(data["schedules"]["lines"]) == 8
    assert [panel["title"] for panel in data["curves"]["measured"]] == ["psnr against K"]
    assert [len(panel["lines"]) for panel in data["curves"]["costs"]] == [2, 2]
    assert (
        len(data["samples"]["rows"]) == 1 + 6
    )  # oss has schedules of its own for 4 of the 8 shown, too few for a row


@pytest.mark.parametrize("name", ["schedules.png", "samples.png"])
def test_pictures_open_and_show_something(name, run):
    with Image.open(run / name) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 200
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_the_csv_logger_writes_psnr_and_gain_of_every_schedule(run):
    with (run / "csv" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    lines = with_gains(read_run(run))
    for line in lines:
        key = f"{line.result.strategy}/K{line.result.num_steps}"
        assert float(row[f"psnr/{key}"]) == pytest.approx(line.result.psnr.mean)
        assert (f"gain/{key}" in row) == (line.gain is not None)
    assert sum(name.startswith("psnr/") for name in row) == len(lines) == 8


def test_schedules_are_read_with_their_strategies(run):
    plans = [(name, plan.num_steps) for name, plan in read_schedules(run)]
    assert sorted(plans) == sorted(
        (name, k) for name in ("edm", "fm", "oss", "oss_shared") for k in (2, 4)
    )


FOREIGN = {
    "a list": "[1, 2]",
    "a word": '"psnr"',
    "null": "null",
    "another object": '{"accuracy": 0.9}',
    "rows that are no rows": '{"rows": 3}',
    "rows of numbers": '{"model": 1, "teacher": 1, "solver": 1, "seed": 1, "rows": [3]}',
    "rows without a psnr": '{"model": 1, "teacher": 1, "solver": 1, "seed": 1, "rows": [{"strategy": "edm"}]}',
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
    """Folder of a --multirun over two strategies and two budgets, gathered with task=report."""
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
        assert (b"cost per round" in data) == (job in "01"), "of the dynamic program"
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
    # The baseline of another job is the rival.
    gains = {row[0]: row[header.index("gain, dB")] for row in rows}
    assert gains["2"] == gains["3"] == "*"
    for ours, rival in (("0", "2"), ("1", "3")):
        (mine,), (other,) = read_run(sweep / ours), read_run(sweep / rival)
        assert gains[ours].startswith(f"{mine.psnr.mean - other.psnr.mean:+.2f} ± ")


def data_of(page: str) -> dict:
    (block,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL
    )
    return json.loads(block)


@pytest.mark.slow
def test_a_gathered_sweep_has_curves_across_its_jobs(sweep):
    curves = data_of((sweep / "report.html").read_text())["curves"]
    (psnr,) = curves["measured"]
    results = {
        (r.strategy, r.num_steps): r.psnr.mean
        for job in range(4)
        for r in read_run(sweep / str(job))
    }
    assert psnr["title"] == "psnr against K"
    for line in psnr["lines"]:
        assert line["x"] == [2, 4]
        assert line["y"] == pytest.approx([results[line["name"], k] for k in (2, 4)], abs=0.01)
        assert line["baseline"] == (line["name"] == "edm")
    costs = [
        read_schedules(sweep / job)[0][1].about("planning")["cost_per_round"] for job in ("0", "1")
    ]
    assert [(panel["title"], *panel["lines"][0]["x"]) for panel in curves["costs"]] == [
        ("K = 2", 1, 2),
        ("K = 4", 1, 2, 3, 4),
    ]
    assert [panel["lines"][0]["y"] for panel in curves["costs"]] == costs


def test_runs_of_one_strategy_have_curves_of_their_own():
    runs = [result(name, {1: value}, nfe=k, run=run) for name, value, k, run in CURVES]
    fid = result("edm", {1: 3}, nfe=4, run="a", metrics={"fid": 7.0, "kid_std": 1.0})
    found = metric_lines(with_gains([*runs, fid]))
    assert found == {
        "psnr": {"edm": {2: 1, 4: 3}, "ours (run a)": {2: 2, 4: 4}, "ours (run b)": {2: 5}},
        "fid": {"edm": {4: 7.0}},
    }


CURVES = [("edm", 1, 2, "a"), ("ours", 2, 2, "a"), ("ours", 4, 4, "a"), ("ours", 5, 2, "b")]


@pytest.mark.slow
def test_jobs_that_fail_take_no_others_along_and_are_explained(tmp_path, capsys):
    """12 jobs, of which two ask for more steps than the teacher has."""
    budgets = "num_steps=" + ",".join(f"[{k}]" for k in (1, 2, 3, 4, 5, 99))
    folder = tmp_path / "sweep"
    few = ["data.eval_samples=2", "data.search_samples=2", "logger=none", "model=mixture_digits"]
    with pytest.raises(SystemExit):
        run_cli("--multirun", *SMALL, *few, "stepsize=edm,fm", budgets, f"hydra.sweep.dir={folder}")
    assert "task=report sweep=FOLDER says which failed" in capsys.readouterr().err
    run_cli("task=report", f"sweep={folder}", f"hydra.run.dir={tmp_path / 'report'}")
    assert len(list(folder.glob("*/metrics.json"))) == 10
    for text in (
        (folder / "table.md").read_text(),
        (folder / "report.html").read_text(),
        capsys.readouterr().out,
    ):
        assert "Failed, 2 of 12 runs:" in text
        assert "- 11: num_steps must be whole numbers from 1 to" in text
        assert "- 5: num_steps must be whole numbers" in text


@pytest.mark.slow
def test_damaged_runs_take_no_others_along_and_a_report_is_written_whole_or_not_at_all(
    run, tmp_path, capsys
):
    for name in ("whole", "metrics", "teacher", "schedules", "link"):
        shutil.copytree(run, tmp_path / name)
    (tmp_path / "metrics" / "metrics.json").write_text("{")
    (tmp_path / "teacher" / "teacher.json").write_text('{"times": [0.5, 0.7]}')
    for name in ("schedules", "link"):
        shutil.rmtree(tmp_path / name / "schedules")
    (tmp_path / "link" / "schedules").symlink_to(run / "schedules")
    gather(tmp_path)
    assert table_of(tmp_path) == table_of(run)
    told = capsys.readouterr().out
    assert "Failed, 4 of 5 runs:" in told
    assert (
        f"- schedules: {tmp_path / 'schedules' / 'schedules'} has no schedules; restore them"
        in told
    )
    assert "- link: " in told
    assert "leads out of its folder" in told

    (tmp_path / "table.md").write_text("of an earlier report")
    (tmp_path / "config.yaml").write_bytes(b"\xff")  # which only the page reads
    with pytest.raises(ValueError, match="config"):
        gather(tmp_path)
    assert (tmp_path / "table.md").read_text() == "of an earlier report"
    shutil.rmtree(tmp_path / "whole")
    with pytest.raises(
        ValueError, match=r"no run below .* can be reported\nFailed, 4 of 4 runs:\n"
    ):
        gather(tmp_path)


@pytest.mark.slow
def test_a_gathered_sweep_has_a_page_and_a_picture(sweep):
    page = (sweep / "report.html").read_text()
    assert (sweep / "schedules.png").is_file()
    assert "Sweep of 4 runs" in page
    assert page.count("<tr class=") == 4
    assert (
        sorted(line["name"] for line in data_of(page)["schedules"]["lines"])
        == ["edm"] * 2 + ["oss_shared"] * 2
    )
    assert "<h2>Samples</h2>" not in page, "they are on the pages of the runs"


@pytest.mark.slow
def test_a_dashboard_out_of_reach_is_a_warning_and_the_run_is_logged_offline(
    tmp_path, monkeypatch, capsys
):
    """W&B without a key, asked to be online; and one whose server does not answer when the run is logged."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    logger = wandb_logger(str(tmp_path / "a run"), "oss_exp", None)
    logger.log_metrics({"loss": 1.0})
    error = capsys.readouterr().err
    assert (
        f"To upload it later: wandb login; wandb sync '{tmp_path}/a run'/wandb/offline-run-*"
        in error
    )
    assert len(list((tmp_path / "a run" / "wandb").glob("offline-run-*"))) == 1

    def unreachable(*_):
        raise wandb.errors.CommError("no answer")

    monkeypatch.setattr("oss_exp.report.logging._log", unreachable)
    log_run(logger, OmegaConf.create({}), tmp_path / "a run")
    assert "no answer" in capsys.readouterr().err
