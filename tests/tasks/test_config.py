"""Every file of every group of the configuration composes, and what it names can be built."""

import sys
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from helpers import mostly_slow
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from oss_exp.cli import CONF
from oss_exp.evaluation.metrics import ImageMetric
from oss_exp.export.base import Exporter
from oss_exp.tasks.border import build, class_of, parameters_of
from oss_exp.tasks.configuration import check_configuration
from oss_exp.tasks.evaluate import Metrics
from oss_exp.tasks.task import Task

GROUPS = sorted(path for path in CONF.iterdir() if path.is_dir())
OPTIONS = [
    (group.name, file.stem)
    for group in GROUPS
    if group.name not in ("experiment", "base")  # composed below, and by the tasks
    for file in sorted(group.glob("*.yaml"))
]
FIRST = dict(reversed(OPTIONS))  # an option of every group
QUICK = [*FIRST.items()][::2]
NEEDED = {  # settings without which an option does not compose
    ("task", "report"): ["sweep=x"],
    ("task", "export"): ["exporter=comfyui", "task.schedule=x"],
    ("task", "certify"): ["task.schedule=x"],
    ("task", "import_sigmas"): ["task.sigmas=x", "task.network=eps"],
    ("scale", "small"): ["task=reproduce"],
    ("scale", "paper"): ["task=reproduce"],
    ("scale", "tiny"): ["model=dit_xl_2_256"],
    ("model", "pipeline"): ["model.pipeline=x"],
}
PLACES = {"images": ["task=statistics"], "exporter": ["task=export", "task.schedule=x"]}


@pytest.fixture(autouse=True)
def composing(tmp_path, monkeypatch):
    """Hydra reads conf/, and what is built works in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def config(*overrides: str) -> DictConfig:
    """Compose the configuration of a command line."""
    cfg = compose("config", [*overrides, "paths.output_dir=out"], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    return cfg


def composed(group: str, option: str) -> DictConfig:
    """Compose and check the configuration of `oss-exp GROUP=OPTION`."""
    needed = [*PLACES.get(group, []), *NEEDED.get((group, option), [])]
    sign = "+" if group == "detector" else ""
    cfg = config(*needed, f"{sign}{group}={option}")
    cfg.hydra = {"run": cfg.hydra.run}  # a run's configuration has none
    check_configuration(cfg)
    return cfg


def options(*groups: str, but: Iterable[str] = ()):
    """Parametrise a test by the options of these groups; all but a few are slow."""
    pairs = [(group, name) for group, name in OPTIONS if group in groups and name not in but]
    return pytest.mark.parametrize(("group", "option"), mostly_slow(pairs, *QUICK))


def test_there_are_the_groups_that_the_design_names():
    expected = (
        "task exporter model noise_schedule solver distance stepsize data images metric trainer "
        "logger paths hydra"
    )
    assert {group.name for group in GROUPS} >= set(expected.split())


# ------------------------------------------------------------------------------------------------
# What an option builds
# ------------------------------------------------------------------------------------------------


@options("task")
def test_a_task_takes_by_default_what_its_yaml_says(group, option):
    task = composed(group, option).task
    kind = class_of(task, "task")
    written = OmegaConf.to_container(task)

    assert issubclass(kind, Task)
    assert {*task} == {"_target_", *parameters_of(kind).kinds}
    for field in fields(kind):
        value = written[field.name]
        if isinstance(value, str) and "${" in value:  # the value of another key
            assert field.default in (MISSING, task[field.name])
        elif field.default is not MISSING:
            assert value == field.default
        elif field.default_factory is not MISSING:
            default = build(value, "x") if "_target_" in value else value
            assert default == field.default_factory()


@options("stepsize")
def test_a_strategy_says_what_it_plans_and_costs(group, option):
    strategy = build(composed(group, option).stepsize[option], "stepsize")
    assert isinstance(strategy.per_sample, bool)
    assert isinstance(strategy.baseline, bool)
    assert strategy.network_calls(100, [5, 10]) >= 0


@options("model", but=["pipeline", "psdenoiser_21cm"])
def test_a_model_is_built_or_says_where_its_weights_are(group, option, tmp_path, monkeypatch):
    cfg = composed(group, option).model
    pipeline = "pipeline" in cfg
    published = not pipeline and "tiny" in cfg.get("sizes", ())

    if published:
        monkeypatch.setenv("OSS_EXP_CACHE", str(tmp_path))
        with pytest.raises((ValueError, OSError), match=r"absent.*https://"):
            build(cfg, "model", checkpoint=str(tmp_path / "absent"))
    if pipeline or published:
        assert build(cfg, "model", size="tiny").name == f"{option}_tiny"
    else:
        build(cfg, "model")


def test_a_model_without_its_package_is_refused(monkeypatch):  # with it: test_psdenoiser.py
    monkeypatch.setitem(sys.modules, "psdenoiser", None)
    with pytest.raises(ValueError, match="needs the package 21cmpsdenoiser"):
        build(composed("model", "psdenoiser_21cm").model, "model")


def test_a_pipeline_without_its_folder_is_refused():  # with one: test_pretrained.py
    with pytest.raises(FileNotFoundError, match="pipeline x is neither a folder"):
        build(composed("model", "pipeline").model, "model")


@pytest.mark.parametrize(
    ("option", "arguments"),
    [("noise", {"num_classes": 3, "classes": "all"}), ("prompts", {"num_classes": None})],
)
def test_data_has_samples_to_search_and_to_measure(option, arguments):
    data = build(composed("data", option).data, "data", event_shape=(2,), **arguments)
    assert len(data.predict_dataloader()) == 2


def test_conditions_without_their_file_are_refused():  # with one: test_conditions.py
    cfg = composed("data", "conditions").data
    with pytest.raises(FileNotFoundError, match=r"set data\.conditions to an \.npz file"):
        build(cfg, "data", event_shape=(2,), num_classes=None, conditions="nowhere.npz")


@options("images", but=["digits", "mixture_samples"])  # with files: tests/data
def test_images_without_their_files_are_refused(group, option):
    place = "file" if option.endswith("latents") else "root"
    with pytest.raises(FileNotFoundError, match="absent") as error:
        build(composed(group, option).images, "images", **{place: "absent"})
    assert "images" in str(error.value)


@options("exporter")
def test_an_exporter_takes_by_default_what_its_yaml_says(group, option):
    task = composed(group, option).task
    exporter = build(task.exporter, "task.exporter")
    assert isinstance(exporter, Exporter)
    assert exporter == type(exporter)()
    assert task.output == f"out/{option}.json"


@options("metric")
def test_a_metric_is_one(group, option):
    cfg = composed(group, option).metric[option]
    assert issubclass(class_of(cfg, "metric"), ImageMetric)


METRICS = "metric=[fid,kid,precision_recall,class_agreement]"


def test_every_metric_is_built_with_the_extractor_of_fashion_mnist():
    composed("evaluation", "fashion")
    cfg = config("evaluation=fashion", METRICS)
    assert len(Metrics(cfg.metric, cfg.evaluation, ["classes"])()) == 4


def test_metrics_without_the_weights_of_their_extractor_are_refused():  # with: tests/evaluation
    composed("evaluation", "inception")
    cfg = config("evaluation=inception", METRICS)
    with pytest.raises(ValueError, match=r"evaluation\.extractor\.weights is not set"):
        Metrics(cfg.metric, cfg.evaluation, ["classes"])


def test_a_distance_without_the_weights_of_its_extractor_is_refused():  # with: test_features.py
    cfg = composed("distance", "inception").distance
    cfg.extractor.weights = "w.pth"
    absent = r"distance\.extractor: Inception weights .* do not exist"
    with pytest.raises(FileNotFoundError, match=absent):
        build(cfg, "distance")


def test_a_detector_without_its_networks_is_refused(tmp_path):  # with: tests/geneval/test_coco.py
    cfg = composed("detector", "coco").detector
    absent = r"task\.detector\.detector=.*absent cannot be opened"
    with pytest.raises((ValueError, OSError), match=absent):
        build(cfg, "task.detector", detector=str(tmp_path / "absent"))


@pytest.mark.parametrize("option", ["small", "paper"])
def test_a_scale_is_that_of_the_tables(option):
    assert composed("scale", option).task.scale == option


def test_the_tiny_scale_is_the_size_of_the_model():
    assert composed("scale", "tiny").model.size == "tiny"


@pytest.mark.parametrize("option", ["gpu", "fsdp"])
def test_a_trainer_without_its_gpu_is_refused(option):
    cfg = composed("trainer", option).trainer
    if torch.cuda.is_available():
        build(cfg, "trainer")
        return
    with pytest.raises(ValueError, match=r"trainer: .*No supported gpu"):
        build(cfg, "trainer")


@pytest.mark.parametrize("group", ["paths", "hydra"])
def test_a_run_has_a_folder(group):
    assert composed(group, "default").hydra.run.dir


REFUSED = ["inception", "gpu", "fsdp", "coco"]  # above
FROM_FILES = {name for group, name in OPTIONS if group == "images"} - {"digits", "mixture_samples"}


@options(
    *("noise_schedule", "solver", "distance", "logger", "trainer", "images", "detector"),
    but=[*REFUSED, *FROM_FILES],
)
def test_every_other_option_is_built(group, option):
    build(composed(group, option)[group], group)


# ------------------------------------------------------------------------------------------------
# What the groups are together
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_experiment_composes():
    for file in sorted((CONF / "experiment").glob("*.yaml")):
        needed = {"table_7": ["data.prompts=x"]}.get(file.stem, [])
        cfg = config(f"experiment={file.stem}", *needed)
        cfg.hydra = {}
        check_configuration(cfg)
        assert config(f"experiment={file.stem}", "scale=tiny").num_steps == [2, 4]


def test_stepsize_takes_one_or_several():
    assert list(config("stepsize=edm").stepsize) == ["edm"]
    assert set(config("stepsize=[edm,oss_shared]").stepsize) == {"edm", "oss_shared"}
    assert list(config("task=search").stepsize) == ["oss_best"]
    assert list(config("task=search", "stepsize=oss_ave").stepsize) == ["oss_ave"]


SEARCHES = {
    "oss": {"start": "free", "refine": False, "chunk": 16, "max_order": None},
    "oss_ave": {
        "start": "free",
        "refine": False,
        "aggregate": "median",
        "chunk": 16,
        "max_order": None,
    },
    "oss_shared": {"start": "analytic", "refine": True, "objective": "log_mean", "max_order": None},
    "oss_fit": {
        "band": {"_target_": "oss_exp.Band", "stride": 8, "width": 1, "shifts": 0},
        "start": "analytic",
        "refine": True,
        "objective": "log_mean",
        "history": None,
        "ridge": 1e-6,
        "polish": 0,
    },
}


def test_searches_share_a_yaml_and_keep_their_own_options():
    cfg = config(f"stepsize=[{','.join(SEARCHES)}]")

    assert list(cfg.stepsize) == list(SEARCHES)
    for name, settings in SEARCHES.items():
        strategy = OmegaConf.to_container(cfg.stepsize[name], resolve=True)
        assert strategy.pop("_target_").lower() == f"oss_exp.{name.replace('_', '')}"
        assert strategy == {"band": None, "must_visit": None, "first_sigmas": None, **settings}


def test_metrics_are_chosen_as_strategies_are():
    assert config().metric == {}
    assert list(config("metric=fid").metric) == ["fid"]

    cfg = config("metric=[fid,kid]", "metric.fid.num_images=50", "experiment=table_2")
    assert list(cfg.metric) == ["fid", "kid"]
    assert cfg.metric.fid.num_images == 50


@pytest.mark.slow
def test_a_task_has_the_groups_that_it_reads_and_no_others():
    groups = {group.name for group in GROUPS} - {"task", "logger", "paths", "hydra"}
    planning = {"model", "noise_schedule", "solver", "distance", "stepsize", "data", "trainer"}
    expected = {
        "compare": {*planning, "evaluation", "metric"},
        "search": planning,
        "finetune": planning,
        "pretrain": {"model", "images", "trainer"},
        "statistics": {"images", "evaluation"},
        "fit_mixture": {"images"},
        "convert": {"model"},
        "import_sigmas": set(),
        "report": set(),
        "reproduce": set(),
    }

    for task, names in expected.items():
        cfg = config(f"task={task}", *(["sweep=x"] if task == "report" else []))
        assert groups & set(cfg) == names, task


def test_every_yaml_explains_itself():
    for path in Path(CONF).rglob("*.yaml"):
        assert "#" in path.read_text(), f"{path} has no comment"
