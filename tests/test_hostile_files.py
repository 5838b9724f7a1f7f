"""Files that would run code, write elsewhere or fill the memory are refused, or read as data.

Here some for every reader; all of them, with limits of time and memory, are in
experiments/hostile_files.
"""

from __future__ import annotations

import signal
from collections import defaultdict
from pathlib import Path

import pytest
from helpers import mostly_slow

from experiments.hostile_files import cases as hostile

EVERY = {
    "run folders": 7,
    "sweeps": 3,
    "prompts": 2,
    "mixtures": 2,
    "folders that a run goes on in": 2,
}
CHOSEN = defaultdict(list)
for case in hostile.cases():
    if not case.large:
        CHOSEN[case.reader].append(case)
SECONDS = 20


def out_of_time(*_):
    """Fail a test whose reader takes too long."""
    raise AssertionError(f"still reading after {SECONDS} s")


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(case, read, path: Path) -> str:
    """Read a file and return the message of its refusal, if any; fail on any other error."""
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(SECONDS)
    try:
        read(path)
    except (ValueError, OSError) as error:
        return str(error) or "refused"
    except Exception as error:
        pytest.fail(f"{case.name}: {type(error).__name__}: {error!s:.500}")
    finally:
        signal.alarm(0)
    return ""


@pytest.fixture
def outside(tmp_path) -> Path:
    """A folder of secrets beside those of the hostile files."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret.txt").write_text("secret")
    (folder / "secret.png").write_bytes(hostile.picture())
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "reader", mostly_slow(hostile.READERS, "checkpoints", "TorchScript", "configurations")
)
def test_hostile_files_do_nothing(reader, outside, tmp_path, monkeypatch):
    before = contents(outside)
    read, _ = hostile.READERS[reader]
    messages = []

    for number, case in enumerate(CHOSEN[reader][:: EVERY.get(reader, 1)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        messages.append(refusal(case, read, case.make(folder)))
        assert len(messages[-1]) < 4000, case.name
        assert contents(outside) == before, case.name
        assert not (folder / hostile.MARK).exists()

    assert any(messages) or reader in ("sweeps", "cells of a reproduction")
