"""The task `convert` renames the tensors of a checkpoint, and records where they are from."""

import hashlib
import json

import pytest
import safetensors.torch
import torch
from helpers import run_cli
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from oss_exp.models.checkpoints.weights import digest, read
from oss_exp.tasks.border import build
from oss_exp.tasks.convert import Convert


class Plain(nn.Module):
    """A network of two layers, which public files call `net.0` and `net.1`."""

    FILES = ("public.pt",)

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Linear(1, width)
        self.second = nn.Linear(width, 1)
        self.register_buffer("table", torch.arange(3))

    def translate(self, tensors):
        return renamed(tensors, {"net.0.": "first.", "net.1.": "second."})


class Tiny(Plain):
    """The same network, which can also be written in the public layout."""

    def to_public(self, layout):
        if layout != "public":
            raise ValueError(f"layout must be one of own, public, got {layout!r}")
        return renamed(self.state_dict(), {"first.": "net.0.", "second.": "net.1."})


def renamed(tensors, prefixes: dict[str, str]) -> dict[str, torch.Tensor]:
    """Return tensors with these prefixes of their names replaced."""
    result = {}
    for name, tensor in tensors.items():
        for old, new in prefixes.items():
            name = name.replace(old, new)
        result[name] = tensor
    return result


def config(tmp_path, checkpoint="random", layout="own", kind=Tiny, **more):
    """Return the configuration of a conversion to out/tiny.safetensors."""
    size = {
        "backbone": {"_target_": f"{__name__}.{kind.__name__}", "_partial_": True, "width": 4},
        "decoder": {"_target_": "oss_exp.Pixels", "_partial_": True},
        "event_shape": [1],
        "num_classes": None,
        "checkpoint": str(checkpoint),
    }
    form = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0, "time_scale": 1000.0}
    model = {
        "_target_": "oss_exp.Published",
        "name": "two_layers",
        "size": "tiny",
        "sizes": {"tiny": size},
        "parameterization": {"_target_": "oss_exp.EDMPrediction", **form},
        "guidance": {"_target_": "oss_exp.Guidance"},
        "micro_batch": 2,
        "dtype": "bfloat16",
        "checkpoint": None,
        "source": "https://example.org",
    }
    task = {"layout": layout, "output": str(tmp_path / "out" / "tiny.safetensors"), **more}
    return OmegaConf.create({"model": model, "task": task})


def convert(cfg):
    """Run the task of a configuration."""
    build({"_target_": "oss_exp.Convert", **cfg.task}, "task", Convert)(cfg)


@pytest.fixture
def public(tmp_path):
    """The path of a public checkpoint."""
    network = Tiny(4)
    path = tmp_path / "public.pt"
    torch.save({"ema": network.to_public("public"), "model": {}}, path)
    return path


def test_a_public_checkpoint_becomes_one_of_our_names(public, tmp_path, capsys):
    cfg = config(tmp_path, public)
    output = tmp_path / "out" / "tiny.safetensors"
    convert(cfg)

    expected = Tiny(4).translate(read(public))
    assert capsys.readouterr().out == f"{output}: 5 tensors, 13 parameters\n"
    assert digest(read(output)) == digest(expected)  # float32, though the model runs in bfloat16

    before = instantiate(cfg.model)
    after = instantiate(cfg.model, checkpoint=str(output))
    assert before.fingerprint == after.fingerprint
    assert digest(before.backbone.state_dict()) == digest(after.backbone.state_dict())


def test_the_record_of_a_conversion_names_its_source(public, tmp_path):
    cfg = config(tmp_path, public)
    convert(cfg)

    record = json.loads((tmp_path / "out" / "tiny.json").read_text())
    sha256 = hashlib.sha256(public.read_bytes()).hexdigest()
    assert record["name"] == "two_layers_tiny"
    assert record["layout"] == "own"
    assert record["source"] == {"file": "public.pt", "sha256": sha256}
    assert record["weights_sha256"] == digest(Tiny(4).translate(read(public)))
    assert record["model"] == OmegaConf.to_container(cfg.model)


def test_there_and_back_through_the_public_layout(public, tmp_path):
    convert(config(tmp_path, public, layout="public"))
    output = tmp_path / "out" / "tiny.safetensors"
    assert digest(safetensors.torch.load_file(output)) == digest(read(public))
    assert json.loads(output.with_suffix(".json").read_text())["layout"] == "public"

    convert(config(tmp_path / "again", output))
    back = tmp_path / "again" / "out" / "tiny.safetensors"
    assert digest(read(back)) == digest(Tiny(4).translate(read(public)))


def test_random_weights_say_so(tmp_path):
    convert(config(tmp_path))
    record = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert record["source"] == {"file": "random", "sha256": None}


# ------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"layout": "theirs"}, "layout must be one of own, public, got 'theirs'"),
        (
            {"layout": "public", "kind": Plain},
            r"task\.layout must be own for model=two_layers_tiny",
        ),
        ({"output": "tiny.pt"}, r"task\.output must end in \.safetensors, got tiny\.pt"),
    ],
)
def test_wrong_settings_are_refused_and_write_nothing(more, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=match):
        convert(config(tmp_path, **more))
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_not_published_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_cli("task=convert", f"paths.output_dir={tmp_path}", f"hydra.run.dir={tmp_path}")
    error = capsys.readouterr().err
    assert "task=convert rewrites published checkpoints; oss_exp.GaussianMixture" in error
