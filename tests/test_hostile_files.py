"""Files that want to run code, to write elsewhere or to fill the memory are refused in a message, or read as data.

Some for every reader; all of them, with limits of time and memory: experiments/hostile_files.
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
    raise AssertionError(f"still reading after {SECONDS} s")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "reader", mostly_slow(hostile.READERS, "checkpoints", "TorchScript", "configurations")
)
def test_hostile_files_do_nothing(reader, tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (outside / "secret.png").write_bytes(hostile.picture())
    before = contents(outside)
    read, _ = hostile.READERS[reader]
    refused = 0
    signal.signal(signal.SIGALRM, out_of_time)
    for number, case in enumerate(CHOSEN[reader][:: EVERY.get(reader, 1)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        path = case.make(folder)
        message = ""
        signal.alarm(SECONDS)
        try:
            read(path)
        except (ValueError, OSError) as error:
            message = str(error)
            refused = refused + 1
        except Exception as error:
            pytest.fail(f"{case.name}: {type(error).__name__}: {error!s:.500}")
        finally:
            signal.alarm(0)
        assert len(message) < 4000, case.name
        assert contents(outside) == before, case.name
        assert not (folder / hostile.MARK).exists()

    assert refused or reader in ("sweeps", "cells of a reproduction")
