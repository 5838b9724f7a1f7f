"""The paper's tables beside ours: plans that compose, tables that hold what they are given, runs that are made once."""

import csv
import io
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from helpers import run_cli, start_process
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from oss_exp.cli import CONF
from oss_exp.evaluation.psnr import Interval
from oss_exp.reproduce.cells import Cell, _content, make
from oss_exp.reproduce.figures import draw
from oss_exp.reproduce.paper import Paper
from oss_exp.reproduce.plans import TABLES, Plan
from oss_exp.reproduce.render import Reproduction, summary
from oss_exp.reproduce.task import _with
from oss_exp.reproduce.values import Value

SHORT = "model: mixture_digits, num_teacher_steps: 12, data.search_samples: 4, stepsize.ld3.iterations: 2"
SMALL = "model: mixture_fashion, num_teacher_steps: 60, data.eval_samples: 4, data.per_sample: 4"


@pytest.fixture
def composing():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@cache
def composed(*overrides: str) -> DictConfig:
    return compose("config", [*overrides, "paths.output_dir=out", "paths.data_dir=data"])


def plan(name: str, small: bool = True) -> tuple[Paper, Plan]:
    paper = Paper.load(name)
    return paper, TABLES[name](paper, small)


def as_printed(name: str) -> Reproduction:
    """A table whose every number of ours is the paper's, known exactly."""
    paper, planned = plan(name)
    values = [
        None
        if row["value"] is None
        else Value(Interval(row["value"], row["value"], row["value"], 9))
        for row in paper.rows
    ]
    return Reproduction(paper, replace(planned, checks={}), "small", values)


@pytest.mark.slow
@pytest.mark.parametrize("small", [True, False], ids=["small", "paper"])
@pytest.mark.parametrize("name", TABLES)
def test_every_run_of_a_plan_composes_and_has_the_papers_setting(composing, name, small):
    paper, planned = plan(name, small)
    assert len(planned.sources) == len(paper.rows)
    wanted = {cell for source in planned.sources if source for cell in source.cells}
    assert len({cell.key for cell in wanted}) == len(wanted)
    for row, source in zip(paper.rows, planned.sources, strict=True):
        if source is None:
            assert name == "table_1" or row["value"] is None, row
            continue
        for cell in source.cells:
            cfg = composed(*cell.overrides)
            planned_by = composed(*cell.lineage()[0].overrides)
            assert row["strategy"] in planned_by.stepsize
            if row["num_steps"] not in (None, 100):  # 100 is a teacher's
                assert row["num_steps"] in cfg.num_steps
            if row["noise_schedule"]:
                assert (
                    cfg.noise_schedule
                    == composed(f"noise_schedule={row['noise_schedule']}").noise_schedule
                )
            if row["model"] and not small:
                model = composed(f"model={row['model']}").model
                weights = "pipeline" if "pipeline" in model else "checkpoint"
                assert cfg.model[weights] == model[weights]


@pytest.mark.slow
def test_a_cell_is_named_by_what_it_computes(composing):
    def key(*overrides: str, parent: Cell | None = None) -> str:
        return Cell.of(*overrides, parent=parent).key

    base = key("stepsize=edm")
    assert base == key("stepsize=fm", "stepsize=edm")  # the later one counts
    assert base == key(
        "stepsize=edm", "trainer=ddp_spawn_cpu", "logger=csv"
    )  # no result depends on these
    assert base == key("stepsize=edm", "data.seed=0")  # the default
    others = [
        key("stepsize=edm", "data.seed=1"),
        key("stepsize=fm"),
        key("stepsize=edm", parent=Cell.of("stepsize=fm")),
    ]
    assert len({base, *others, key("stepsize=edm", parent=Cell.of("stepsize=edm"))}) == 5


def test_a_cell_is_another_when_the_shipped_weights_are(composing, tmp_path, monkeypatch):
    before = Cell.of("model=unet_fashion").key
    (tmp_path / "unet_fashion.safetensors").write_bytes(b"other")
    monkeypatch.setattr("oss_exp.reproduce.older_cells.ASSETS", tmp_path)
    _content.cache_clear()
    assert Cell.of("model=unet_fashion").key != before
    _content.cache_clear()


@pytest.mark.parametrize("name", TABLES)
def test_the_papers_own_numbers_give_the_papers_table(name):
    found = as_printed(name)
    lines, columns, places = found.grid()
    assert len(places) == len(found.paper.rows)
    table = [line.split(" | ") for line in found.markdown().splitlines() if line.startswith("| ")]
    assert [cell.strip("| ") for cell in table[0]][1:] == columns
    body = {
        cells[0].strip("| "): [cell.strip("| ") for cell in cells[1:]]
        for cells in table[2 : 2 + len(lines)]
    }
    for (line, column), number in places.items():
        theirs, *ours = body[line][columns.index(column)].split(" / ")
        value = found.paper.rows[number]["value"]
        assert (
            (theirs, ours) == ("-", ["-"])
            if value is None
            else float(theirs) == float(ours[0].split()[0])
        )
    rows = list(csv.DictReader(found.csv().splitlines()))
    assert [row["paper"] for row in rows] == [row["ours"] for row in rows] or name == "table_1"
    assert found.latex().count(r" \\") == len(lines) + 1
    assert found.latex().count("&") == len(columns) * (len(lines) + 1)


@pytest.mark.parametrize("name", TABLES)
def test_a_claim_holds_on_the_papers_numbers_unless_it_is_doubted(name):
    for claim, found in as_printed(name).verdicts:
        if claim.better is None:
            assert found.answer == "not checked"
        else:
            assert found.answer == "holds" or (claim.doubt and found.answer != "holds"), (
                claim,
                found,
            )


def test_a_claim_is_judged_by_the_interval_of_the_difference():
    paper = Paper.load("table_2")
    claim = next(claim for claim in paper.claims if claim.better)
    better, (other,) = paper.ordered(claim)
    assert (paper.rows[better]["strategy"], paper.rows[other]["strategy"]) == ("oss", "edm")

    def judge(ours: list[float], theirs: list[float]) -> str:
        values = [None] * len(paper.rows)
        for i, numbers in ((better, ours), (other, theirs)):
            values[i] = Value(
                Interval(sum(numbers) / len(numbers), None, None, 3), dict(enumerate(numbers))
            )
        return Reproduction(paper, plan("table_2")[1], "small", values)._judge(claim).answer

    assert judge([2, 3, 4], [1, 2.1, 3]) == "holds"
    assert judge([1, 2.1, 3], [2, 3, 4]) == "does not hold"
    assert judge([2, 3, 4], [9, 3, -9]) == "not significant"
    assert judge([2], [1]) == "holds"  # and says that there is no interval


def test_summary_counts_the_answers():
    found = summary([as_printed("table_2"), as_printed("table_6")])
    assert (
        "| [table 2](table_2/small.md) | PSNR under three noise schedules, naive steps and OSS"
        in found
    )
    assert "| 9 | 0 | 0 | 2 |" in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table=9"], "task.table must be one of all or a whole number from 1 to 7, got 9"),
        (["table=2", "task.scale=large"], "task.scale must be one of small, paper, got 'large'"),
    ],
)
def test_bad_input(arguments, message, tmp_path, capsys):
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
    where = [
        f"task.output={folder}/paper",
        f"task.cells={folder}/cells",
        f"hydra.run.dir={folder}/run",
    ]
    return ["task=reproduce", f"table={table}", *where, *more]


def results(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("paper/*/small.*"))}


@pytest.mark.slow
def test_killed_three_times_the_bytes_are_the_same(tmp_path):
    """SIGKILL to the command alone, whose runs live on: the next command waits for them."""
    short = f"task.overrides={{{SHORT}}}"
    run_cli(*command(tmp_path / "whole", 1, short))
    expected = results(tmp_path / "whole")
    assert set(expected) == {f"small.{kind}" for kind in ("md", "tex", "csv", "json")}
    folder = tmp_path / "killed"
    for reached in ("cells/*/.lock", "cells/*/schedules/*.json", "cells/*/cell.json"):
        process, _ = start_process(command(folder, 1, short, "task.jobs=1"), tmp_path, {})
        limit = time.monotonic() + 200
        while not list(folder.glob(reached)) and time.monotonic() < limit:
            time.sleep(0.05)
        process.kill()
        process.join()
        assert not results(folder)
    (made,) = folder.glob("cells/*/cell.json")
    when = made.stat().st_mtime_ns
    run_cli(*command(folder, 1, short))
    assert results(folder) == expected
    assert made.stat().st_mtime_ns == when  # not made again


@pytest.mark.slow
def test_figures_are_drawn_from_the_runs_of_a_table(composing, tmp_path):
    strategies = {
        "table_3": "[oss,oss_ave] num_steps=[20] task=search",
        "table_6": "[edm,ddim,fm,dm,gits,oss_ave]",
    }
    for name, figures in {"table_3": ["figure_5"], "table_6": ["figure_1", "figure_10"]}.items():
        paper, planned = plan(name)
        cell = Cell.of(
            *SMALL.replace(": ", "=").split(", "), *f"stepsize={strategies[name]}".split()
        )
        assert make([cell], tmp_path, jobs=1) == {}
        sources = [source and replace(source, cells=(cell,)) for source in planned.sources]
        drawn = draw(paper, replace(planned, sources=sources), tmp_path)
        assert list(drawn) == figures
        assert all(min(Image.open(io.BytesIO(picture)).size) > 200 for picture in drawn.values())


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_the_others_are_kept(tmp_path, capsys):
    """One of two has a solver that has an order, and none of order 9."""
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
    more = {"task.max_steps": 1, "data.prompts": "prompts.txt", "evaluation": "inception"}
    more |= {"evaluation.extractor.weights": "w.pth"}
    changed = _with(plans, more)
    runs = {
        member
        for each in changed.values()
        for s in each.sources
        for cell in s.cells
        for member in cell.lineage()
    }
    trained = [cell for cell in runs if "task=finetune" in cell.overrides]
    assert all("task.max_steps=1" in cell.overrides for cell in trained)
    prompted = [cell for cell in runs if "data.prompts=prompts.txt" in cell.overrides]
    assert [cell for cell in runs if "data=prompts" in cell.overrides] == prompted != []
    measured = [cell for cell in runs if "task=finetune" not in cell.overrides]
    assert all("evaluation.extractor.weights=w.pth" in cell.overrides for cell in measured)
    assert all(cell.key for cell in runs)
    with pytest.raises(
        ValueError, match=r"task\.overrides\.data\.prompt is an option of none of these runs"
    ):
        _with(plans, {"data.prompt": "prompts.txt"})
