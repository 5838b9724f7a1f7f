"""Cells of earlier versions are found by what they computed, whatever they are called."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import metrics_of, run_cli
from hydra.core.global_hydra import GlobalHydra

from oss_exp.files import ASSETS
from oss_exp.names import GONE
from oss_exp.reproduce.cells import Cell, make
from oss_exp.reproduce.older_cells import PARENT, shipped_files
from oss_exp.reproduce.paper import Paper
from oss_exp.reproduce.plans import TABLES
from oss_exp.reproduce.values import psnr
from oss_exp.tasks.older_configs import canonical, changed

pytestmark = pytest.mark.usefixtures("composing")
OLD = Path(__file__).parent / "version_0_1"
CONFIGURATIONS = json.loads((OLD / "configurations.json").read_text())
BASE = [
    "model=mixture_digits",
    "noise_schedule=ddim",
    "data.search_samples=4",
    "data.eval_samples=4",
    "data.per_sample=4",
]
SEARCH = [*BASE, "task=search", "stepsize=[oss,oss_ave]", "num_steps=[5]", "num_teacher_steps=20"]
EVALUATION = [
    *BASE,
    "task=evaluate",
    "num_teacher_steps=40",
    "num_steps=[5]",
    f"task.schedule={PARENT}/schedules/oss_ave_5.json",
]
SEARCHED = "d9954cc975e95b73"  # the folders of the two real cells
EVALUATED = "f3024344025e87c6"
SCENES = "scenes_pipeline"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the two real cells."""
    return Path(shutil.copytree(OLD / "cells", tmp_path / "cells"))


def evaluation(*more: str, search: tuple[str, ...] = ()) -> Cell:
    """Return the cell of the evaluation, and of the search that it starts from."""
    return Cell.of(*EVALUATION, *more, parent=Cell.of(*SEARCH, *search))


def test_real_cells_are_not_run_again(root, monkeypatch):
    def run(*_):
        raise AssertionError("a run was started")

    monkeypatch.setattr("oss_exp.reproduce.cells._make", run)
    cell = evaluation()

    assert make([cell], root, jobs=1) == {}
    assert cell.folder(root).name == EVALUATED
    assert cell.parent.folder(root).name == SEARCHED
    assert cell.key not in (EVALUATED, SEARCHED)
    metrics = metrics_of(root / EVALUATED)
    mean = metrics["rows"][0]["psnr"]["mean"]
    assert psnr("oss_ave", 5)(cell.folder(root)).interval.mean == mean


@pytest.mark.parametrize(
    "setting",
    [
        "trainer=ddp_spawn_cpu",
        "keep_calls=false",
        "offload_states=true",
        "paths.data_dir=elsewhere",
    ],
)
def test_a_setting_that_no_result_depends_on_may_differ(setting, root):
    assert evaluation(setting).folder(root).name == EVALUATED


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
    other = ["num_teacher_steps=30", "evaluation.trajectories=0"]
    cell = Cell.of(*EVALUATION, *other, parent=Cell.of(*SEARCH))

    assert make([cell], root, jobs=1) == {}

    record = json.loads((root / cell.key / "cell.json").read_text())
    assert record["parent"] == SEARCHED
    assert record["files"] == cell.files
    assert "mixture_digits.safetensors" in record["files"]


def test_shipped_files_are_found_in_folders_too():
    names = {"checkpoint": f"{SCENES}/vae/diffusion_pytorch_model.safetensors"}
    assert list(shipped_files(names)) == [names["checkpoint"]]

    parts = shipped_files({"folder": f"{SCENES}/text_encoder/", "other": ["no/such.json", ""]})
    assert sorted(parts) == [
        f"{SCENES}/text_encoder/config.json",
        f"{SCENES}/text_encoder/model.safetensors",
    ]

    outside = [f"{SCENES}/../", f"{SCENES}/../../", "./", "/", "x" * 300, f"{ASSETS}/"]
    assert shipped_files(outside) == {}


def test_other_shipped_weights_make_another_cell(root, tmp_path, monkeypatch):
    assets = Path(shutil.copytree(ASSETS, tmp_path / "assets"))
    (assets / "mixture_digits.safetensors").write_bytes(b"other")
    monkeypatch.setattr("oss_exp.reproduce.older_cells.ASSETS", assets)
    cell = evaluation("data.batch_size=64")  # the default, but nothing of this cell is cached
    assert cell.folder(root).name == cell.key


@pytest.mark.slow
def test_an_older_run_goes_on_by_its_own_command(root, capsys):
    folder = root / SEARCHED
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
    (root / SEARCHED / "config.yaml").write_text(content)
    assert evaluation().folder(root).name == evaluation().key


@pytest.mark.slow
def test_a_cell_of_this_version_is_found_under_any_name(root):
    """A later version may spell its configuration in another way."""
    cell = Cell.of(*SEARCH, "data.seed=7", "stepsize=oss_ave")
    assert make([cell], root, jobs=1) == {}
    moved = root.parent / "moved" / "another_name"
    shutil.copytree(root / cell.key, moved)
    assert cell.folder(moved.parent) == moved


def is_possible(config: dict) -> bool:
    """Say whether a run was possible then, with all its weights, and is now, with its model."""
    extractor = json.dumps(config.get("evaluation", {}).get("extractor"))
    model = config["model"]
    is_gone = model["_target_"].rpartition(".")[2] in GONE
    if model.get("name") == "flux_scenes":  # another network since then
        is_gone = True
    return "???" not in extractor and not is_gone


def write_cell(folder: Path, entry: dict) -> None:
    """Write the folder of a cell of version 0.1, as it was then."""
    parent = f"outputs/cells/{entry['parent']}"
    output = f"/home/user/outputs/cells/{entry['name']}"
    paths = {"output_dir": "OUTPUT", "data_dir": "DATA"}
    places = {"OUTPUT": output, "PARENT": parent, "DATA": "/data"}
    config = in_folders({**entry["config"], "paths": paths}, places)
    if config["data"].get("classes") == "auto":
        config["data"]["classes"] = "all"  # settled by the run
    overrides = [text.replace("PARENT", parent) for text in entry["overrides"]]
    record = {"overrides": overrides, "packages": {"oss_exp": "0.1.0"}}

    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "cell.json").write_text(json.dumps(record))


def cells_of_tables(small: bool) -> set[Cell]:
    """Return every cell of the tables, and those that they start from."""
    cells = set()
    for name, planner in TABLES.items():
        for source in planner(Paper.load(name), small).sources:
            for cell in source.cells if source else ():
                cells |= {*cell.lineage()}
    return cells


@pytest.mark.slow
@pytest.mark.parametrize("small", [True, False], ids=["small", "paper"])
def test_every_kind_of_cell_of_the_tables_is_found(tmp_path, small):
    scale = "small" if small else "paper"
    entries = [entry for entry in CONFIGURATIONS if entry["scale"] == scale]
    entries = [entry for entry in entries if is_possible(entry["config"])]
    assert len(entries) >= 8
    for entry in entries:
        write_cell(tmp_path / entry["name"], entry)

    folders = {cell.folder(tmp_path).name for cell in cells_of_tables(small)}

    assert {entry["name"] for entry in entries} <= folders


def in_folders(value, places: dict[str, str]):
    """Return a configuration whose paths begin with these places for their words."""
    if isinstance(value, dict):
        return {key: in_folders(inner, places) for key, inner in value.items()}
    if isinstance(value, list):
        return [in_folders(inner, places) for inner in value]
    if not isinstance(value, str):
        return value
    word, slash, remainder = value.partition("/")
    return places.get(word, word) + slash + remainder


def test_configurations_that_mean_the_same_are_equal():
    path = {"_target_": "oss_exp.stepsize.OSSShared", "refine": True}
    name = {"_target_": "oss_exp.OSSShared", "refine": True, "max_order": None}
    short = canonical({"stepsize": {"a": path}})
    full = canonical({"stepsize": {"a": name}})
    assert short == full
    assert changed(short, full) == []


def test_a_new_key_without_a_value_is_no_change():
    assert changed({"a": 1, "gone": 2}, {"a": 1, "new": None}) == []
    assert changed({"a": 1}, {"a": 2, "new": 3}) == ["a", "new"]


def test_metrics_that_were_listed_by_name_are_the_group_of_today():
    old = {
        "evaluation": {
            "metrics": ["psnr", "fid"],
            "trajectories": 4,
            "fid": {"n": 1},
            "kid": {"n": 2},
        }
    }
    assert canonical(old) == {"evaluation": {"trajectories": 4}, "metric": {"fid": {"n": 1}}}
