"""Every published model through the whole job at its tiny size, with times in its native clock."""

import pytest
import torch
from helpers import metrics_of, run_cli
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
INHERITED = {"dit_xl_2_256", "dit_xl_2_512", "mar_large", "mar_huge"}  # size from another file
SCHEDULES = {  # of each family, by how its names begin
    "edm": "edm",
    "dit": "ddim",
    "sit": "fm",
    "mar": "cosine",
    "open_sora": "open_sora",
}
EVERY = ["ddim_analytic", "oss", "oss_ave", "oss_shared", "oss_fit"]
FIRST = {"edm_imagenet64", "dit_xl_2_256", "mar_base", "open_sora_1_2"}


def test_every_model_with_a_tiny_size_is_listed():
    sized = {
        file.stem for file in (CONF / "model").glob("*.yaml") if "\n  tiny:\n" in file.read_text()
    }
    assert sized | INHERITED == set(CLOCKS)


def compare(model: str, folder) -> list[dict]:
    """Compare schedules on the tiny size of a model; return the rows of the measurements."""
    native = next(schedule for name, schedule in SCHEDULES.items() if model.startswith(name))
    strategies = EVERY if model in FIRST else ["ddim_analytic", "oss_ave"]
    data = ["data=prompts"] if model == "open_sora_1_2" else []
    run_cli(
        f"model={model}",
        "scale=tiny",
        *data,
        f"noise_schedule={native}",
        f"stepsize=[{','.join(strategies)}]",
        "num_teacher_steps=10",
        "stepsize.ddim_analytic.schedule=${noise_schedule}",
        "logger=none",
        "trainer.enable_progress_bar=false",
        f"hydra.run.dir={folder}",
    )
    rows = metrics_of(folder)["rows"]
    assert len(rows) == 2 * len(strategies)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("model", CLOCKS)
def test_a_comparison_lists_times_in_the_clock_of_the_model(model, tmp_path, monkeypatch):
    monkeypatch.setenv("OSS_EXP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    rows = compare(model, folder)

    # A loop of the model's own has no trajectories.
    assert (folder / "trajectories.npz").exists() != model.startswith("mar")

    with initialize_config_dir(str(CONF), version_base="1.3"):
        path = instantiate(compose("config", [f"model={model}", "model.size=tiny"]).model).path
    for row in rows:
        steps = StepSchedule.load(folder / row["schedule"])
        native = steps.about("native")
        tau = torch.tensor(native["times"], dtype=torch.float64)
        assert native["clock"] == CLOCKS[model]
        torch.testing.assert_close(path.canonical(tau), steps.times, rtol=1e-9, atol=1e-12)
