"""Every yaml of every group composes, and what it names is built."""

import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from omegaconf.errors import MissingMandatoryValue

from oss_exp.cli import CONF
from oss_exp.tasks.evaluate import Metrics

GROUPS = sorted(path for path in CONF.iterdir() if path.is_dir())
TO_BE_TRAINED = {"video_fashion"}  # by task=pretrain; their weights are not shipped yet
OPTIONS = [
    (group.name, file.stem) for group in GROUPS if group.name != "experiment" for file in sorted(group.glob("*.yaml"))
]


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
    expected = "task model noise_schedule solver distance stepsize data trainer logger paths hydra"
    assert names >= set(expected.split())


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option(group, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    added = "+" if group == "detector" else ""  # other groups have a place in every configuration
    cfg = config(f"{added}{group}={option}", *(["sweep=x"] if option == "report" else []))
    if group == "task":
        assert callable(get_method(cfg.task._target_))
    elif group == "stepsize":
        strategy = instantiate(cfg.stepsize[option])
        assert isinstance(strategy.per_sample, bool)
        assert isinstance(strategy.baseline, bool)
        assert strategy.network_calls(100, [5, 10]) >= 0
    elif (group, option) == ("data", "noise"):
        assert len(instantiate(cfg.data, event_shape=(2,), num_classes=3, classes="all").predict_dataloader()) == 2
    elif (group, option) == ("data", "conditions"):  # with a file: test_conditions.py
        with pytest.raises(InstantiationException, match=r"set data\.conditions to an \.npz file"):
            instantiate(cfg.data, event_shape=(2,), num_classes=None, conditions="nowhere.npz")
    elif (group, option) == ("model", "psdenoiser_21cm"):  # with the package: test_psdenoiser.py
        monkeypatch.setitem(sys.modules, "psdenoiser", None)
        with pytest.raises(InstantiationException, match="needs the package 21cmpsdenoiser"):
            instantiate(cfg.model)
    elif (group, option) == ("data", "prompts"):
        assert len(instantiate(cfg.data, event_shape=(2,), num_classes=None).predict_dataloader()) == 2
    elif group == "model" and "tiny" in cfg.model.get("sizes", ()):
        monkeypatch.setenv("OSS_EXP_CACHE", str(tmp_path))
        with pytest.raises(InstantiationException, match=r"absent.*https://"):
            instantiate(cfg.model, checkpoint=str(tmp_path / "absent"))
        assert instantiate(cfg.model, size="tiny").name == f"{option}_tiny"
    elif group == "model" and option in TO_BE_TRAINED:
        with pytest.raises(InstantiationException, match=f"{option}.safetensors is n"):
            instantiate(cfg.model)
        assert instantiate(cfg.model, checkpoint="untrained").name == option
    elif group == "detector" and option == "coco":  # with networks: test_coco_detector.py
        with pytest.raises(InstantiationException, match=r"task\.detector\.detector=.*absent cannot be opened"):
            instantiate(cfg.detector, detector=str(tmp_path / "absent"))
    elif group == "scale" and option != "tiny":
        assert config("task=reproduce", f"scale={option}").task.scale == option
    elif group == "scale":
        assert config("model=dit_xl_2_256", f"scale={option}").model.size == option
    elif group == "data" and option not in ("digits", "mixture_samples"):  # with files: test_data.py, test_cifar10.py
        place = {"file" if option == "cached_latents" else "root": str(tmp_path / "absent")}
        with pytest.raises(InstantiationException, match="absent"):
            instantiate(cfg.data, **place)
    elif (group, option) in (("trainer", "gpu"), ("trainer", "fsdp")) and not torch.cuda.is_available():
        with pytest.raises(InstantiationException, match="No supported gpu"):
            instantiate(cfg.trainer)
    elif (group, option) == ("distance", "inception"):  # with weights: test_features.py
        with pytest.raises(InstantiationException, match=r"Inception weights .* do not exist"):
            instantiate(cfg.distance, extractor={"weights": "w.pth"})
    elif group == "evaluation":
        cfg.evaluation.metrics = ["psnr", "fid", "kid", "precision_recall", "class_agreement"]
        if option == "fashion":
            assert len(Metrics(cfg.evaluation)()) == 4
        else:  # with weights: tests/evaluation
            with pytest.raises(MissingMandatoryValue, match="weights"):
                Metrics(cfg.evaluation)
    elif group in ("paths", "hydra"):
        assert cfg.hydra.run.dir
    else:
        instantiate(cfg[group])


def test_experiments_compose():
    for file in sorted((CONF / "experiment").glob("*.yaml")):
        config(f"experiment={file.stem}")
        assert config(f"experiment={file.stem}", "scale=tiny").num_steps == [2, 4]


def test_stepsize_takes_one_or_several():
    assert list(config("stepsize=edm").stepsize) == ["edm"]
    assert set(config("stepsize=[edm,oss_shared]").stepsize) == {"edm", "oss_shared"}
    assert list(config("task=search").stepsize) == ["oss_shared"]
    assert list(config("task=search", "stepsize=oss_ave").stepsize) == ["oss_ave"]


def test_every_yaml_explains_itself():
    for path in Path(CONF).rglob("*.yaml"):
        assert "#" in path.read_text(), f"{path} has no comment"
