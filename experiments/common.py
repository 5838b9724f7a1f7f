"""Helpers of the experiments: program runs that are made once and kept, and small tables."""

from __future__ import annotations

import argparse
import io
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from oss_exp.cli import CONF
from oss_exp.evaluation.comparison import Result
from oss_exp.files import write_atomically
from oss_exp.report.results import read_run

OUTPUTS = Path("outputs/experiments")


def command_line(docstring: str | None) -> argparse.ArgumentParser:
    """Return a parser of a script's arguments whose help begins with the script's docstring."""
    return argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def measure(name: str, *overrides: str) -> list[Result]:
    """Return the results of a run, which is made by `finished`."""
    return read_run(finished(name, *overrides))


def finished(name: str, *overrides: str, file: str = "metrics.json") -> Path:
    """Run `oss-exp <overrides>` in outputs/experiments/<name> unless `file` is there already.

    Returns:
        The run's folder.
    """
    folder = OUTPUTS / name
    if not (folder / file).exists():
        print("oss-exp", *overrides, flush=True)
        run_program(*overrides, f"hydra.run.dir={folder}", stdout=subprocess.DEVNULL)
    return folder


def run_program(*overrides: str, stdout: int | None = None) -> None:
    """Run `oss-exp <overrides>` without a logger; raise if it fails, and end it on SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the run would go on alone
    command = [sys.executable, "-m", "oss_exp", *overrides, "logger=none"]
    subprocess.run(command, check=True, stdout=stdout)


def configuration(*overrides: str) -> DictConfig:
    """Compose the configuration of `oss-exp <overrides>`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def png(figure) -> bytes:
    """Return a figure of matplotlib as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def keep(script: str, name: str, content: str | bytes) -> None:
    """Write a result beside its script, and print where (and what, if it is text)."""
    path = Path(script).with_name(name)
    write_atomically(path, content)
    print(path if isinstance(content, bytes) else f"{path}\n\n{content}")
