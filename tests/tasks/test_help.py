"""What `--help` and `doctor` print."""

import re

import pytest
import torch
from omegaconf import OmegaConf

import oss_exp
from oss_exp.cli import CONF
from oss_exp.tasks import doctor
from oss_exp.tasks.help import help_text

OPTIONS = sorted(
    (file.parent.name, file.stem) for file in CONF.glob("*/*.yaml") if file.parent.name != "hydra"
)


def leaves(node, prefix=""):
    """Yield the keys of a configuration that have values, `_target_` and the like left out."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        elif not str(key).startswith("_"):
            yield f"{prefix}{key}"


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=map("=".join, OPTIONS))
def test_an_option_s_help_has_every_value_of_its_file(group, option):
    text = help_text([f"{group}={option}", "--help"], CONF)
    file = OmegaConf.load(CONF / group / f"{option}.yaml")
    keys = [key for key in file if key not in ("defaults", "hydra")]
    for key in leaves(OmegaConf.to_container(OmegaConf.masked_copy(file, keys))):
        name = key.split(".")[-1]
        assert re.search(rf"\b{re.escape(name)}\b", text), key


def test_the_help_fits_a_screen():
    lines = help_text(["--help"], CONF).splitlines()
    assert len(lines) <= 36
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("  oss-exp ") for line in lines[:8]) == 5


def test_a_group_s_help_lists_its_options():
    text = help_text(["stepsize", "-h"], CONF)
    assert {file.stem for file in (CONF / "stepsize").glob("*.yaml")} <= set(text.split())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("stepsizes", "there is no group stepsizes; choose from .*stepsize"),
        ("task=certfy", r"did you mean certify( or \w+)*\? Choose from .*certify"),
        ("stepsize=[oss,oss_ave]", r"stepsize=\[oss,oss_ave\] is not one option"),
    ],
)
def test_help_on_what_does_not_exist_lists_what_does(argument, message):
    with pytest.raises(ValueError, match=message):
        help_text([argument, "--help"], CONF)


def test_other_commands_get_no_help():
    assert help_text(["task=search", "--hydra-help"], CONF) is None


def test_doctor_says_what_is_there_and_what_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("OSS_EXP_DATA", str(tmp_path / "absent"))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setitem(doctor.OPTIONAL, "no-such-package", ("nothing", "pip install it"))
    doctor.report()
    printed = capsys.readouterr().out
    assert oss_exp.__version__ in printed
    assert torch.__version__.split("+")[0] in printed
    assert re.search(r"absent \(set by OSS_EXP_DATA\) +not there", printed)
    assert re.search(r"no-such-package +not installed; pip install it +nothing", printed)


def test_doctor_sends_an_apple_gpu_to_the_cpu(capsys, monkeypatch):
    """Searches have float64 grids on the device, which MPS refuses."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    doctor.report()
    printed = capsys.readouterr().out
    assert re.search(r"mps +Apple GPU +not supported, it has no float64; use trainer=cpu", printed)
    assert "trainer=gpu" not in printed
