"""The report of a sweep takes work in proportion to its runs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from helpers import run_cli

import oss_exp
from experiments.scaling.sweep import RUN, copies
from oss_exp.report.page import gather

PROGRAM = str(Path(oss_exp.__file__).parent)


def steps(sweep: Path) -> int:
    """How many lines of this program the report of a sweep runs through: no clock, the same number every time."""
    count = 0

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(PROGRAM) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        gather(sweep)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.slow
def test_twice_the_runs_take_twice_the_work(tmp_path, capsys):
    run = tmp_path / "run"
    few = ["num_steps=[3]", "data.eval_samples=8", "logger=none", f"hydra.run.dir={run}"]
    run_cli(*RUN, *few, "trainer.enable_progress_bar=false")
    counts = []
    for runs in (100, 200, 400):
        copies([run], tmp_path / "sweep", runs)
        counts.append(steps(tmp_path / "sweep"))
    first, second = counts[1] - counts[0], counts[2] - counts[1]
    assert second < 2.2 * first, counts
    assert "400 runs in" in capsys.readouterr().out
