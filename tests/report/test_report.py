"""Tables, pictures and pages: the comparison is the one done by hand, and a run or a sweep becomes a report."""

from __future__ import annotations

import csv
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import run_cli
from PIL import Image
from scipy import stats

from oss_exp.evaluation.psnr import Interval
from oss_exp.report.results import Line, Result, compare, metric_lines, read_run, read_schedules
from oss_exp.report.table import columns, markdown

SMALL = [
    "model=mixture_digits",
    "num_teacher_steps=20",
    "data.search_samples=6",
    "data.eval_samples=8",
    "data.per_sample=4",
    "trainer.enable_progress_bar=false",
]


# --------------------------------------------------------------------------------------------------------------
# The comparison
# --------------------------------------------------------------------------------------------------------------


def result(strategy: str, values: dict[int, float], baseline: bool = False, nfe: int = 5, arena: str = "a", **extra):
    interval = Interval.of(np.array(list(values.values())))
    fields = {
        "run": "",
        "num_steps": nfe,
        "start": "pinned",
        "planning": {},
        "metrics": {},
        "spread": Interval.of(np.ones(2)),
        **extra,
    }
    return Result(
        strategy=strategy, nfe=nfe, baseline=baseline, psnr=interval, values=values, arena=f"{arena}{nfe}", **fields
    )


def lines_of(*results: Result) -> dict[str, Line]:
    return {line.result.strategy: line for line in compare(results)}


EDM = result("edm", {1: 20.0, 2: 22.0, 3: 24.0, 4: 30.0}, baseline=True)
DDIM = result("ddim", {1: 19.0, 2: 30.0, 3: 20.0, 4: 20.0}, baseline=True)
OURS = result("ours", {1: 23.0, 2: 26.0, 3: 26.0, 4: 35.0})


def test_the_gain_is_the_paired_difference_to_the_best_baseline():
    line = lines_of(OURS, DDIM, EDM)["ours"]
    assert line.rival is EDM
    # Differences 3, 4, 2, 5: mean 3.5, standard deviation sqrt(5/3), Student's t with 3 degrees of freedom.
    half = stats.t.ppf(0.975, 3) * (5 / 3) ** 0.5 / 2
    assert (line.gain.mean, line.gain.n) == (3.5, 4)
    assert (line.gain.low, line.gain.high) == pytest.approx((3.5 - half, 3.5 + half), abs=1e-12)


def test_the_gain_counts_only_the_samples_that_both_have():
    few = result("few", {3: 30.0, 4: 32.0, 99: 90.0})
    gain = lines_of(few, EDM)["few"].gain
    assert (gain.mean, gain.n) == (4.0, 2)


def test_without_a_common_sample_there_is_no_gain():
    assert lines_of(result("far", {7: 30.0, 8: 30.0}), EDM)["far"].gain is None


def test_one_common_sample_gives_a_gain_without_an_interval():
    line = lines_of(result("one", {4: 31.0, 9: 30.0}), EDM)["one"]
    assert line.gain == Interval(1.0, None, None, 1)
    assert columns([line])[1][0][5] == "+1.00"


def test_the_best_baseline_is_marked_and_the_other_ones_compared_with_it():
    lines = compare([OURS, DDIM, EDM])
    assert [(line.result.strategy, line.gain is None) for line in lines] == [
        ("ours", False),
        ("edm", True),
        ("ddim", False),
    ]
    assert lines[2].gain.mean == pytest.approx(-1.75)
    assert [row[5] for row in columns(lines)[1]] == ["+3.50 ± 2.05", "*", "-1.75 ± 11.93"]


def test_without_a_baseline_there_is_no_gain():
    (line,) = compare([OURS])
    assert (line.rival, line.gain) == (None, None)
    assert columns([line])[1][0][5] == ""


@pytest.mark.parametrize("other", [{"nfe": 10}, {"arena": "another teacher"}])
def test_a_better_baseline_of_another_budget_or_arena_is_no_rival(other):
    better = result("better", {1: 50.0, 2: 50.0, 3: 50.0, 4: 50.0}, baseline=True, **other)
    lines = lines_of(OURS, EDM, better)
    assert lines["ours"].rival is EDM
    assert lines["better"].rival is better


def test_lines_are_by_budget_then_best_first():
    results = [result(name, {1: value}, nfe=nfe) for name, value, nfe in [("a", 1, 9), ("b", 2, 3), ("c", 3, 3)]]
    assert [line.result.strategy for line in compare(results)] == ["c", "b", "a"]


def test_the_markdown_table_has_a_row_for_every_result_and_a_run_column_for_several_runs():
    text = markdown(compare([OURS, DDIM, EDM]))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0] == "| strategy | K | NFE | start | PSNR, dB | gain, dB | spread | n | planning |"
    assert table[2].startswith("| ours | 5 | 5 | pinned | 27.50 ± ")
    assert len(table) == 2 + 3
    several = markdown(compare([OURS, result("edm", {1: 20.0}, run="7")]))
    assert several.startswith("| run | strategy |")
    assert "| 7 | edm |" in several


# --------------------------------------------------------------------------------------------------------------
# A run
# --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Run folder of a small comparison with the csv logger."""
    folder = tmp_path_factory.mktemp("report") / "run"
    run_cli(*SMALL, "num_steps=[2,4]", "stepsize=[edm,fm,oss,oss_shared]", "logger=csv", f"hydra.run.dir={folder}")
    return folder


def table_of(folder: Path) -> list[list[str]]:
    """Header and rows of table.md."""
    lines = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells[0], *cells[2:]]


def test_the_table_has_a_row_for_every_schedule_with_its_measured_psnr(run):
    header, *rows = table_of(run)
    measured = {(r.strategy, str(r.num_steps)): str(r.psnr) for r in read_run(run)}
    assert len(measured) == 8
    column = header.index("PSNR, dB")
    assert {(row[0], row[1]): row[column] for row in rows} == measured
    assert len(rows) == 8
    assert sum(row[header.index("gain, dB")] == "*" for row in rows) == 2  # one best baseline a budget


def test_the_page_holds_the_table_the_schedules_and_the_pictures(run):
    page = (run / "report.html").read_text()
    for row in table_of(run):
        tag = "th" if row[0] == "strategy" else "td"
        assert "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) in page
    data = data_of(page)
    assert len(data["schedules"]["lines"]) == 8
    assert [panel["title"] for panel in data["curves"]["measured"]] == ["psnr against K"]
    assert [len(panel["lines"]) for panel in data["curves"]["costs"]] == [2, 2]
    assert len(data["samples"]["rows"]) == 1 + 6  # oss has schedules of its own for 4 of the 8 shown, too few for a row


@pytest.mark.parametrize("name", ["schedules.png", "samples.png"])
def test_pictures_open_and_show_something(name, run):
    with Image.open(run / name) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 200
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_the_csv_logger_writes_psnr_and_gain_of_every_schedule(run):
    with (run / "csv" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    lines = compare(read_run(run))
    for line in lines:
        key = f"{line.result.strategy}/K{line.result.num_steps}"
        assert float(row[f"psnr/{key}"]) == pytest.approx(line.result.psnr.mean)
        assert (f"gain/{key}" in row) == (line.gain is not None)
    assert sum(name.startswith("psnr/") for name in row) == len(lines) == 8


def test_schedules_are_read_with_their_strategies(run):
    plans = [(name, plan.num_steps) for name, plan in read_schedules(run)]
    assert sorted(plans) == sorted((name, k) for name in ("edm", "fm", "oss", "oss_shared") for k in (2, 4))


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


# --------------------------------------------------------------------------------------------------------------
# A sweep
# --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Folder of a --multirun over two strategies and two budgets, gathered with task=report."""
    folder = tmp_path_factory.mktemp("sweep") / "2026-01-01" / "many"
    axes = ["stepsize=oss_shared,edm", "num_steps=[2],[4]"]
    run_cli("--multirun", *SMALL, *axes, "logger=wandb", f"hydra.sweep.dir={folder}")
    run_cli("task=report", f"sweep={folder}", f"hydra.run.dir={folder.parent / 'report'}")
    return folder


def test_a_sweep_leaves_one_whole_folder_per_job(sweep):
    jobs = sorted(path.name for path in sweep.iterdir() if path.is_dir())
    assert jobs == ["0", "1", "2", "3"]
    settings = [[(r.strategy, r.num_steps) for r in read_run(sweep / job)] for job in jobs]
    assert settings == [[("oss_shared", 2)], [("oss_shared", 4)], [("edm", 2)], [("edm", 4)]]
    files = ["config.yaml", "table.md", "schedules.png", "samples.png", "report.html"]
    assert all((sweep / job / name).is_file() for job in jobs for name in files)


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
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(block)


def test_a_gathered_sweep_has_curves_across_its_jobs(sweep):
    curves = data_of((sweep / "report.html").read_text())["curves"]
    (psnr,) = curves["measured"]
    results = {(r.strategy, r.num_steps): r.psnr.mean for job in range(4) for r in read_run(sweep / str(job))}
    assert psnr["title"] == "psnr against K"
    for line in psnr["lines"]:
        assert line["x"] == [2, 4]
        assert line["y"] == pytest.approx([results[line["name"], k] for k in (2, 4)], abs=0.01)
        assert line["baseline"] == (line["name"] == "edm")
    costs = [read_schedules(sweep / job)[0][1].about("planning")["cost_per_round"] for job in ("0", "1")]
    assert [(panel["title"], *panel["lines"][0]["x"]) for panel in curves["costs"]] == [
        ("K = 2", 1, 2),
        ("K = 4", 1, 2, 3, 4),
    ]
    assert [panel["lines"][0]["y"] for panel in curves["costs"]] == costs


def test_runs_of_one_strategy_have_curves_of_their_own():
    runs = [result(name, {1: value}, nfe=k, run=run) for name, value, k, run in CURVES]
    fid = result("edm", {1: 3}, nfe=4, run="a", metrics={"fid": 7.0, "kid_std": 1.0})
    found = metric_lines(compare([*runs, fid]))
    assert found == {
        "psnr": {"edm": {2: 1, 4: 3}, "ours (run a)": {2: 2, 4: 4}, "ours (run b)": {2: 5}},
        "fid": {"edm": {4: 7.0}},
    }


CURVES = [("edm", 1, 2, "a"), ("ours", 2, 2, "a"), ("ours", 4, 4, "a"), ("ours", 5, 2, "b")]


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
    for text in ((folder / "table.md").read_text(), (folder / "report.html").read_text(), capsys.readouterr().out):
        assert "Failed, 2 of 12 runs:" in text
        assert "- 11: num_steps must be whole numbers from 1 to" in text
        assert "- 5: num_steps must be whole numbers" in text


def test_a_gathered_sweep_has_a_page_and_a_picture(sweep):
    page = (sweep / "report.html").read_text()
    assert (sweep / "schedules.png").is_file()
    assert "Sweep of 4 runs" in page
    assert page.count("<tr class=") == 4
    assert sorted(line["name"] for line in data_of(page)["schedules"]["lines"]) == ["edm"] * 2 + ["oss_shared"] * 2
    assert "<h2>Samples</h2>" not in page, "they are on the pages of the runs"
