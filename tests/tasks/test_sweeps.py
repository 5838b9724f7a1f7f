"""Sweeps of Hydra: jobs side by side, and a search for the best value of a setting."""

import pytest
import yaml
from helpers import run_cli

RUN = [
    "--multirun",
    "model=mixture_digits",
    "num_teacher_steps=12",
    "data.eval_samples=4",
    "logger=none",
    "trainer.enable_progress_bar=false",
]


@pytest.mark.slow
def test_joblib_runs_the_jobs_of_a_sweep_side_by_side(tmp_path):
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    run_cli(*RUN, *launcher, "stepsize=edm", "num_steps=[2],[3]", f"hydra.sweep.dir={tmp_path}")
    assert len(list(tmp_path.glob("*/metrics.json"))) == 2


@pytest.mark.slow
def test_optuna_finds_the_setting_with_the_highest_psnr(tmp_path):
    sweeper = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.direction=maximize",
        "hydra.sweeper.n_trials=3",
    ]
    setting = "stepsize.karras.schedule.rho=interval(1,12)"
    run = [
        "stepsize=karras",
        "num_steps=[3]",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.sampler.seed=1",
    ]

    run_cli(*RUN, *sweeper, *run, setting, f"hydra.sweep.dir={tmp_path}")

    best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    records = [yaml.safe_load(file.read_text()) for file in tmp_path.glob("*/metrics.json")]
    psnrs = [record["rows"][0]["psnr"]["mean"] for record in records]
    assert len(psnrs) == 3
    assert best["best_value"] == max(psnrs) > min(psnrs)
    assert 1 <= best["best_params"]["stepsize.karras.schedule.rho"] <= 12


def test_submitit_composes_for_slurm(tmp_path):
    """Its jobs need a cluster, so the settings of the README are checked only."""
    from hydra import compose, initialize_config_dir

    from oss_exp.cli import CONF

    with initialize_config_dir(str(CONF), version_base="1.3"):
        slurm = [
            "hydra/launcher=submitit_slurm",
            "hydra.launcher.gpus_per_node=1",
            "hydra.launcher.timeout_min=120",
        ]
        cfg = compose("config", [*slurm, "hydra.launcher.partition=gpu"], return_hydra_config=True)
    assert "submitit" in cfg.hydra.launcher._target_
