"""Dashboards: what a finished run folder holds, sent to a Lightning logger."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from oss_exp.report.results import Line, compare, read_run, read_schedules
from oss_exp.report.table import columns


def wandb_logger(output_dir: str, project: str, mode: Any) -> WandbLogger:
    """A W&B run named after its folder; the jobs of a sweep share a group. Offline where nobody is logged in."""
    import wandb

    folder = Path(output_dir)
    sweep = str(mode).endswith("MULTIRUN")
    group = "/".join(folder.parent.parts[-2:]) if sweep else None
    name = "/".join(folder.parts[-3:] if sweep else folder.parts[-2:])
    if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False):
        access = "offline"  # not WandbLogger(offline=True): it asks for "dryrun", which W&B no longer knows
    else:
        access = os.environ.get("WANDB_MODE", "online")
    settings = wandb.Settings(silent=True, console="off")
    return WandbLogger(name=name, project=project, group=group, save_dir=output_dir, mode=access, settings=settings)


def log_run(logger: Logger, cfg: DictConfig, folder: Path) -> None:
    """Log the folder and close the logger, one W&B run per job also where a sweep runs many jobs in this process."""
    status = "failed"
    try:
        _log(logger, cfg, folder)
        status = "success"
    finally:
        logger.finalize(status)
        if isinstance(logger, WandbLogger):
            import wandb

            wandb.finish(exit_code=int(status == "failed"))


def _log(logger: Logger, cfg: DictConfig, folder: Path) -> None:
    """The configuration, PSNR, gain and spread of every schedule; with W&B also the schedules themselves as an
    artifact, every metric against K as a curve a strategy, the table and the pictures.
    """
    logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    for name in ("amplitude", "training", "stages"):
        if isinstance(logger, WandbLogger) and (folder / f"{name}.png").exists():
            logger.log_image(name, [str(folder / f"{name}.png")])
    if isinstance(logger, WandbLogger) and (folder / "schedules").is_dir():
        logger.experiment.log_artifact(_schedules(folder))
    if not (folder / "metrics.json").exists():
        return
    lines = compare(read_run(folder))
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
        logger.log_table("comparison", columns=header, data=cells)
        logger.experiment.log(_curves(lines))
        for name in ("schedules", "samples"):
            logger.log_image(name, [str(folder / f"{name}.png")])
        if (folder / "samples.gif").exists():
            logger.log_video("videos", [str(folder / "samples.gif")], format=["gif"])


def _schedules(folder: Path) -> Any:
    """A W&B artifact of all step schedules of a run, which says of which model and teacher they are."""
    import wandb

    plans = [plan for _, plan in read_schedules(folder)]
    about = {key: plans[0].provenance.get(key) for key in ("model", "teacher", "solver", "distance")} if plans else {}
    model = (about.get("model") or {}).get("name", "unknown")
    artifact = wandb.Artifact(f"schedules-{model}", type="step_schedules", metadata=about)
    for file in sorted((folder / "schedules").iterdir()):
        artifact.add_file(str(file))
    return artifact


def _curves(lines: Sequence[Line]) -> dict[str, Any]:
    """W&B's plots of PSNR and every other metric against the network calls K, a line a strategy."""
    import wandb

    names = list(dict.fromkeys(line.result.strategy for line in lines))
    found = {}
    for metric in ("psnr", *dict.fromkeys(name for line in lines for name in line.result.metrics)):
        points = {name: {} for name in names}
        for line in lines:
            value = line.result.psnr.mean if metric == "psnr" else line.result.metrics.get(metric)
            points[line.result.strategy][line.result.num_steps] = value
        xs, ys = ([list(getattr(points[name], part)()) for name in names] for part in ("keys", "values"))
        found[f"{metric} against K"] = wandb.plot.line_series(xs, ys, names, f"{metric} against K", "K")
    return found
