"""Logging of finished runs to dashboards, through Lightning's loggers."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.types import RunMode
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from oss_exp.evaluation.comparison import Line, columns, with_gains
from oss_exp.files import inside
from oss_exp.report.results import cost_lines, metric_lines, read_run, read_schedules

WAIT = 15  # seconds for W&B's server to answer

# Keys under which W&B gets the table, the curves of the search and the pictures.
TABLE = "comparison"
COSTS = "cost per round"
PICTURES = ("schedules", "samples")


class Dashboard(WandbLogger):
    """A W&B logger that continues offline without a server or a login."""

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
    """Return a logger whose W&B run is named after its folder; it is offline without a login.

    Args:
        output_dir: The run folder.
        project: The W&B project.
        mode: Hydra's mode; the jobs of a multirun share a group.
    """
    import wandb

    # Names.
    folder = Path(output_dir)
    sweep = mode is RunMode.MULTIRUN
    group = "/".join(folder.parent.parts[-2:]) if sweep else None
    name = "/".join(folder.parts[-3:] if sweep else folder.parts[-2:])

    # Access. WandbLogger(offline=True) would set "dryrun", which W&B does not accept any more.
    access = os.environ.get("WANDB_MODE", "online")
    if "WANDB_MODE" not in os.environ and not _is_logged_in(folder):
        access = "offline"

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
    """Print that a dashboard is out of reach, and the command that uploads the run later."""
    reason = " ".join(str(error).split())[:200]
    print(
        f"oss-exp: W&B cannot be reached or knows nobody here ({reason}); logged offline. "
        "To upload it later: wandb login; "
        f"wandb sync {shlex.quote(str(folder))}/wandb/offline-run-*",
        file=sys.stderr,
    )


def log_run(logger: Logger, cfg: DictConfig, folder: Path) -> None:
    """Log a run folder and close the logger.

    Every job of a sweep gets a W&B run of its own, also where many jobs share a
    process. What a dashboard cannot take becomes a warning, since the results are on
    disk.
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
    """Log the configuration and every schedule's PSNR, gain and spread.

    W&B also gets the schedules as an artifact, curves of every metric against K and of
    the costs of the search, the table and the pictures.
    """
    # Configuration.
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    logger.log_hyperparams({str(key): value for key, value in settings.items()})

    # Training and calibration, and the schedules.
    if isinstance(logger, WandbLogger):
        for name in ("amplitude", "training", "stages"):
            if (folder / f"{name}.png").exists():
                logger.log_image(name, [str(folder / f"{name}.png")])
        if (folder / "schedules").is_dir():
            _log_schedules(logger, folder)

    # Measurements.
    if not (folder / "metrics.json").exists():
        return
    lines = with_gains(read_run(folder))
    logger.log_metrics(_metrics(lines))
    if isinstance(logger, WandbLogger):
        _log_comparison(logger, folder, lines)


def _metrics(lines: Sequence[Line]) -> dict[str, float]:
    """Return all numbers of a comparison as {metric/strategy/K: value}."""
    metrics = {}
    for line in lines:
        result = line.result
        key = f"{result.strategy}/K{result.num_steps}"
        metrics[f"psnr/{key}"] = result.psnr.mean
        metrics[f"spread/{key}"] = result.spread.mean
        for name, value in result.metrics.items():
            metrics[f"{name}/{key}"] = value
        if line.gain is not None:
            metrics[f"gain/{key}"] = line.gain.mean
    return metrics


def _log_schedules(logger: WandbLogger, folder: Path) -> None:
    """Log schedules as an artifact, and the costs of their search as curves."""
    logger.experiment.log_artifact(_artifact(folder))
    costs = cost_lines(read_schedules(folder))
    if costs:
        curves = {f"{name} K={k}": values for (name, k), values in costs.items()}
        chart = _chart(curves, "cost per round of the dynamic program", "round")
        logger.experiment.log({COSTS: chart})


def _log_comparison(logger: WandbLogger, folder: Path, lines: Sequence[Line]) -> None:
    """Log the table, the curves of all metrics and the pictures."""
    header, rows = columns(lines)
    logger.log_table(TABLE, columns=header, data=rows)

    # Curves.
    charts = {}
    for metric, curves in metric_lines(lines).items():
        charts[against(metric)] = _chart(curves, against(metric), "K")
    logger.experiment.log(charts)

    # Pictures.
    for name in PICTURES:
        logger.log_image(name, [str(folder / f"{name}.png")])
    if (folder / "samples.gif").exists():
        logger.log_video("videos", [str(folder / "samples.gif")], format=["gif"])


def _artifact(folder: Path) -> Any:
    """Return a W&B artifact of a run's schedules, with their model and teacher as metadata."""
    import wandb

    # Metadata of the first schedule; all have the same.
    metadata = {}
    plans = read_schedules(folder)
    if plans:
        provenance = plans[0][1].provenance
        for key in ("model", "teacher", "solver", "distance"):
            metadata[key] = provenance.get(key)
    model = (metadata.get("model") or {}).get("name", "unknown")

    # Name, of the characters and the length that W&B accepts.
    name = re.sub(r"[^\w.-]+", "_", f"schedules-{model}", flags=re.ASCII)[:128]
    artifact = wandb.Artifact(name, type="step_schedules", metadata=metadata)
    for file in sorted((folder / "schedules").iterdir()):
        artifact.add_file(str(inside(folder, "schedules", file.name)), file.name)
    return artifact


def against(metric: str) -> str:
    """Return the key of a metric's curves."""
    return f"{metric} against K"


def _chart(curves: Mapping[str, Mapping[int, float]], title: str, xname: str) -> Any:
    """Return W&B's plot of curves {x: y} by name."""
    import wandb

    xs = [list(curve.keys()) for curve in curves.values()]
    ys = [list(curve.values()) for curve in curves.values()]
    return wandb.plot.line_series(xs, ys, list(curves), title, xname)
