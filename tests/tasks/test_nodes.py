"""Runs on several machines, each a launcher here, give the schedules of one process."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import free_port, metrics_of, run_cli, start_process

from oss_exp.schedule import StepSchedule

ROOT = Path(__file__).parents[2]
NODES = 2  # machines
PROCESSES = 2  # of each machine
SMALL = [
    "model=mixture_fashion",
    "num_teacher_steps=40",
    "num_steps=[2,4]",
    "stepsize=[ddim,oss,oss_ave,oss_shared,oss_fit]",
    "data.classes=all",
    "data.search_samples=9",
    "data.per_sample=5",
    "data.eval_samples=9",
    "data.batch_size=2",
    "metric=[class_agreement,fid]",
    "logger=none",
    "trainer.enable_progress_bar=false",
]
TOGETHER = [
    "trainer=ddp",
    "trainer.accelerator=cpu",
    f"trainer.devices={PROCESSES}",
    f"trainer.num_nodes={NODES}",
]

SBATCH = """
import os, subprocess, sys

environment = {**os.environ, "SLURM_JOB_ID": "4242"}
log = open(sys.argv[1] + ".log", "w")
subprocess.Popen(["bash", sys.argv[1]], env=environment, stdout=log, stderr=log)
print("Submitted batch job 4242")
"""
SRUN = f"""
import os, subprocess, sys

words = enumerate(sys.argv[1:], 1)
first = next(i for i, word in words if not word.startswith("-") and "%" not in word)
tasks = []
for rank in range({NODES * PROCESSES}):
    numbers = {{
        "PROCID": rank,
        "LOCALID": rank % {PROCESSES},
        "NODEID": rank // {PROCESSES},
        "NTASKS": {NODES * PROCESSES},
        "NTASKS_PER_NODE": {PROCESSES},
        "NNODES": {NODES},
        "JOB_NAME": "oss-exp",
        "NODELIST": "127.0.0.1",
    }}
    slurm = {{f"SLURM_{{name}}": str(value) for name, value in numbers.items()}}
    tasks.append(subprocess.Popen(sys.argv[first:], env={{**os.environ, **slurm}}))
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The folder of the same run by one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run_cli(*SMALL, f"hydra.run.dir={folder}")
    return folder


def require_same(folder: Path, expected: Path) -> None:
    """Check that two runs have the same schedules and, up to rounding, the same measurements."""
    require_same_schedules(folder / "schedules", expected / "schedules")
    require_same_measurements(folder, expected)


def require_same_schedules(folder: Path, expected: Path) -> None:
    """Check that times and orders are equal to the bit.

    Fitted weights and means are not: they are sums of float32 outputs in another order.
    """
    names = sorted(path.name for path in expected.glob("*.json"))
    assert sorted(path.name for path in folder.glob("*.json")) == names
    for name in names:
        if name.endswith(".mean.json"):
            continue
        steps = StepSchedule.load(folder / name)
        other = StepSchedule.load(expected / name)
        record = json.loads((folder / name).read_text())
        other_record = json.loads((expected / name).read_text())
        assert record["times"] == other_record["times"], name
        assert record.get("samples") == other_record.get("samples"), name
        assert str(steps.orders) == str(other.orders), name


def require_same_measurements(folder: Path, expected: Path) -> None:
    """Check that metrics and pictures are equal up to rounding."""
    metrics = metrics_of(folder)
    others = metrics_of(expected)
    assert metrics["teacher_metrics"] == pytest.approx(others["teacher_metrics"], rel=1e-4)
    for row, other in zip(metrics["rows"], others["rows"], strict=True):
        assert row["psnr"] == pytest.approx(other["psnr"], abs=1e-3)
        assert row["per_image"]["index"] == other["per_image"]["index"]
        assert row["metrics"] == pytest.approx(other["metrics"], rel=1e-4)
    with (
        np.load(folder / "samples.npz") as pictures,
        np.load(expected / "samples.npz") as originals,
    ):
        for label, images in originals.items():
            assert np.abs(pictures[label].astype(float) - images).max() <= 1


class Machines:
    """The launchers (torchrun) of one command on all machines, with a working folder for each."""

    def __init__(self, place: Path, *arguments: str):
        self.place = place
        self.launchers = []
        port = free_port()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        for node in range(NODES):
            home = place / f"machine_{node}"
            home.mkdir(exist_ok=True)
            command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={NODES}"]
            command += [f"--nproc-per-node={PROCESSES}", f"--node-rank={node}"]
            command += ["--master-addr=127.0.0.1", f"--master-port={port}", "-m", "oss_exp"]
            with (home / "log.txt").open("w") as log:
                command += [*arguments, *TOGETHER]
                launcher = subprocess.Popen(
                    command, cwd=home, stdout=log, stderr=log, env=environment
                )
            self.launchers.append(launcher)

    def wait(self) -> list[int]:
        """Return the exit codes of all launchers."""
        return [launcher.wait() for launcher in self.launchers]

    def printed(self) -> str:
        """Return what all launchers printed."""
        logs = [self.place / f"machine_{node}" / "log.txt" for node in range(NODES)]
        return "\n".join(log.read_text() for log in logs)

    def process(self, rank: int) -> int:
        """Return the number of a rank's process."""
        for launcher in self.launchers:
            children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
            for child in children.split():
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in environment:
                    return int(child)
        raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
def test_two_machines_give_the_schedules_of_one_process(alone, tmp_path):
    # Nine images in batches of two: ranks repeat samples, and their last batches are uneven.
    folder = tmp_path / "shared"
    machines = Machines(tmp_path, *SMALL, f"hydra.run.dir={folder}")
    assert machines.wait() == [0, 0], machines.printed()
    require_same(folder, alone)
    assert (folder / "report.html").is_file()
    assert not list(folder.glob(".shared_*"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_rank_that_is_killed_goes_on_when_the_job_is_queued_again(alone, tmp_path):
    folder = tmp_path / "shared"
    machines = Machines(tmp_path, *SMALL, f"hydra.run.dir={folder}")
    last = NODES * PROCESSES - 1
    while not any(path.stat().st_size for path in folder.glob(f"calls/*.{last}.calls")):
        assert all(launcher.poll() is None for launcher in machines.launchers), machines.printed()
        time.sleep(0.002)
    os.kill(machines.process(last), signal.SIGKILL)
    assert all(code != 0 for code in machines.wait())
    assert not (folder / "metrics.json").exists()

    again = Machines(tmp_path, *SMALL, f"hydra.run.dir={folder}")
    assert again.wait() == [0, 0], again.printed()
    require_same(folder, alone)


@pytest.mark.slow
def test_machines_without_a_shared_folder_are_refused_before_any_work(tmp_path):
    machines = Machines(tmp_path, *SMALL, "hydra.run.dir=here")
    assert all(code != 0 for code in machines.wait())
    message = "give hydra.run.dir=FOLDER, an absolute path that all machines share"
    assert message in machines.printed()
    assert not list(tmp_path.glob("machine_*/here/schedules/*"))


@pytest.mark.slow
def test_only_one_process_of_all_machines_takes_the_lock_of_a_folder(alone, tmp_path):
    # As where a user starts the command on each machine.
    folder = tmp_path / "shared"
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
    arguments = [*SMALL, *TOGETHER, "trainer.devices=1", f"hydra.run.dir={folder}"]
    processes = []
    for node in range(NODES):
        processes.append(start_process(arguments, tmp_path, {**shared, "NODE_RANK": str(node)}))
    for process, printed in processes:
        process.join()
        assert process.exitcode == 0, printed.read_text()
    require_same(folder, alone)


def slurm(place: Path) -> dict[str, str]:
    """Return an environment in which SLURM's commands start a job's processes on this machine."""
    commands = place / "bin"
    commands.mkdir()
    scripts = {"sbatch": SBATCH, "srun": SRUN, "sacct": "", "scancel": ""}
    for name, text in scripts.items():
        file = commands / name
        file.write_text(f"#!{sys.executable}\n{text}")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_a_job_of_slurm_on_two_machines_gives_the_schedules_of_one_process(alone, tmp_path):
    sweep = tmp_path / "sweep"
    launcher = ["hydra/launcher=submitit_slurm", f"hydra.launcher.nodes={NODES}"]
    launcher += [f"hydra.launcher.tasks_per_node={PROCESSES}", "hydra.launcher.gpus_per_node=0"]
    arguments = ["--multirun", *SMALL, *TOGETHER, *launcher, f"hydra.sweep.dir={sweep}"]
    process, printed = start_process(arguments, tmp_path, slurm(tmp_path))
    process.join(timeout=300)  # a launcher waits forever for a job whose record is lost
    process.kill()
    logs = [*sweep.glob(".submitit/*/*.err"), *sweep.glob(".submitit/*.log"), printed]
    assert process.exitcode == 0, "\n".join(log.read_text() for log in logs)
    require_same(sweep / "0", alone)
