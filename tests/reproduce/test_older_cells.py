"""Cells of earlier versions are found by what they computed, whatever their names; changed ones are not."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import run_cli
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from oss_exp.cli import CONF
from oss_exp.files import ASSETS
from oss_exp.names import GONE
from oss_exp.reproduce.cells import Cell, make
from oss_exp.reproduce.older_cells import PARENT
from oss_exp.reproduce.paper import Paper
from oss_exp.reproduce.plans import TABLES
from oss_exp.reproduce.values import psnr
from oss_exp.tasks.older_configs import canonical, changed

OLD = Path(__file__).parent / "version_0_1"
CONFIGURATIONS = json.loads((OLD / "configurations.json").read_text())
BASE = ["model=mixture_digits", "noise_schedule=ddim"]
BASE += ["data.search_samples=4", "data.eval_samples=4", "data.per_sample=4"]
SEARCH = [*BASE, "task=search", "stepsize=[oss,oss_ave]", "num_steps=[5]", "num_teacher_steps=20"]
EVALUATION = [*BASE, "task=evaluate", "num_teacher_steps=40", "num_steps=[5]"]
EVALUATION += [f"task.schedule={PARENT}/schedules/oss_ave_5.json"]


@pytest.fixture(autouse=True)
def composing():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the two real cells."""
    return Path(shutil.copytree(OLD / "cells", tmp_path / "cells"))


def evaluation(*more: str, search: tuple[str, ...] = ()) -> Cell:
    return Cell.of(*EVALUATION, *more, parent=Cell.of(*SEARCH, *search))


def test_real_cells_are_not_made_anew(root, monkeypatch):
    def run(*_):
        raise AssertionError("a run was started")

    monkeypatch.setattr("oss_exp.reproduce.cells._make", run)
    cell = evaluation()
    assert make([cell], root, jobs=1) == {}
    assert cell.folder(root).name == "f3024344025e87c6"
    assert cell.parent.folder(root).name == "d9954cc975e95b73"
    assert cell.key not in ("f3024344025e87c6", "d9954cc975e95b73")
    written = json.loads((root / "f3024344025e87c6" / "metrics.json").read_text())["rows"][0][
        "psnr"
    ]
    assert psnr("oss_ave", 5)(cell.folder(root)).interval.mean == written["mean"]


def test_what_no_result_depends_on_may_differ(root):
    for more in (
        ["trainer=ddp_spawn_cpu"],
        ["keep_calls=false"],
        ["offload_states=true"],
        ["paths.data_dir=elsewhere"],
    ):
        assert evaluation(*more).folder(root).name == "f3024344025e87c6"


@pytest.mark.slow
@pytest.mark.parametrize(
    "value",
    [
        "data.seed=1",
        "solver=heun",
        "noise_schedule.betas.end=0.03",
        "model.guidance.scale=2",
        "num_steps=[6]",
    ],
)
def test_another_value_is_another_cell(root, value):
    cell = evaluation(value)
    assert cell.folder(root).name == cell.key


def test_another_parent_is_another_cell(root):
    cell = evaluation(search=("num_teacher_steps=21",))
    assert cell.folder(root).name == cell.key
    assert cell.parent.folder(root).name == cell.parent.key


@pytest.mark.slow
def test_a_new_run_goes_on_from_an_older_one(root):
    cell = Cell.of(
        *EVALUATION, "num_teacher_steps=30", "evaluation.trajectories=0", parent=Cell.of(*SEARCH)
    )
    assert make([cell], root, jobs=1) == {}
    record = json.loads((root / cell.key / "cell.json").read_text())
    assert record["parent"] == "d9954cc975e95b73"
    assert record["files"] == cell.files
    assert set(record["files"]) >= {"mixture_digits.safetensors"}


def test_other_shipped_weights_make_another_cell(root, tmp_path, monkeypatch):
    assets = Path(shutil.copytree(ASSETS, tmp_path / "assets"))
    (assets / "mixture_digits.safetensors").write_bytes(b"other")
    monkeypatch.setattr("oss_exp.reproduce.older_cells.ASSETS", assets)
    cell = evaluation(
        "data.batch_size=64"
    )  # the default, so the same cell, but not one that was looked at before
    assert cell.folder(root).name == cell.key


@pytest.mark.slow
def test_an_older_run_goes_on_by_its_own_command(root, capsys):
    folder = root / "d9954cc975e95b73"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("schedules/*.json")}
    GlobalHydra.instance().clear()
    run_cli(*SEARCH, "logger=none", f"hydra.run.dir={folder}")
    assert {path: path.stat().st_mtime_ns for path in folder.glob("schedules/*.json")} == before
    with pytest.raises(SystemExit):
        run_cli(*SEARCH, "logger=none", "num_teacher_steps=21", f"hydra.run.dir={folder}")
    assert "holds a run with another num_teacher_steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "[1, 2]", "{paths: {}}", "a: [", "!!python/object/apply:os.abort []"]
)
def test_a_folder_that_cannot_be_read_is_no_cell(root, content):
    (root / "d9954cc975e95b73" / "config.yaml").write_text(content)
    assert evaluation().folder(root).name == evaluation().key


@pytest.mark.slow
def test_a_cell_of_this_version_is_found_under_any_name(root):
    """As it will be when a later version spells its configuration in another way."""
    cell = Cell.of(*SEARCH, "data.seed=7", "stepsize=oss_ave")
    assert make([cell], root, jobs=1) == {}
    made, moved = root / cell.key, root.parent / "moved" / "another_name"
    shutil.copytree(made, moved)
    assert cell.folder(moved.parent) == moved


def lacks_no_weights(config) -> bool:
    """A run whose extractor has no file (???) cannot have been made."""
    return "???" not in json.dumps(config.get("evaluation", {}).get("extractor"))


@pytest.mark.slow
@pytest.mark.parametrize("small", [True, False], ids=["small", "paper"])
def test_every_kind_of_cell_of_the_tables_is_found(tmp_path, small):
    """Their folders hold what they held then; the names prove that the configurations are those of then."""
    scale = "small" if small else "paper"
    old = [
        each
        for each in CONFIGURATIONS
        if each["scale"] == scale and lacks_no_weights(each["config"])
    ]
    old = [
        each for each in old if each["config"]["model"]["_target_"].rpartition(".")[2] not in GONE
    ]
    assert len(old) >= 8
    for each in old:
        folder, parent = tmp_path / each["name"], f"outputs/cells/{each['parent']}"
        folder.mkdir()
        places = {
            "OUTPUT": f"/home/user/outputs/cells/{each['name']}",
            "PARENT": parent,
            "DATA": "/data",
        }
        config = in_folders(
            {**each["config"], "paths": {"output_dir": "OUTPUT", "data_dir": "DATA"}}, places
        )
        if config["data"].get("classes") == "auto":
            config["data"]["classes"] = "all"  # settled by the run
        overrides = [text.replace("PARENT", parent) for text in each["overrides"]]
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "cell.json").write_text(
            json.dumps({"overrides": overrides, "packages": {"oss_exp": "0.1.0"}})
        )
    plans = {name: TABLES[name](Paper.load(name), small) for name in TABLES}
    cells = {
        member
        for plan in plans.values()
        for source in plan.sources
        if source
        for cell in source.cells
        for member in cell.lineage()
    }
    assert {each["name"] for each in old} <= {cell.folder(tmp_path).name for cell in cells}


def in_folders(value, places: dict[str, str]):
    if isinstance(value, dict):
        return {key: in_folders(inner, places) for key, inner in value.items()}
    if isinstance(value, list):
        return [in_folders(inner, places) for inner in value]
    if not isinstance(value, str):
        return value
    word, slash, rest = value.partition("/")
    return places.get(word, word) + slash + rest


def test_canonical_configurations():
    short = canonical(
        {"stepsize": {"a": {"_target_": "oss_exp.stepsize.OSSShared", "refine": True}}}
    )
    full = canonical(
        {"stepsize": {"a": {"_target_": "oss_exp.OSSShared", "refine": True, "max_order": None}}}
    )
    assert short == full
    assert changed(short, full) == []
    assert (
        changed({"a": 1, "gone": 2}, {"a": 1, "new": None}) == []
    )  # what is new and null is nothing
    assert changed({"a": 1}, {"a": 2, "new": 3}) == ["a", "new"]


def test_metrics_were_listed_by_name():
    old = {
        "evaluation": {
            "metrics": ["psnr", "fid"],
            "trajectories": 4,
            "fid": {"n": 1},
            "kid": {"n": 2},
        }
    }
    assert canonical(old) == {"evaluation": {"trajectories": 4}, "metric": {"fid": {"n": 1}}}
