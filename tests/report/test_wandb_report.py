"""The W&B report is built without the network, of the very keys that a run logs."""

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
]
RUN += ["data.search_samples=2", "data.eval_samples=4", "metric=[fid]"]


def records(file: Path) -> list[Record]:
    """Of a .wandb file when it is whole: W&B's own process still writes when the run has ended."""
    until = time.monotonic() + 30
    while not (found := records_now(file)) or not found[-1].HasField("exit"):
        assert time.monotonic() < until, f"{file} has no end"
        time.sleep(0.05)
    return found


def records_now(file: Path) -> list[Record]:
    """Of a LevelDB log in blocks of 32 KiB, records in parts of checksum, length and kind."""
    data, found, part, place = file.read_bytes(), [], b"", 7
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if place > len(data):
            break
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> dict:
    """What a small run tells W&B: {key: value, or its parts by name}, and of charts {"_wandb": {key: panel}}."""
    folder = tmp_path_factory.mktemp("wandb")
    run_cli(*RUN, f"hydra.run.dir={folder}")
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    found = {"_wandb": {}}
    for record in records(file):
        for item in record.history.item:
            key, *part = item.nested_key
            value = json.loads(item.value_json)
            found[key] = {**found.get(key, {}), part[0]: value} if part else value
        for item in record.config.update:
            if item.nested_key[:2] == ["_wandb", "visualize"]:
                found["_wandb"][item.nested_key[2]] = json.loads(item.value_json)["panel_config"]
    return found


def dumped(panel) -> dict:
    return panel._to_model().config.model_dump(by_alias=True, exclude_none=True)


def panels(report) -> list:
    return [
        panel
        for block in report.blocks
        if isinstance(block, wr.PanelGrid)
        for panel in block.panels
    ]


@pytest.mark.slow
def test_the_panels_show_what_the_logger_writes(logged):
    found = panels(wandb_report.build("them", "steps", None, ["psnr", "fid"]))
    charts = [panel for panel in found if isinstance(panel, wr.CustomChart)]
    tables = [panel.query["summaryTable"]["tableKey"] for panel in charts]
    assert tables == ["psnr against K_table", "fid against K_table", "cost per round_table"]
    (table,) = [panel.table_name for panel in found if isinstance(panel, wr.WeavePanelSummaryTable)]
    media = [
        key for panel in found if isinstance(panel, wr.MediaBrowser) for key in panel.media_keys
    ]
    assert {logged[key]["_type"] for key in (*tables, table)} == {"table-file"}
    assert [logged[key]["_type"] for key in media] == ["images/separated"] * 2
    assert sum(isinstance(panel, wr.RunComparer) for panel in found) == 1
    for panel in charts:
        ours, own = (
            panel._to_model().config,
            logged["_wandb"][panel.chart_strings["title"]],
        )  # W&B's for the run's page
        assert (ours.panel_def_id, ours.field_settings) == (own["panelDefId"], own["fieldSettings"])
        asked, queried = (
            [*query["userQuery"]["queryFields"][0]["fields"]] for query in (dumped(panel), own)
        )
        keys = [
            [each["args"] for each in fields if each["name"] == "summaryTable"]
            for fields in (asked, queried)
        ]
        assert keys[0][0][0]["value"] == keys[1][0][0]["value"]


def test_a_report_of_a_sweep_has_its_runs_only():
    report = wandb_report.build("them", "steps", "2026-01-01/many", ["psnr"])
    sets = [
        runs for block in report.blocks if isinstance(block, wr.PanelGrid) for runs in block.runsets
    ]
    assert {(runs.entity, runs.project, runs.filters) for runs in sets} == {
        ("them", "steps", "Metric(\"Group\") == '2026-01-01/many'")
    }
    assert all(panel._to_model() for panel in panels(report))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["them/steps"],
            r"cannot be saved to them/steps: nobody is logged in\n.*wandb login.*task=report sweep=FOLDER",
        ),
        (["steps"], "2"),
        (["them/steps/more"], "2"),
    ],
)
def test_without_a_login_it_says_what_to_do(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("wandb.login", lambda **_: False)
    with pytest.raises(SystemExit, match=message):
        wandb_report.main(arguments)
    if message == "2":
        assert "ENTITY/PROJECT is wanted" in capsys.readouterr().err


def test_without_its_package_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(SystemExit, match=r"pip install 'oss_exp\[wandb-report\]'"):
        wandb_report.main(["them/steps"])
