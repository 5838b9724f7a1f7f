"""The W&B report is built without the network, from the keys that a run logs."""

import json
import sys
import time
from pathlib import Path

import pytest
from helpers import run_cli
from wandb.proto.wandb_internal_pb2 import Record

from oss_exp.report import wandb_report

wr = pytest.importorskip("wandb_workspaces.reports.v2")

RUN = [
    "model=mixture_fashion",
    "num_teacher_steps=8",
    "num_steps=[2,3]",
    "stepsize=[ddim,oss_shared]",
    "logger=wandb",
    "data.search_samples=2",
    "data.eval_samples=4",
    "metric=[fid]",
]


def records(file: Path) -> list[Record]:
    """Return the records of a .wandb file once W&B's own process has written the last one."""
    limit = time.monotonic() + 30
    result = written_records(file)
    while not result or not result[-1].HasField("exit"):
        assert time.monotonic() < limit, f"{file} has no end"
        time.sleep(0.05)
        result = written_records(file)
    return result


def written_records(file: Path) -> list[Record]:
    """Return the whole records of a LevelDB log.

    Its blocks have 32 KiB after a head of 7 bytes, and its records come in parts of checksum (4),
    length (2), kind (1) and content.
    """
    data = file.read_bytes()
    result = []
    record = b""
    place = 7
    while place + 7 <= len(data):
        room = 2**15 - place % 2**15
        if room < 7:
            place += room
            continue
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        kind = data[place + 6]
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if place > len(data):
            break
        if kind in (1, 4):  # a whole record, or the last part of one
            result.append(Record.FromString(record))
            record = b""
    return result


@pytest.fixture(scope="module")
def run_records(tmp_path_factory) -> list[Record]:
    """The records that a small run writes for W&B."""
    folder = tmp_path_factory.mktemp("wandb")
    run_cli(*RUN, f"hydra.run.dir={folder}")
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    return records(file)


@pytest.fixture(scope="module")
def logged(run_records) -> dict:
    """The logged values by their keys; of nested keys, their parts by name."""
    result = {}
    for record in run_records:
        for item in record.history.item:
            key, *part = item.nested_key
            value = json.loads(item.value_json)
            result[key] = {**result.get(key, {}), part[0]: value} if part else value
    return result


@pytest.fixture(scope="module")
def charts_of_the_run(run_records) -> dict:
    """W&B's own panels of the charts of the run, by their titles."""
    result = {}
    for record in run_records:
        for item in record.config.update:
            if item.nested_key[:2] == ["_wandb", "visualize"]:
                result[item.nested_key[2]] = json.loads(item.value_json)["panel_config"]
    return result


def grids(report) -> list:
    """Return the grids of panels of a report."""
    return [block for block in report.blocks if isinstance(block, wr.PanelGrid)]


def panels(report, kind: type = object) -> list:
    """Return the panels of a report, or those of one kind."""
    return [panel for grid in grids(report) for panel in grid.panels if isinstance(panel, kind)]


@pytest.fixture
def report():
    """The report of a project."""
    return wandb_report.build("them", "steps", None, ["psnr", "fid"])


@pytest.mark.slow
def test_the_panels_show_keys_that_the_logger_writes(report, logged):
    charts = panels(report, wr.CustomChart)
    tables = [chart.query["summaryTable"]["tableKey"] for chart in charts]
    (table,) = [panel.table_name for panel in panels(report, wr.WeavePanelSummaryTable)]
    media = [key for browser in panels(report, wr.MediaBrowser) for key in browser.media_keys]

    assert tables == ["psnr against K_table", "fid against K_table", "cost per round_table"]
    assert {logged[key]["_type"] for key in (*tables, table)} == {"table-file"}
    assert [logged[key]["_type"] for key in media] == ["images/separated"] * 2
    assert len(panels(report, wr.RunComparer)) == 1


def table_key(panel: dict) -> str:
    """Return the key of the table that a chart asks for."""
    fields = panel["userQuery"]["queryFields"][0]["fields"]
    table = next(field for field in fields if field["name"] == "summaryTable")
    return table["args"][0]["value"]


@pytest.mark.slow
def test_the_charts_are_those_of_the_page_of_a_run(report, charts_of_the_run):
    for chart in panels(report, wr.CustomChart):
        config = chart._to_model().config
        expected = charts_of_the_run[chart.chart_strings["title"]]
        query = config.model_dump(by_alias=True, exclude_none=True)
        assert config.panel_def_id == expected["panelDefId"]
        assert config.field_settings == expected["fieldSettings"]
        assert table_key(query) == table_key(expected)


def test_a_report_of_a_sweep_has_its_runs_only():
    report = wandb_report.build("them", "steps", "2026-01-01/many", ["psnr"])
    sets = [runs for grid in grids(report) for runs in grid.runsets]
    group = "Metric(\"Group\") == '2026-01-01/many'"

    assert {(runs.entity, runs.project, runs.filters) for runs in sets} == {
        ("them", "steps", group)
    }
    assert all(panel._to_model() for panel in panels(report))


@pytest.fixture
def nobody(monkeypatch):
    """Nobody is logged in at W&B."""
    monkeypatch.setattr("wandb.login", lambda **_: False)


def test_without_a_login_it_says_what_to_do(nobody):
    message = r"cannot be saved to them/steps: nobody is logged in\n.*wandb login.*"
    with pytest.raises(SystemExit, match=message + "task=report sweep=FOLDER"):
        wandb_report.main(["them/steps"])


@pytest.mark.parametrize("project", ["steps", "them/steps/more"])
def test_other_names_of_a_project_are_refused(project, nobody, capsys):
    with pytest.raises(SystemExit, match="2"):
        wandb_report.main([project])
    assert "ENTITY/PROJECT is wanted" in capsys.readouterr().err


def test_without_its_package_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(SystemExit, match=r"pip install 'oss_exp\[wandb-report\]'"):
        wandb_report.main(["them/steps"])
