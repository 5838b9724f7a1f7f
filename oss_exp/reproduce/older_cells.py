"""Recognition of runs that an earlier version did, by what they computed.

The folder of a cell is named by its key (cells.py), and the key changes when a version
spells its configurations in another way. The folder itself has what is needed:
config.yaml is the configuration, and cell.json has the hashes of the shipped files and
the folder of the run before. Both are data; nothing in them is executed or resolved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from oss_exp.files import ASSETS, Record, load_config, load_record, sha256
from oss_exp.tasks.older_configs import canonical, changed

# Words that stand for folders in a configuration.
OUTPUT, DATA, PARENT = "OUTPUT", "DATA", "PARENT"

# Groups that version 0.1 left out of the hash in a folder's name.
UNNAMED = (
    "trainer",
    "logger",
    "paths",
    "hydra",
    "keep_calls",
    "offload_states",
)


def shipped_files(values: Any) -> dict[str, str]:
    """Return the shipped files that a configuration names: {file: SHA-256}.

    A name that ends with / is a folder with all files in it.
    """
    texts = set(_texts(values))
    hashes = {}
    for path in sorted(ASSETS.rglob("*")):
        file = path.relative_to(ASSETS)
        names = {file.as_posix(), *(f"{folder.as_posix()}/" for folder in file.parents[:-1])}
        if path.is_file() and names & texts:
            hashes[file.as_posix()] = sha256(path.read_bytes())
    return hashes


def older_cell(
    root: Path, values: Mapping[str, Any], files: Mapping[str, str], parent: str | None
) -> Path | None:
    """Return the folder that has the results of a canonical configuration; None without one.

    Args:
        root: Folder of all runs.
        values: The configuration.
        files: Hashes of the shipped files that it names.
        parent: Name of the folder of the run that it starts from.
    """
    for cell in _done_cells(root.resolve()):
        same_files = all(cell.files.get(name, now) == now for name, now in files.items())
        if cell.parent == parent and same_files and not changed(cell.values, values):
            return root / cell.name
    return None


class CellRecord(Record):
    """The file cell.json. Version 0.1 wrote neither parent nor files.

    Attributes:
        overrides: The command line.
        parent: Name of the folder of the run before.
        files: Hashes of the shipped files that the configuration names.
        packages: Versions of packages.
    """

    overrides: list[str]
    parent: str | None = None
    files: dict[str, str] | None = None
    packages: dict[str, str]


def read_cell(folder: Path) -> CellRecord:
    """Read cell.json of a folder; raises ValueError if it is not such a record."""
    remedy = "remove its folder, and it is made again"
    return load_record(folder / "cell.json", CellRecord, "record of a run", remedy)


@dataclass(frozen=True)
class _DoneCell:
    """The content of a folder: its canonical configuration, files and parent."""

    name: str
    values: dict[str, Any]
    files: dict[str, str]
    parent: str | None


@cache
def _done_cells(root: Path) -> list[_DoneCell]:
    """Return the runs that were complete when this process first asked."""
    files = sorted(root.glob("*/cell.json"))
    folders = [file.parent for file in files if file.with_name("config.yaml").is_file()]
    names = {folder.name for folder in folders}
    cells = []
    for folder in folders:
        cell = _read(folder, names)
        if cell is not None:
            cells.append(cell)
    return cells


def _read(folder: Path, names: set[str]) -> _DoneCell | None:
    """Read a folder.

    Args:
        folder: The folder.
        names: Names of the folders beside it.

    Returns:
        None where its content cannot be determined for certain.
    """
    try:
        config = load_config(folder / "config.yaml", "configuration")
        record = read_cell(folder)
        parent = record.parent
        if "parent" not in record.model_fields_set:
            parent = _parent(record.overrides, names)

        # The configuration before the run filled in its folders and its model's classes.
        data_dir = config["paths"]["data_dir"]
        config = _with_places(config, {folder.name: OUTPUT, parent: PARENT}, data_dir)
        has_classes = any(text.startswith("data.classes=") for text in record.overrides)
        if "classes" in config.get("data", {}) and not has_classes:
            config["data"]["classes"] = "auto"
    except (ValueError, KeyError, TypeError, AttributeError):
        return None

    # Version 0.1 recorded the hashes of files in the folder's name alone. Those of today's files
    # are the same if they give that name again.
    files = record.files
    if files is None:
        values = {key: value for key, value in config.items() if key not in UNNAMED}
        files = shipped_files(values)
        if sha256(json.dumps([values, files, parent], sort_keys=True).encode())[:16] != folder.name:
            return None
    return _DoneCell(folder.name, canonical(config), files, parent)


def _parent(overrides: list[str], names: set[str]) -> str | None:
    """Return the folder that a command line names."""
    for name in names:
        if any(f"{name}/" in text for text in overrides):
            return name
    return None


def _with_places(value: Any, folders: Mapping[str | None, str], data: str) -> Any:
    """Replace folders in a configuration by words, whatever they were below.

    Args:
        value: A configuration, or a part of it.
        folders: Word for each name of a folder.
        data: The folder that DATA replaces.
    """
    if isinstance(value, dict):
        return {key: _with_places(inner, folders, data) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_places(inner, folders, data) for inner in value]
    if not isinstance(value, str):
        return value
    for name, word in folders.items():
        if name is not None:
            value = re.sub(rf"^(.*/)?{re.escape(name)}(?=/|$)", word, value)
    return re.sub(rf"^{re.escape(data)}(?=/|$)", DATA, value)


def _texts(value: Any) -> list[str]:
    """Return all texts in a configuration."""
    if isinstance(value, str):
        return [value]
    inner_values = value if isinstance(value, list) else []
    if isinstance(value, dict):
        inner_values = value.values()
    texts = []
    for inner in inner_values:
        texts += _texts(inner)
    return texts
