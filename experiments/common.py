"""What the experiments share: runs of the program, each kept in a folder and made once; small tables."""

from __future__ import annotations

import io
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


def measure(name: str, *overrides: str) -> list[Result]:
    """The results of a `finished` run."""
    return read_run(finished(name, *overrides))


def finished(name: str, *overrides: str, file: str = "metrics.json") -> Path:
    """The folder outputs/experiments/<name>, into which `oss-exp <overrides>` is run unless `file` is there already."""
    folder = OUTPUTS / name
    if not (folder / file).exists():
        print("oss-exp", *overrides, flush=True)
        command = [
            sys.executable,
            "-m",
            "oss_exp",
            *overrides,
            "logger=none",
            f"hydra.run.dir={folder}",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def configuration(*overrides: str) -> DictConfig:
    """What `oss-exp <overrides>` would run with."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def keep(script: str, name: str, content: str | bytes) -> None:
    """Write a result beside the script that made it, and say so."""
    path = Path(script).with_name(name)
    write_atomically(path, content)
    print(path if isinstance(content, bytes) else f"{path}\n\n{content}")
