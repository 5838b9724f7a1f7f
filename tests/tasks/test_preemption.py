"""Signals end every task with its state on disk; experiments/kill_test does the same at large."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from joblib.externals.loky import get_reusable_executor

from experiments.kill_test import run
from oss_exp import job
from oss_exp.tasks import preemption
from oss_exp.tasks.pretrain import PretrainModule

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    """The module experiments/kill_test/run.py, working in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "FOLDER", tmp_path_factory.mktemp("kills"))
        yield run


@pytest.fixture(scope="module")
def whole(kills):
    """A function that returns the folder of a task's runs, with an undisturbed one in whole/."""

    @cache
    def folder(task: str) -> Path:
        place = kills.FOLDER / task
        place.mkdir()
        assert kills.run(task, place / "whole")[0] == 0
        return place

    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "strikes"),
    [
        ("search", [(signal.SIGKILL, (9, "before")), (signal.SIGTERM, (8, "after"))]),
        # All batches are measured, and nothing is left to do but to write it down.
        (
            "compare",
            [(signal.SIGKILL, ("0_of_1.pt", "after")), (signal.SIGINT, ("metrics.json", "before"))],
        ),
        # The weights of step 8 lie beside the record of those of step 4.
        (
            "pretrain",
            [
                (signal.SIGTERM, ("last.ckpt", "after")),
                (signal.SIGKILL, ("dit_fashion.safetensors", "after")),
            ],
        ),
    ],
)
def test_a_task_that_is_ended_at_a_file_goes_on_to_the_same_result(kills, whole, task, strikes):
    folder = whole(task)

    for sent, at in strikes:
        code, _, seconds = kills.run(task, folder / "killed", sent, at)
        assert code == kills.CODES[sent]
        assert seconds < 5
        assert kills.require_whole(folder / "killed") > 0

    assert kills.run(task, folder / "killed")[0] == 0
    assert kills.outcome(folder / "killed") == kills.outcome(folder / "whole")
    log = (folder / "killed.log").read_text()
    assert f"and the same command with hydra.run.dir={folder / 'killed'} goes on" in log
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_signal_keeps_the_step_that_a_training_has_come_to(kills, whole, monkeypatch):
    """The sixth step saves no checkpoint of itself; its losses are those of an undisturbed run."""
    folder = whole("pretrain")
    step = PretrainModule.training_step

    def struck(self, batch, batch_idx):
        if self.steps_taken == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    # Ended in its sixth step.
    with monkeypatch.context() as patch:
        patch.setattr(PretrainModule, "training_step", struck)
        assert kills.run("pretrain", folder / "ended")[0] == 143
    checkpoint = torch.load(folder / "ended" / "checkpoints" / "last.ckpt", weights_only=True)
    assert len(checkpoint["progress"]["losses"]) == 7

    # Continued.
    assert kills.run("pretrain", folder / "ended")[0] == 0
    assert kills.outcome(folder / "ended") == kills.outcome(folder / "whole")


def forked(work: Callable[[], object]) -> tuple[int, float]:
    """Do this work within `watched` in a process; return its exit code and its seconds."""
    started = time.monotonic()
    if (child := os.fork()) == 0:
        try:
            with preemption.watched():
                work()
            os._exit(0)
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - started


def ignore_a_signal() -> None:
    with preemption.unbroken():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)


def test_work_that_ignores_a_signal_is_ended(monkeypatch, capfd):
    monkeypatch.setattr(preemption, "GRACE", 0.2)

    def deaf() -> None:
        preemption.advise("all is kept")
        ignore_a_signal()

    code, seconds = forked(deaf)
    assert code == 143
    assert seconds < 5
    assert capfd.readouterr().err.strip() == "oss-exp: ended by SIGTERM; all is kept"


def test_signals_of_other_handlers_end_nothing(monkeypatch, capfd):
    """The processes that load a training's examples send SIGCHLD, for which torch has a handler."""
    monkeypatch.setattr(preemption, "GRACE", 0.2)

    def work() -> None:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        os.kill(os.getpid(), signal.SIGCHLD)
        time.sleep(1)
        print("went on", file=sys.stderr, flush=True)
        ignore_a_signal()  # this later one still ends the run

    code, seconds = forked(work)
    assert code == 143
    assert seconds < 5
    first, _, line = capfd.readouterr().err.strip().split("\n")
    assert first == "went on"
    assert line.startswith("oss-exp: ended by SIGTERM;")


@pytest.mark.parametrize(("sent", "code"), [("SIGTERM", 143), ("SIGUSR1", 143), ("SIGINT", 130)])
def test_a_signal_waits_for_the_end_of_a_piece_of_work(sent, code, capfd):
    def work() -> None:
        with preemption.unbroken():
            assert not preemption.received()
            os.kill(os.getpid(), getattr(signal, sent))
            assert preemption.received()
            print("done", file=sys.stderr, flush=True)
        raise AssertionError("not reached")

    assert forked(work)[0] == code
    first, _, line = capfd.readouterr().err.strip().split("\n")
    assert first == "done"
    assert line.startswith(
        "oss-exp: interrupted;" if sent == "SIGINT" else f"oss-exp: ended by {sent};"
    )


def test_processes_that_load_data_have_the_signals_as_they_were():
    def work() -> None:
        if (child := os.fork()) == 0:
            os._exit(int(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1

    before = signal.getsignal(signal.SIGTERM)
    assert forked(work)[0] == 0
    with preemption.watched():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_processes_of_joblib_are_ended_too(tmp_path):
    def work() -> None:
        process = get_reusable_executor(1).submit(os.getpid).result()
        (tmp_path / "process").write_text(str(process))
        os.kill(os.getpid(), signal.SIGTERM)

    assert forked(work)[0] == 143
    process = int((tmp_path / "process").read_text())
    for _ in range(100):
        if not is_alive(process):
            break
        time.sleep(0.05)
    assert not is_alive(process)


@pytest.mark.parametrize("folder", ["hydra.sweep.dir=there", "hydra.sweep.dir=FOLDER"])
def test_a_sweep_whose_jobs_are_in_other_processes_says_how_it_goes_on(folder, monkeypatch, capfd):
    monkeypatch.setattr(job, "run", lambda: os.kill(os.getpid(), signal.SIGTERM))
    given = [] if "FOLDER" in folder else [folder]
    assert forked(lambda: job.run_all(["--multirun", *given]))[0] == 143
    assert f"the same command with {folder}" in capfd.readouterr().err


def is_alive(process: int) -> bool:
    """Return whether a process has not ended yet."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")  # in a container, nobody may fetch its exit code
    return not (status.exists() and ") Z " in status.read_text())
