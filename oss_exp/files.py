"""Files that are whole or absent: atomic writes, hashes, and tensors that prove where they come from.

Every result of a run goes through `write_atomically`, so an interrupt or a full disk leaves the old file or none.
A tensor asset `x.safetensors` travels with `x.json`, which holds its SHA-256 and its provenance.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

Model = TypeVar("Model", bound=BaseModel)

ASSETS = Path(__file__).parent / "assets"  # shipped with the package


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Write to a temporary name in the same folder, then rename. Makes missing folders. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:  # Ctrl-C too: never leave the temporary behind
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
            ) from error
        raise
    return path


def remove_unfinished(folder: Path) -> None:
    """The temporary files below it that a killed process left; nobody else may be writing there."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_json(path: str | Path, what: str) -> Any:
    """Parse a JSON file; ValueError with path, reason and remedy where it is missing, empty or broken."""
    path = Path(path)
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise FileNotFoundError(f"{what} {path} does not exist (folder: {path.resolve().parent})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} {path} cannot be read: {error}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = "is empty" if not text.strip() else f"is not complete JSON ({error})"
        raise ValueError(f"{what} {path} {reason}; write it again with the command that made it") from None


def read_record(path: Path, what: str, form: str, version: int, remedy: str = "") -> dict[str, Any]:
    """A JSON object that says it is of this format and version. ValueError names the file, the fault and the remedy."""
    record = read_json(path, what)
    if not isinstance(record, dict) or record.get("format") != form:
        raise ValueError(f'{path} is JSON but not a {what} (no "format": "{form}"){remedy}')
    if record.get("version") != version:
        raise ValueError(f"{path} has format version {record.get('version')}, this program reads {version}")
    return record


def parse_record(content: Any, model: type[Model], path: Path, what: str) -> Model:
    """Return parsed JSON as a record of this model. ValueError names the file and the fields at fault."""
    try:
        return model.model_validate_json(json.dumps(content))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:3]]
        raise ValueError(f"{what} {path} is damaged: {'; '.join(faults)}") from None


def save_asset(path: str | Path, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> str:
    """Write `path` (.safetensors) and its `.json` with the hash and the provenance; returns the hash."""
    path = Path(path)
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_atomically(path, data)
    record = {"file": path.name, "sha256": sha256(data), **provenance}
    write_atomically(path.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    return record["sha256"]


def load_asset(path: str | Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and provenance of an asset; ValueError when its bytes are not those its `.json` vouches for."""
    path = Path(path)
    record = read_json(path.with_suffix(".json"), f"provenance of {what}")
    if not isinstance(record, dict):
        raise ValueError(f"provenance of {what} {path.with_suffix('.json')} must be a JSON object; restore the file")
    tensors = load_tensors(path, record.get("sha256"), what)
    return tensors, record


def find_asset(file: str | Path, what: str) -> Path:
    """A path that exists, or the name of a file shipped with the package."""
    path = Path(file).expanduser()
    if not path.exists() and not (path := ASSETS / file).is_file():
        shipped = ", ".join(sorted(asset.name for asset in ASSETS.glob(f"*{path.suffix}")))
        raise FileNotFoundError(f"{what} {file} is neither a path that exists nor a shipped file ({shipped})")
    return path


def load_tensors(path: Path, expected_sha256: str | None, what: str) -> dict[str, Tensor]:
    """Read a safetensors file whose SHA-256 must be the expected one."""
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path} does not exist (folder: {path.resolve().parent})")
    data = path.read_bytes()
    if sha256(data) != expected_sha256:
        raise ValueError(
            f"{what} {path} is damaged or was replaced: its SHA-256 is {sha256(data)[:12]}..., "
            f"expected {str(expected_sha256)[:12]}...; restore the file or make it again"
        )
    return safetensors.torch.load(data)
