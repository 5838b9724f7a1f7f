"""Cells that an earlier version made, found again by what they computed.

A cell's folder has the name of its key (cells.py), and the key changes when a version spells its configurations in
another way. The folder itself says what it holds: config.yaml has the configuration, cell.json the hashes of the
shipped files and the folder of the run before. Both are data; nothing in them is executed or resolved.
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

OUTPUT, DATA, PARENT = "OUTPUT", "DATA", "PARENT"  # in a key, in the place of folders
UNNAMED = (
    "trainer",
    "logger",
    "paths",
    "hydra",
    "keep_calls",
    "offload_states",
)  # by version 0.1 in a folder's name


def shipped_files(values: Any) -> dict[str, str]:
    """Return {file: SHA-256} of the shipped files that a configuration names."""
    return {
        name: sha256((ASSETS / name).read_bytes())
        for name in sorted(set(_texts(values)))
        if _is_shipped(name)
    }


def older_cell(
    root: Path, values: Mapping[str, Any], files: Mapping[str, str], parent: str | None
) -> Path | None:
    """Return the folder below `root` that holds the results of a canonical configuration; None where there is none.

    files: hashes of the shipped files that it names. parent: the name of the folder of the run that it goes on from.
    """
    for made in _made_cells(root.resolve()):
        same_files = all(
            made.files.get(name, hash_now) == hash_now for name, hash_now in files.items()
        )
        if made.parent == parent and same_files and not changed(made.values, values):
            return root / made.name
    return None


class CellRecord(Record):
    """cell.json: what was run, after which run (its folder's name), and the hashes of the shipped files that it named.

    packages: their versions. Version 0.1 wrote neither parent nor files.
    """

    overrides: list[str]
    parent: str | None = None
    files: dict[str, str] | None = None
    packages: dict[str, str]


def read_cell(folder: Path) -> CellRecord:
    """Return what cell.json in a folder says; ValueError where it is no such record."""
    return load_record(
        folder / "cell.json",
        CellRecord,
        "record of a run",
        "remove its folder, and it is made again",
    )


@dataclass(frozen=True)
class _MadeCell:
    name: str
    values: dict[str, Any]
    files: dict[str, str]
    parent: str | None


@cache
def _made_cells(root: Path) -> list[_MadeCell]:
    """Return what the folders hold that were complete when this process first asked."""
    folders = [
        file.parent
        for file in sorted(root.glob("*/cell.json"))
        if file.with_name("config.yaml").is_file()
    ]
    names = {folder.name for folder in folders}
    made = [_read(folder, names) for folder in folders]
    return [cell for cell in made if cell is not None]


def _read(folder: Path, names: set[str]) -> _MadeCell | None:
    """Return what a folder holds; None where it cannot be told for certain. names: of the folders beside it."""
    try:
        config, record = load_config(folder / "config.yaml", "configuration"), read_cell(folder)
        overrides, parent = record.overrides, record.parent
        if "parent" not in record.model_fields_set:
            parent = next(
                (name for name in names if any(f"{name}/" in text for text in overrides)), None
            )

        # As it was before the run knew its folders and its model.
        config = _with_places(
            config, {folder.name: OUTPUT, parent: PARENT}, config["paths"]["data_dir"]
        )
        if "classes" in config.get("data", {}) and not any(
            text.startswith("data.classes=") for text in overrides
        ):
            config["data"]["classes"] = "auto"
    except (ValueError, KeyError, TypeError, AttributeError):
        return None

    # Version 0.1 kept hashes of files in the folder's name alone: they are today's where that name comes out again.
    files = record.files
    if files is None:
        values = {key: value for key, value in config.items() if key not in UNNAMED}
        files = shipped_files(values)
        if sha256(json.dumps([values, files, parent], sort_keys=True).encode())[:16] != folder.name:
            return None
    return _MadeCell(folder.name, canonical(config), files, parent)


def _with_places(value: Any, folders: Mapping[str | None, str], data: str) -> Any:
    """Return a configuration with a word in the place of each of these folders, wherever they were."""
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
    if isinstance(value, dict | list):
        return [
            text
            for inner in (value.values() if isinstance(value, dict) else value)
            for text in _texts(inner)
        ]
    return [value] if isinstance(value, str) else []


def _is_shipped(name: str) -> bool:
    return bool(name) and "/" not in name and (ASSETS / name).is_file()
