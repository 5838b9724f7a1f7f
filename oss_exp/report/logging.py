"""Dashboards: what a finished run folder holds, sent to a Lightning logger."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.types import RunMode
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from oss_exp.evaluation.comparison import columns, with_gains
from oss_exp.files import inside
from oss_exp.report.results import cost_lines, metric_lines, read_run, read_schedules

WAIT = 15  # seconds for W&B's server to answer
TABLE, COSTS, PICTURES = (
    "comparison",
    "cost per round",
    ("schedules", "samples"),
)  # keys of what W&B is sent


class Dashboard(WandbLogger):
    """A W&B run that goes on offline where its server cannot be reached or knows nobody: it fails no program."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        import wandb

        try:
            return super().experiment
        except (wandb.Error, OSError) as error:
            if self._wandb_init["mode"] == "offline":
                raise
            _warn(self.save_dir, error)
            self._wandb_init["mode"] = "offline"
            return super().experiment


def wandb_logger(output_dir: str, project: str, mode: RunMode | None) -> WandbLogger:
    """A W&B run named after its folder; the jobs of a sweep share a group. Offline where nobody is logged in."""
    import wandb

    folder = Path(output_dir)
    sweep = mode is RunMode.MULTIRUN
    group = "/".join(folder.parent.parts[-2:]) if sweep else None
    name = "/".join(folder.parts[-3:] if sweep else folder.parts[-2:])
    access = os.environ.get("WANDB_MODE", "online")
    if "WANDB_MODE" not in os.environ and not _is_logged_in(folder):
        access = "offline"  # not WandbLogger(offline=True): it asks for "dryrun", which W&B no longer knows
    settings = wandb.Settings(silent=True, console="off", init_timeout=WAIT, finish_timeout=WAIT)
    return Dashboard(
        name=name, project=project, group=group, save_dir=output_dir, mode=access, settings=settings
    )


def _is_logged_in(folder: Path) -> bool:
    import wandb

    try:
        return wandb.login(prompt=False, timeout=WAIT)
    except (wandb.Error, OSError) as error:
        _warn(str(folder), error)
        return False


def _warn(folder: str | None, error: Exception) -> None:
    """Say that a dashboard is out of reach, and how what it misses is sent later."""
    reason = " ".join(str(error).split())[:200]
    print(
        f"oss-exp: W&B cannot be reached or knows nobody here ({reason}); logged offline. To upload it later: "
        f"wandb login; wandb sync {shlex.quote(str(folder))}/wandb/offline-run-*",
        file=sys.stderr,
    )


def log_run(logger: Logger, cfg: DictConfig, folder: Path) -> None:
    """Log the folder and close the logger, one W&B run per job also where a sweep runs many jobs in this process.

    What a dashboard cannot take is a warning: the results are on disk.
    """
    import wandb

    status = "failed"
    try:
        _log(logger, cfg, folder)
        status = "success"
    except (wandb.Error, OSError) as error:
        _warn(str(folder), error)
    finally:
        logger.finalize(status)
        if isinstance(logger, WandbLogger):
            wandb.finish(exit_code=int(status == "failed"))


def _log(logger: Logger, cfg: DictConfig, folder: Path) -> None:
    """The configuration, PSNR, gain and spread of every schedule; with W&B also the schedules themselves as an
    artifact, every metric against K as a curve a strategy, what the dynamic program's rounds cost, the table and the
    pictures.
    """
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    logger.log_hyperparams({str(key): value for key, value in settings.items()})
    for name in ("amplitude", "training", "stages"):
        if isinstance(logger, WandbLogger) and (folder / f"{name}.png").exists():
            logger.log_image(name, [str(folder / f"{name}.png")])
    if isinstance(logger, WandbLogger) and (folder / "schedules").is_dir():
        logger.experiment.log_artifact(_schedules(folder))
        if costs := cost_lines(read_schedules(folder)):
            curves = {f"{name} K={k}": values for (name, k), values in costs.items()}
            logger.experiment.log(
                {COSTS: _chart(curves, "cost per round of the dynamic program", "round")}
            )
    if not (folder / "metrics.json").exists():
        return
    lines = with_gains(read_run(folder))
    metrics = {}
    for line in lines:
        key = f"{line.result.strategy}/K{line.result.num_steps}"
        metrics[f"psnr/{key}"] = line.result.psnr.mean
        metrics[f"spread/{key}"] = line.result.spread.mean
        metrics |= {f"{name}/{key}": value for name, value in line.result.metrics.items()}
        if line.gain is not None:
            metrics[f"gain/{key}"] = line.gain.mean
    logger.log_metrics(metrics)
    if isinstance(logger, WandbLogger):
        header, cells = columns(lines)
        logger.log_table(TABLE, columns=header, data=cells)
        curves = metric_lines(lines)
        logger.experiment.log(
            {against(name): _chart(each, against(name), "K") for name, each in curves.items()}
        )
        for name in PICTURES:
            logger.log_image(name, [str(folder / f"{name}.png")])
        if (folder / "samples.gif").exists():
            logger.log_video("videos", [str(folder / "samples.gif")], format=["gif"])


def _schedules(folder: Path) -> Any:
    """A W&B artifact of all step schedules of a run, which says of which model and teacher they are."""
    import wandb

    plans = [plan for _, plan in read_schedules(folder)]
    about = (
        {key: plans[0].provenance.get(key) for key in ("model", "teacher", "solver", "distance")}
        if plans
        else {}
    )
    model = (about.get("model") or {}).get("name", "unknown")
    name = re.sub(r"[^\w.-]+", "_", f"schedules-{model}", flags=re.ASCII)[
        :128
    ]  # W&B takes no others
    artifact = wandb.Artifact(name, type="step_schedules", metadata=about)
    for file in sorted((folder / "schedules").iterdir()):
        artifact.add_file(str(inside(folder, "schedules", file.name)), file.name)
    return artifact


def against(metric: str) -> str:
    """The key of a metric's curves."""
    return f"{metric} against K"


def _chart(curves: Mapping[str, Mapping[int, float]], title: str, xname: str) -> Any:
    """W&B's plot of a line for each name, {x: y}."""
    import wandb

    xs, ys = (
        [list(getattr(curve, part)()) for curve in curves.values()] for part in ("keys", "values")
    )
    return wandb.plot.line_series(xs, ys, list(curves), title, xname)
