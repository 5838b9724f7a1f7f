"""One job of a command: compose a configuration, run its task, and write the report.

The message and the full traceback of an error go to error.log in the run folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from oss_exp import report
from oss_exp.files import remove_unfinished, write_atomically
from oss_exp.tasks import border, preemption
from oss_exp.tasks.configuration import check_configuration, expand_home, list_num_steps
from oss_exp.tasks.overrides import CONF, explained, is_sweep, refuse_unread
from oss_exp.tasks.task import Task

USER_ERRORS = (
    ValueError,
    OSError,
    MisconfigurationException,
    HydraException,
    OmegaConfBaseException,
)

# What may start the processes of several machines, and says where these are.
LAUNCHERS = (SLURMEnvironment, TorchElasticEnvironment, LSFEnvironment, MPIEnvironment)

GOES_ON = "what was done is kept, and the same command with {} goes on"


def run_all(arguments: Sequence[str]) -> Exception | None:
    """Run all jobs of a command line, and return the error that the user's input causes, if any.

    Other errors are raised.
    """
    # With HYDRA_FULL_ERROR, Hydra raises errors, and does not print them in a form of its own.
    full_error = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"

    _set_rank()
    try:
        with preemption.watched():
            if is_sweep(arguments):  # its jobs may be in other processes
                given = [option for option in arguments if option.startswith("hydra.sweep.dir=")]
                newest = "hydra.sweep.dir=FOLDER (the newest below multirun/)"
                preemption.advise(GOES_ON.format([newest, *given][-1]))
                _check_launcher(arguments)
            run()
        return None
    except _Failed as failed:
        error = failed.__cause__
    except USER_ERRORS as refused:
        error = explained(refused, arguments, CONF)
    finally:
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
    if isinstance(error, USER_ERRORS):
        return error
    assert error is not None
    raise error


class _Failed(BaseException):
    """The failure of the only job of a command, with the error as its cause.

    It is no Exception, before which Hydra would print a line.
    """


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run(cfg: DictConfig) -> float | None:
    """Run one job, and return the mean PSNR of its schedules for sweepers that maximise it.

    The result is None where no schedule was measured.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    is_one_of_several = HydraConfig.get().mode is RunMode.MULTIRUN
    option = f"hydra.run.dir={folder}"
    if is_one_of_several:
        option = f"hydra.sweep.dir={HydraConfig.get().sweep.dir}"
    preemption.advise(GOES_ON.format(option))

    # Lock the folder. The system frees the lock, however the process ends.
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        rank_zero_only(lock.acquire)()
    except Timeout:
        raise ValueError(
            f"another process works in {folder}; wait for it, or choose another hydra.run.dir"
        ) from None

    # Remove what a killed run left.
    rank_zero_only(remove_unfinished)(folder)
    rank_zero_only((folder / "error.log").unlink)(missing_ok=True)

    # Run.
    try:
        if not (folder / ".hydra").exists():
            _write_command(cfg, folder)
        _run(cfg, folder)
        _write_command(cfg, folder)  # only now: a refused command did not make this folder

        return report.mean_psnr(folder)
    except Exception as error:
        log = f"{error}\n\n{traceback.format_exc()}"
        with contextlib.suppress(OSError):  # with a full disk, the error is printed all the same
            rank_zero_only(write_atomically)(folder / "error.log", log)
        if is_one_of_several:  # Hydra prints which job it was, and the other jobs go on
            raise
        raise _Failed from error
    finally:
        lock.release()


@rank_zero_only
def _write_command(cfg: DictConfig, folder: Path) -> None:
    """Write Hydra's files in .hydra: both configurations, of the run and Hydra, and overrides."""
    hydra_cfg: Any = HydraConfig.instance().cfg
    parts = {
        "config": cfg,
        "hydra": OmegaConf.masked_copy(hydra_cfg, "hydra"),
        "overrides": hydra_cfg.hydra.overrides.task,
    }
    for name, part in parts.items():
        write_atomically(folder / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(part))


def _run(cfg: DictConfig, folder: Path) -> None:
    """Check the configuration, run its task, and write and log the report."""
    # Checks.
    refuse_unread(cfg, CONF)
    expand_home(cfg)
    list_num_steps(cfg)
    if SLURMEnvironment.detect() and (states := sorted(folder.glob("hpc_ckpt_*"))):
        raise ValueError(
            f"{states[0]} is not of this program, and Lightning would load it; remove it"
        )
    check_configuration(cfg)
    _check_sweep(cfg)
    _check_machines(cfg)

    # Task. One that logs while it runs returns its logger.
    logger = border.build(cfg.task, "task", Task)(cfg)

    # Report.
    if rank_zero_only.rank == 0:  # pyright: ignore[reportFunctionMemberAccess]  # Lightning sets it
        report.write(folder)
        if (logger := logger or border.build(cfg.logger, "logger", Logger | None)) is not None:
            report.log_run(logger, cfg, folder)


def _check_launcher(arguments: Sequence[str]) -> None:
    """Refuse SLURM's launcher on a machine without SLURM, before submitit does by a traceback."""
    if "hydra/launcher=submitit_slurm" in arguments and shutil.which("srun") is None:
        raise ValueError(
            "hydra/launcher=submitit_slurm needs SLURM's `srun`, which is not found here; start "
            "the sweep from a login node of the cluster"
        )


def _check_sweep(cfg: DictConfig) -> None:
    """Refuse a sweep whose jobs would start processes that start the sweep again.

    SLURM starts all processes of a job itself.
    """
    settings = cfg.get("trainer") or {}
    devices = settings.get("devices", 1)
    one_process = str(devices) == "1" and settings.get("num_nodes", 1) == 1
    is_one_of_several = HydraConfig.get().mode is RunMode.MULTIRUN

    if is_one_of_several and not one_process and not SLURMEnvironment.detect():
        raise ValueError(
            f"--multirun with trainer.devices={devices}: every process would start the sweep "
            "again; sweep with one device per job (trainer=cpu or trainer=gpu) and use several "
            "devices in single runs, or let SLURM start the processes "
            "(hydra/launcher=submitit_slurm)"
        )


def _check_machines(cfg: DictConfig) -> None:
    """Refuse several machines that cannot find each other: Lightning would wait for them."""
    count = (cfg.get("trainer") or {}).get("num_nodes", 1)
    if count <= 1 or "MASTER_ADDR" in os.environ:
        return
    if not any(launcher.detect() for launcher in LAUNCHERS):
        raise ValueError(
            f"trainer.num_nodes={count}, and nothing says where the other machines are: start "
            "the command on each of them by torchrun, or by SLURM (docs/scaling.md)"
        )


def _set_rank() -> None:
    """Keep the first process of every further machine from taking itself for rank 0.

    Lightning counts the processes of one machine until a trainer is built.
    """
    launched = any(name in os.environ for name in ("RANK", "SLURM_PROCID"))
    if not launched and int(os.environ.get("NODE_RANK", 0)) > 0:
        rank = max(1, rank_zero_only.rank)  # pyright: ignore[reportFunctionMemberAccess]
        rank_zero_only.rank = rank  # pyright: ignore[reportFunctionMemberAccess]
