"""Every yaml of every group composes, and what it names is built."""

import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from helpers import mostly_slow
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from oss_exp.cli import CONF
from oss_exp.evaluation.metrics import ImageMetric
from oss_exp.export.base import Exporter
from oss_exp.tasks.border import build, class_of, parameters_of
from oss_exp.tasks.configuration import check_configuration
from oss_exp.tasks.evaluate import Metrics
from oss_exp.tasks.task import Task

GROUPS = sorted(path for path in CONF.iterdir() if path.is_dir())
TO_BE_TRAINED = {"video_fashion"}  # by task=pretrain; their weights are not shipped yet
OPTIONS = [
    (group.name, file.stem)
    for group in GROUPS
    if group.name not in ("experiment", "base")  # composed below, and by the tasks
    for file in sorted(group.glob("*.yaml"))
]
FIRST = dict(reversed(OPTIONS))  # an option of every group


@pytest.fixture(autouse=True)
def composing():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def config(*overrides: str):
    cfg = compose("config", [*overrides, "paths.output_dir=out"], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    return cfg


def test_there_are_the_groups_that_the_design_names():
    names = {group.name for group in GROUPS}
    expected = "task exporter model noise_schedule solver distance stepsize data images metric trainer logger paths"
    assert names >= {*expected.split(), "hydra"}


@pytest.mark.parametrize(("group", "option"), mostly_slow(OPTIONS, *[*FIRST.items()][::2]))
def test_option(group, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    # Options of most groups have a place in the main job.
    needed = {"images": ["task=statistics"], "exporter": ["task=export", "task.schedule=x"]}.get(
        group, []
    )
    needed += {
        "report": ["sweep=x"],
        "export": ["exporter=comfyui", "task.schedule=x"],
        "certify": ["task.schedule=x"],
        "import_sigmas": ["task.sigmas=x", "task.network=eps"],
        "small": ["task=reproduce"],
        "paper": ["task=reproduce"],
        "tiny": ["model=dit_xl_2_256"],
    }.get(option, [])
    chosen = f"{'+' if group == 'detector' else ''}{group}={option}"
    cfg = config(*needed, chosen, *(["model.pipeline=x"] if chosen == "model=pipeline" else []))
    cfg.hydra = {"run": cfg.hydra.run}  # a run's configuration has none
    check_configuration(cfg)
    if group == "task":
        check_task(cfg.task)
    elif group == "stepsize":
        strategy = build(cfg.stepsize[option], "stepsize")
        assert isinstance(strategy.per_sample, bool)
        assert isinstance(strategy.baseline, bool)
        assert strategy.network_calls(100, [5, 10]) >= 0
    elif (group, option) == ("data", "noise"):
        assert (
            len(
                build(
                    cfg.data, "data", event_shape=(2,), num_classes=3, classes="all"
                ).predict_dataloader()
            )
            == 2
        )
    elif (group, option) == ("data", "conditions"):  # with a file: test_conditions.py
        with pytest.raises(FileNotFoundError, match=r"set data\.conditions to an \.npz file"):
            build(cfg.data, "data", event_shape=(2,), num_classes=None, conditions="nowhere.npz")
    elif (group, option) == ("model", "psdenoiser_21cm"):  # with the package: test_psdenoiser.py
        monkeypatch.setitem(sys.modules, "psdenoiser", None)
        with pytest.raises(ValueError, match="needs the package 21cmpsdenoiser"):
            build(cfg.model, "model")
    elif (group, option) == ("model", "pipeline"):  # with a folder: test_pretrained.py
        with pytest.raises(FileNotFoundError, match="pipeline x is neither a folder"):
            build(cfg.model, "model")
    elif group == "model" and "pipeline" in cfg.model:
        assert build(cfg.model, "model", size="tiny").name == f"{option}_tiny"
    elif (group, option) == ("data", "prompts"):
        assert (
            len(build(cfg.data, "data", event_shape=(2,), num_classes=None).predict_dataloader())
            == 2
        )
    elif group == "model" and "tiny" in cfg.model.get("sizes", ()):
        monkeypatch.setenv("OSS_EXP_CACHE", str(tmp_path))
        with pytest.raises((ValueError, OSError), match=r"absent.*https://"):
            build(cfg.model, "model", checkpoint=str(tmp_path / "absent"))
        cfg.model.size = "tiny"
        assert build(cfg.model, "model").name == f"{option}_tiny"
    elif group == "model" and option in TO_BE_TRAINED:
        with pytest.raises(FileNotFoundError, match=f"{option}.safetensors is n"):
            build(cfg.model, "model")
        assert build(cfg.model, "model", checkpoint="untrained").name == option
    elif group == "detector" and option == "coco":  # with networks: test_coco_detector.py
        with pytest.raises(
            (ValueError, OSError), match=r"task\.detector\.detector=.*absent cannot be opened"
        ):
            build(cfg.detector, "task.detector", detector=str(tmp_path / "absent"))
    elif group == "scale" and option != "tiny":
        assert cfg.task.scale == option
    elif group == "scale":
        assert cfg.model.size == option
    elif group == "images" and option not in (
        "digits",
        "mixture_samples",
    ):  # with files: test_data.py, test_cifar10.py
        place = {"file" if option.endswith("latents") else "root": str(tmp_path / "absent")}
        with pytest.raises(FileNotFoundError, match=r"images.*absent"):
            build(cfg.images, "images", **place)
    elif group == "exporter":
        exporter = build(cfg.task.exporter, "task.exporter")
        assert isinstance(exporter, Exporter)
        assert exporter == type(exporter)()  # its defaults are the yaml's
        assert cfg.task.output == f"out/{option}.json"
    elif group == "metric":
        assert issubclass(class_of(cfg.metric[option], "metric"), ImageMetric)
    elif (group, option) in (
        ("trainer", "gpu"),
        ("trainer", "fsdp"),
    ) and not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"trainer: .*No supported gpu"):
            build(cfg.trainer, "trainer")
    elif (group, option) == ("distance", "inception"):  # with weights: test_features.py
        cfg.distance.extractor.weights = "w.pth"
        with pytest.raises(
            FileNotFoundError, match=r"distance\.extractor: Inception weights .* do not exist"
        ):
            build(cfg.distance, "distance")
    elif group == "evaluation":
        cfg = config(f"evaluation={option}", "metric=[fid,kid,precision_recall,class_agreement]")
        if option == "fashion":
            assert len(Metrics(cfg.metric, cfg.evaluation, ["classes"])()) == 4
        else:  # with weights: tests/evaluation
            with pytest.raises(ValueError, match=r"evaluation\.extractor\.weights is not set"):
                Metrics(cfg.metric, cfg.evaluation, ["classes"])
    elif group in ("paths", "hydra"):
        assert cfg.hydra.run.dir
    else:
        build(cfg[group], group)


def check_task(task):
    """What its yaml says without asking others is what the class takes by default."""
    kind = class_of(task, "task")
    assert issubclass(kind, Task)
    assert {*task} == {"_target_", *parameters_of(kind).kinds}
    written = OmegaConf.to_container(task)
    for option in fields(kind):
        value = written[option.name]
        if isinstance(value, str) and "${" in value:  # the value of another key
            assert option.default in (MISSING, task[option.name])
        elif option.default is not MISSING:
            assert value == option.default
        elif option.default_factory is not MISSING:
            made = build(value, "x") if "_target_" in value else value
            assert made == option.default_factory()


@pytest.mark.slow
def test_experiments_compose():
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


COMMON = {
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
        "start": "analytic",
        "refine": True,
        "objective": "log_mean",
        "history": None,
        "ridge": 1e-6,
        "polish": 0,
    },
}


def test_searches_share_a_yaml_and_keep_their_own_options():
    cfg = config(f"stepsize=[{','.join(COMMON)}]")
    assert list(cfg.stepsize) == list(COMMON)
    for name, options in COMMON.items():
        found = OmegaConf.to_container(cfg.stepsize[name], resolve=True)
        assert found.pop("_target_").lower() == f"oss_exp.{name.replace('_', '')}"
        band = (
            {"_target_": "oss_exp.Band", "stride": 8, "width": 1, "shifts": 0}
            if name == "oss_fit"
            else None
        )
        assert found == {"band": band, "must_visit": None, "first_sigmas": None, **options}


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
