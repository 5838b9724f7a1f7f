"""The paper's tables beside ours: plans that compose, tables of given numbers, runs of cells."""

import csv
import io
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from helpers import run_cli, start_process
from hydra import compose
from omegaconf import DictConfig
from PIL import Image

from oss_exp.evaluation.psnr import Interval
from oss_exp.reproduce.cells import Cell, _content, make
from oss_exp.reproduce.figures import draw
from oss_exp.reproduce.paper import Paper
from oss_exp.reproduce.plans import TABLES, Plan
from oss_exp.reproduce.render import Reproduction, summary
from oss_exp.reproduce.task import _with
from oss_exp.reproduce.values import Value

SHORT = (
    "model: mixture_digits, num_teacher_steps: 12, data.search_samples: 4, "
    "stepsize.ld3.iterations: 2"
)
SMALL = [
    "model=mixture_fashion",
    "num_teacher_steps=60",
    "data.eval_samples=4",
    "data.per_sample=4",
]


@cache
def composed(*overrides: str) -> DictConfig:
    return compose("config", [*overrides, "paths.output_dir=out", "paths.data_dir=data"])


def plan(name: str, small: bool = True) -> tuple[Paper, Plan]:
    """Return a table of the paper and the plan of its runs."""
    paper = Paper.load(name)
    return paper, TABLES[name](paper, small)


def exact(value: float) -> Value:
    """Return a value that is known exactly."""
    return Value(Interval(value, value, value, 9))


def as_printed(name: str) -> Reproduction:
    """Return a table whose numbers of ours are the paper's, known exactly."""
    paper, planned = plan(name)
    numbers = [row["value"] for row in paper.rows]
    values = [None if number is None else exact(number) for number in numbers]
    return Reproduction(paper, replace(planned, checks={}), "small", values)


def check_setting(row: dict, cell: Cell, small: bool) -> None:
    """Check that the run of a row has the paper's strategy, steps, noise schedule and weights."""
    cfg = composed(*cell.overrides)
    assert row["strategy"] in composed(*cell.lineage()[0].overrides).stepsize
    if row["num_steps"] not in (None, 100):  # 100 is a teacher's
        assert row["num_steps"] in cfg.num_steps
    if row["noise_schedule"]:
        expected = composed(f"noise_schedule={row['noise_schedule']}").noise_schedule
        assert cfg.noise_schedule == expected
    if row["model"] and not small:
        model = composed(f"model={row['model']}").model
        weights = "pipeline" if "pipeline" in model else "checkpoint"
        assert cfg.model[weights] == model[weights]


@pytest.mark.slow
@pytest.mark.parametrize("small", [True, False], ids=["small", "paper"])
@pytest.mark.parametrize("name", TABLES)
def test_every_run_of_a_plan_composes_and_has_the_papers_setting(composing, name, small):
    paper, planned = plan(name, small)
    cells = {cell for source in planned.sources if source for cell in source.cells}

    assert len(planned.sources) == len(paper.rows)
    assert len({cell.key for cell in cells}) == len(cells)
    for row, source in zip(paper.rows, planned.sources, strict=True):
        if source is None:
            assert name == "table_1" or row["value"] is None, row
            continue
        for cell in source.cells:
            check_setting(row, cell, small)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["stepsize=fm", "stepsize=edm"],  # the later one counts
        ["stepsize=edm", "trainer=ddp_spawn_cpu", "logger=csv"],  # no result depends on these
        ["stepsize=edm", "data.seed=0"],  # the default
    ],
)
def test_cells_that_compute_the_same_have_one_name(composing, overrides):
    assert Cell.of(*overrides).key == Cell.of("stepsize=edm").key


@pytest.mark.slow
def test_cells_that_compute_something_else_have_other_names(composing):
    edm = Cell.of("stepsize=edm")
    fm = Cell.of("stepsize=fm")
    cells = [
        edm,
        fm,
        Cell.of("stepsize=edm", "data.seed=1"),
        Cell.of("stepsize=edm", parent=fm),
        Cell.of("stepsize=edm", parent=edm),
    ]
    assert len({cell.key for cell in cells}) == 5


def test_a_cell_is_another_when_the_shipped_weights_are(composing, tmp_path, monkeypatch):
    before = Cell.of("model=unet_fashion").key
    (tmp_path / "unet_fashion.safetensors").write_bytes(b"other")
    monkeypatch.setattr("oss_exp.reproduce.older_cells.ASSETS", tmp_path)
    _content.cache_clear()
    assert Cell.of("model=unet_fashion").key != before
    _content.cache_clear()


def cells_of(line: str) -> list[str]:
    """Return the cells of a line of a table in Markdown."""
    return [cell.strip("| ") for cell in line.split(" | ")]


@pytest.mark.parametrize("name", TABLES)
def test_the_papers_own_numbers_give_the_papers_table(name):
    reproduction = as_printed(name)
    lines, columns, places = reproduction.grid()
    text = reproduction.markdown().splitlines()
    header, _, *table = [cells_of(line) for line in text if line.startswith("| ")]
    body = {label: cells for label, *cells in table[: len(lines)]}

    assert header[1:] == columns
    assert len(places) == len(reproduction.paper.rows)
    for (line, column), number in places.items():
        paper, *ours = body[line][columns.index(column)].split(" / ")
        if reproduction.paper.rows[number]["value"] is None:
            assert (paper, ours) == ("-", ["-"])
        else:
            assert float(paper) == float(ours[0].split()[0])


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_the_same_cells_in_csv_and_latex(name):
    reproduction = as_printed(name)
    lines, columns, _ = reproduction.grid()
    rows = list(csv.DictReader(reproduction.csv().splitlines()))
    latex = reproduction.latex()

    assert name == "table_1" or [row["paper"] for row in rows] == [row["ours"] for row in rows]
    assert latex.count(r" \\") == len(lines) + 1
    assert latex.count("&") == len(columns) * (len(lines) + 1)


@pytest.mark.parametrize("name", TABLES)
def test_a_claim_holds_on_the_papers_numbers_unless_it_is_doubted(name):
    for claim, verdict in as_printed(name).verdicts:
        if claim.better is None:
            assert verdict.answer == "not checked"
        else:
            assert verdict.answer == "holds" or claim.doubt, (claim, verdict)


def test_a_claim_is_judged_by_the_interval_of_the_difference():
    paper = Paper.load("table_2")
    claim = next(claim for claim in paper.claims if claim.better)
    better, (other,) = paper.ordered(claim)
    assert (paper.rows[better]["strategy"], paper.rows[other]["strategy"]) == ("oss", "edm")

    def judge(ours: list[float], theirs: list[float]) -> str:
        values = [None] * len(paper.rows)
        for i, numbers in ((better, ours), (other, theirs)):
            interval = Interval(sum(numbers) / len(numbers), None, None, 3)
            values[i] = Value(interval, dict(enumerate(numbers)))
        return Reproduction(paper, plan("table_2")[1], "small", values)._judge(claim).answer

    assert judge([2, 3, 4], [1, 2.1, 3]) == "holds"
    assert judge([1, 2.1, 3], [2, 3, 4]) == "does not hold"
    assert judge([2, 3, 4], [9, 3, -9]) == "not significant"
    assert judge([2], [1]) == "holds"  # and says that there is no interval


def test_a_summary_counts_the_answers():
    text = summary([as_printed("table_2"), as_printed("table_6")])
    title = "PSNR under three noise schedules, naive steps and OSS"
    assert f"| [table 2](table_2/small.md) | {title}" in text
    assert "| 9 | 0 | 0 | 2 |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table=9"], "task.table must be one of all or a whole number from 1 to 7, got 9"),
        (["table=2", "task.scale=large"], "task.scale must be one of small, paper, got 'large'"),
    ],
)
def test_wrong_settings_are_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_cli(
            "task=reproduce",
            *arguments,
            f"hydra.run.dir={tmp_path}",
            f"task.cells={tmp_path}/cells",
        )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cells").exists()


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


def command(folder: Path, table: int, *more: str) -> list[str]:
    """Return the arguments that reproduce a table in a folder."""
    places = [
        f"task.output={folder}/paper",
        f"task.cells={folder}/cells",
        f"hydra.run.dir={folder}/run",
    ]
    return ["task=reproduce", f"table={table}", *places, *more]


def results(folder: Path) -> dict[str, bytes]:
    """Return the content of the files of a table."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("paper/*/small.*"))}


def kill_at(pattern: str, folder: Path, arguments: list[str]) -> None:
    """Run until a file of this pattern is in the folder, then kill the command alone."""
    process, _ = start_process(arguments, folder.parent, {})
    limit = time.monotonic() + 200
    while not list(folder.glob(pattern)) and time.monotonic() < limit:
        time.sleep(0.05)
    process.kill()
    process.join()


@pytest.mark.slow
def test_killed_three_times_the_bytes_are_the_same(tmp_path):
    """The runs of a killed command live on, and the next command waits for them."""
    short = f"task.overrides={{{SHORT}}}"
    run_cli(*command(tmp_path / "whole", 1, short))
    expected = results(tmp_path / "whole")
    assert set(expected) == {f"small.{kind}" for kind in ("md", "tex", "csv", "json")}

    folder = tmp_path / "killed"
    for pattern in ("cells/*/.lock", "cells/*/schedules/*.json", "cells/*/cell.json"):
        kill_at(pattern, folder, command(folder, 1, short, "task.jobs=1"))
        assert not results(folder)
    (cell,) = folder.glob("cells/*/cell.json")
    before = cell.stat().st_mtime_ns

    run_cli(*command(folder, 1, short))
    assert results(folder) == expected
    assert cell.stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "figures"),
    [
        ("table_3", ["stepsize=[oss,oss_ave]", "num_steps=[20]", "task=search"], ["figure_5"]),
        ("table_6", ["stepsize=[edm,ddim,fm,dm,gits,oss_ave]"], ["figure_1", "figure_10"]),
    ],
)
def test_figures_are_drawn_from_the_runs_of_a_table(composing, tmp_path, name, settings, figures):
    paper, planned = plan(name)
    cell = Cell.of(*SMALL, *settings)
    assert make([cell], tmp_path, jobs=1) == {}

    sources = [source and replace(source, cells=(cell,)) for source in planned.sources]
    pictures = draw(paper, replace(planned, sources=sources), tmp_path)

    assert list(pictures) == figures
    assert all(min(Image.open(io.BytesIO(data)).size) > 200 for data in pictures.values())


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_others_are_kept(tmp_path, capsys):
    # One of two runs has a solver with an order, and none of order 9.
    short = f"task.overrides={{{SHORT}, solver.order: 9}}"
    with pytest.raises(SystemExit):
        run_cli(*command(tmp_path, 1, short))

    error = capsys.readouterr().err
    assert "oss-exp: 1 runs failed, and their tables are not written; the others are kept." in error
    assert "solver.order" in error
    assert not results(tmp_path)
    assert len(list((tmp_path / "cells").glob("*/cell.json"))) == 1
    assert not (tmp_path / "paper").exists()


@pytest.mark.slow
def test_overrides_are_for_the_runs_that_have_their_keys(composing):
    plans = {name: plan(name)[1] for name in ("table_5", "table_6")}
    more = {
        "task.max_steps": 1,
        "data.prompts": "prompts.txt",
        "evaluation": "inception",
        "evaluation.extractor.weights": "w.pth",
    }
    runs = set()
    for changed in _with(plans, more).values():
        for source in changed.sources:
            for cell in source.cells:
                runs |= {*cell.lineage()}

    trained = {cell for cell in runs if "task=finetune" in cell.overrides}
    prompted = {cell for cell in runs if "data=prompts" in cell.overrides}
    assert prompted
    assert prompted == {cell for cell in runs if "data.prompts=prompts.txt" in cell.overrides}
    assert all("task.max_steps=1" in cell.overrides for cell in trained)
    weights = "evaluation.extractor.weights=w.pth"
    assert all(weights in cell.overrides for cell in runs - trained)
    assert all(cell.key for cell in runs)


def test_an_override_of_no_run_is_refused(composing):
    plans = {name: plan(name)[1] for name in ("table_5", "table_6")}
    message = r"task\.overrides\.data\.prompt is an option of none of these runs"
    with pytest.raises(ValueError, match=message):
        _with(plans, {"data.prompt": "prompts.txt"})
