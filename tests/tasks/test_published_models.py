"""Every published model through the whole job at its tiny size, and schedules that its own sampler understands."""

import json

import pytest
import torch
from helpers import run_cli
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from oss_exp.cli import CONF
from oss_exp.schedule import StepSchedule

CLOCKS = {
    "edm_imagenet64": "sigma",
    "edm_ffhq64": "sigma",
    "edm_afhqv2_64": "sigma",
    "edm_cifar10_cond": "sigma",
    "edm_cifar10_uncond": "sigma",
    "edm_bedroom256": "sigma",
    "dit_xl_2_256": "DDPM index",
    "dit_xl_2_512": "DDPM index",
    "sit_xl_2_256": "flow time",
    "mar_base": "DDPM index",
    "mar_large": "DDPM index",
    "mar_huge": "DDPM index",
    "open_sora_1_2": "flow time",
}
INHERITED = {
    "dit_xl_2_256",
    "dit_xl_2_512",
    "mar_large",
    "mar_huge",
}  # their size from another yaml
SCHEDULES = {  # of each family, by how its names begin
    "edm": "edm",
    "dit": "ddim",
    "sit": "fm",
    "mar": "cosine",
    "open_sora": "open_sora",
}
EVERY = ["ddim_analytic", "oss", "oss_ave", "oss_shared", "oss_fit"]
FIRST = {"edm_imagenet64", "dit_xl_2_256", "mar_base", "open_sora_1_2"}


def test_none_is_forgotten():
    sized = {
        file.stem for file in (CONF / "model").glob("*.yaml") if "\n  tiny:\n" in file.read_text()
    }
    assert sized | INHERITED == set(CLOCKS)


@pytest.mark.slow
@pytest.mark.parametrize("model", CLOCKS)
def test_compare_at_tiny_size(model, tmp_path, monkeypatch):
    monkeypatch.setenv("OSS_EXP_CACHE", str(tmp_path / "cache"))
    native = next(schedule for name, schedule in SCHEDULES.items() if model.startswith(name))
    strategies = EVERY if model in FIRST else ["ddim_analytic", "oss_ave"]
    run_cli(
        f"model={model}",
        "scale=tiny",
        *(["data=prompts"] if model == "open_sora_1_2" else []),
        f"noise_schedule={native}",
        f"stepsize=[{','.join(strategies)}]",
        "num_teacher_steps=10",
        "stepsize.ddim_analytic.schedule=${noise_schedule}",
        "logger=none",
        "trainer.enable_progress_bar=false",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
    assert len(rows) == 2 * len(strategies)
    assert (tmp_path / "run" / "trajectories.npz").exists() != model.startswith("mar"), (
        "its loop is its own"
    )
    with initialize_config_dir(str(CONF), version_base="1.3"):
        path = instantiate(compose("config", [f"model={model}", "model.size=tiny"]).model).path
    for row in rows:
        steps = StepSchedule.load(tmp_path / "run" / row["schedule"])
        listed = steps.about("native")
        assert listed["clock"] == CLOCKS[model]
        tau = torch.tensor(listed["times"], dtype=torch.float64)
        torch.testing.assert_close(path.canonical(tau), steps.times, rtol=1e-9, atol=1e-12)
