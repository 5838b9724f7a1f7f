"""Files that are whole or absent: atomic writes, hashes, records, and tensors that prove where they come from.

Every result of a run goes through `write_atomically`, so an interrupt or a full disk leaves the old file or none.
What is read becomes a record in `load_record`: there its size and its types are checked, and nowhere else.
A tensor asset `x.safetensors` travels with `x.json`, which holds its SHA-256 and its provenance.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
import stat
import tempfile
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import numpy as np
import safetensors.torch
import yaml
from pydantic import BaseModel, ConfigDict, FailFast, Field, TypeAdapter, ValidationError
from pydantic_core import from_json
from torch import Tensor
from typing_extensions import TypeAliasType

from oss_exp.validation import describe, find_fault, shown

ASSETS = Path(__file__).parent / "assets"  # shipped with the package
LIMIT = 1 << 24  # 16 MiB: no file that only says what something is comes near it
TABLE_LIMIT = (
    1 << 27
)  # 128 MiB: of files with numbers for every sample, or for every step of a training
NODES = (
    1 << 24
)  # of a JSON file; lists and objects, of which each needs a hundred bytes in memory, count four times
UNFINISHED = (
    ".oss_exp.tmp"  # how the names of files end that are being written: no other program's do
)
ARRAYS_LIMIT = (
    1 << 29
)  # 512 MiB: of the arrays in an .npz file, or the tensors of a file that is no checkpoint
CONFIG_LIMIT = 1 << 18  # 256 KiB: of a configuration
DEEP = 200  # levels of a record or a configuration
AGAIN = "write it again with the command that made it"

Count = Annotated[int, Field(ge=0, lt=2**63)]
# There may be millions: the first that is wrong ends the reading.
Numbers = TypeAliasType("Numbers", Annotated[list[float], FailFast()])
R = TypeVar("R")
T = TypeVar("T")
P = TypeVar("P", bound="Provenance")


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Write to a temporary name in the same folder, then rename. Makes missing folders. Returns the path."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED
        )
    except OSError as error:
        reason = f"no file can be made in {path.absolute().parent} ({error.strerror or error})"
        raise OSError(f"cannot write {path}: {reason}; choose another folder") from error
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
    """Remove the temporary files below a folder that a killed process left; nobody else may be writing there."""
    for path in folder.rglob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Record(BaseModel):
    """What a file holds: strict (`true` is no 1, 1.0 no whole number), finite; fields not named here are passed over.

    A format of our own has `format: Literal[...]` and `version: Literal[...]` first, and `extra="forbid"`.
    """

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore")


class Provenance(Record):
    """The JSON beside a file of tensors: their hash, and whatever else is known of them."""

    model_config = ConfigDict(extra="allow")

    sha256: str = Field(pattern="^[0-9a-f]{64}$")


def load_record(
    path: str | Path,
    form: type[R] | TypeAdapter[R],
    what: str,
    remedy: str = AGAIN,
    limit: int = LIMIT,
    fields: int = NODES,
) -> R:
    """Read a JSON file as `form`, a Record or a TypeAdapter.

    UTF-8, with or without a byte order mark; of two fields of one name the last counts, as in other programs.
    Raises FileNotFoundError or ValueError, which names the file, the field and the remedy: for a file of more than
    `limit` bytes or 200 levels, of more than NODES values or `fields` fields, one that is no JSON, of another format or
    version, or not what `form` asks for.
    """
    data = read_bytes(path, what, limit)
    if data.count(b":") > fields:  # an object may be copied for each field that it lacks
        raise ValueError(
            f"{what} {path} has more than the {fields:,} fields that are read of such a file"
        )
    return parse_record(data, form, f"{what} {path}", remedy)


def load_records(
    path: str | Path,
    form: type[R] | TypeAdapter[R],
    what: str,
    remedy: str = AGAIN,
    limit: int = LIMIT,
) -> list[R]:
    """Read a file with one JSON value a line (.jsonl), each as `form`; empty lines are passed over.

    Raises as `load_record` does, and names the line.
    """
    data = read_bytes(path, what, limit)
    _check_nodes(data, f"{what} {path}")
    lines = enumerate(data.splitlines(), start=1)
    return [
        parse_record(line, form, f"{what} {path}, line {i}", remedy)
        for i, line in lines
        if line.strip()
    ]


def parse_record(data: str | bytes, form: type[R] | TypeAdapter[R], name: str, remedy: str) -> R:
    """The JSON in `data` as `form`. ValueError as of `load_record`; name: in its words what this is and where."""
    _check_nodes(data.encode() if isinstance(data, str) else data, name)
    try:
        if isinstance(form, TypeAdapter):
            return form.validate_json(data)
        assert issubclass(form, BaseModel)
        return form.model_validate_json(data)
    except ValidationError as error:
        raise ValueError(f"{name}{_reason(data, error)}; {remedy}") from None


def _check_nodes(data: bytes, name: str) -> None:
    """ValueError for JSON of so many values that they would fill the memory. Counted are commas and brackets."""
    if 4 * (data.count(b"[") + data.count(b"{")) + data.count(b",") > NODES:
        raise ValueError(
            f"{name} has more values than the {NODES // 4:,} lists or {NODES:,} numbers that are read"
        )


def _reason(data: str | bytes, error: ValidationError) -> str:
    """What is wrong; another format or version is told apart from damage."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {})["error"]
        if not data.strip():
            return " is empty"
        if reason.startswith("recursion limit"):
            return f" has lists or objects more than 200 levels deep ({reason})"
        return f" is not complete JSON ({reason})"
    given = from_json(data)
    fault = find_fault(error, given)
    if fault.field in ("format", "version") and fault.field in given:
        return f" is of another {fault.field}: `{fault.field}` {fault.text}"
    return f": {'field ' * bool(fault.field)}{describe(error, given=given)}"


def read_text(path: str | Path, what: str, limit: int = LIMIT) -> str:
    """Read UTF-8, with or without a byte order mark. ValueError for a file of more than `limit` bytes, or no text."""
    try:
        return read_bytes(path, what, limit).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} is no UTF-8 text ({error}); save it as UTF-8") from None


def read_bytes(path: str | Path, what: str, limit: int) -> bytes:
    """Read a text file, without its byte order mark. ValueError where it holds more than `limit` bytes."""
    return read_binary(path, what, limit).removeprefix(codecs.BOM_UTF8)


def read_binary(path: str | Path, what: str, limit: int) -> bytes:
    """Read a file. ValueError where it holds more than `limit` bytes, or is none."""
    path = Path(path)
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > limit else file.read(limit + 1)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{what} {path} does not exist (folder: {path.absolute().parent})"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ValueError(f"{what} {path} cannot be read: {error}") from None
    if max(len(data), size) > limit:
        raise ValueError(
            f"{what} {path} is larger than {limit / 2**20:g} MiB, the most that is read of such a file"
        )
    return data


def open_file(path: Path) -> BinaryIO:
    """Open a file to read it. ValueError for a folder, a pipe or a device, which may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no file but a folder, a pipe or a device")
    return path.open("rb")


def load_config(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML file as plain data: no object is made, no interpolation resolved, no alias followed.

    ValueError for a file of more than 256 KiB or 200 levels, with aliases or repeated merges, or that is no mapping.
    """
    text, depth = read_text(path, what, CONFIG_LIMIT), 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has aliases, which no configuration of ours has")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                event, yaml.CollectionEndEvent
            )
            if depth > DEEP:
                raise ValueError(f"it is more than {DEEP} levels deep")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{what} {path} cannot be read: {' '.join(str(error).split()):.200}"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{what} {path} must be a mapping of names, got {shown(content)}")
    return content


def inside(folder: Path, *parts: str) -> Path:
    """Return a path below a folder that others may have made; ValueError where a link leads out of it."""
    path = folder.joinpath(*parts)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(
            f"{path} leads out of its folder; give a folder of whole files, without links to others"
        )
    return path


def beside(path: Path, ending: str) -> Path:
    """Return the file that belongs to a JSON file: "oss_5.json" and ".mean.safetensors" -> "oss_5.mean.safetensors".

    Only `.json` is taken off a name, so files of other names keep files of their own.
    """
    return path.with_name(path.name.removesuffix(".json") + ending)


def save_asset(
    path: str | Path, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]
) -> str:
    """Write `path` (.safetensors) and its `.json` with the hash and the provenance; returns the hash."""
    path = Path(path)
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_atomically(path, data)
    record = {"file": path.name, "sha256": sha256(data), **provenance}
    write_atomically(path.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    return record["sha256"]


def load_asset(
    path: str | Path, what: str, form: type[P] = Provenance
) -> tuple[dict[str, Tensor], P]:
    """Tensors and provenance of an asset; ValueError when its bytes are not those its `.json` vouches for."""
    path = Path(path)
    record = load_record(
        path.with_suffix(".json"), form, f"provenance of {what}", "restore the file"
    )
    return load_tensors(path, record.sha256, what), record


def find_asset(file: str | Path, what: str) -> Path:
    """A path that exists, or the name of a file shipped with the package."""
    path = Path(file).expanduser()
    if not path.exists() and not (path := ASSETS / file).exists():
        shipped = ", ".join(sorted(asset.name for asset in ASSETS.glob(f"*{path.suffix}")))
        raise FileNotFoundError(
            f"{what} {file} is neither a path that exists nor a shipped file ({shipped})"
        )
    return path


def shipped_schedule(file: str | Path) -> Path:
    """Return a step schedule's path, or that of the shipped one of this name."""
    path = Path(file).expanduser()
    shipped = ASSETS / "schedules" / path.name
    return shipped if not path.exists() and str(file) == path.name and shipped.is_file() else path


def load_tensors(path: Path, expected_sha256: str | None, what: str) -> dict[str, Tensor]:
    """Read a safetensors file whose SHA-256 must be the expected one."""
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path} does not exist (folder: {path.absolute().parent})")
    data = read_binary(path, what, ARRAYS_LIMIT)
    if sha256(data) != expected_sha256:
        raise ValueError(
            f"{what} {path} is damaged or was replaced: its SHA-256 is {sha256(data)[:12]}..., "
            f"expected {str(expected_sha256)[:12]}...; restore the file or make it again"
        )
    return parse_safetensors(data[:8], f"{what} {path}", lambda: safetensors.torch.load(data))


def load_safetensors(path: Path, what: str) -> dict[str, Tensor]:
    """Read a safetensors file that nothing vouches for. ValueError where it is damaged or declares too much."""
    with open_file(path) as file:
        start = file.read(8)
    return parse_safetensors(start, f"{what} {path}", lambda: safetensors.torch.load_file(path))


def parse_safetensors(start: bytes, name: str, parse: Callable[[], T]) -> T:
    """What `parse` makes of a file that begins with `start`: the length of its header, the list of all tensors."""
    if (header := int.from_bytes(start, "little")) > LIMIT:
        raise ValueError(
            f"{name} is no safetensors file, or one whose header of {header >> 20} MiB is larger than the "
            f"{LIMIT >> 20} MiB that are read"
        )
    try:
        return parse()
    except Exception as error:  # its own kinds
        raise ValueError(
            f"{name} is truncated or no safetensors file ({error!s:.200}); get it again"
        ) from None


def load_arrays(
    path: Path,
    what: str,
    remedy: str,
    wanted: Collection[str] | None,
    limit: int = ARRAYS_LIMIT,
    taken: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> dict[str, Any]:
    """Read the `wanted` arrays of an .npz file (null: all); the others have None, for they may fill the memory.

    taken: what is kept of an array, of which one is in memory at a time.
    Objects are not unpickled. ValueError where it is damaged, or its arrays are larger than `limit`.
    """
    try:
        with open_zip(path, limit, wanted) as archive:
            parts = {part.filename.removesuffix(".npy"): part for part in archive.infolist()}
            return {
                key: taken(_read_array(archive, part, limit))
                if wanted is None or key in wanted
                else None
                for key, part in parts.items()
            }
    except Exception as error:  # zipfile and NumPy raise many kinds for broken bytes
        raise ValueError(
            f"{what} {path} cannot be read as an .npz file: {error!s:.200}; {remedy}"
        ) from None


def _read_array(archive: zipfile.ZipFile, part: zipfile.ZipInfo, limit: int) -> np.ndarray:
    """Read one array. ValueError where it declares more bytes than `limit`: NumPy makes room for it before it reads."""
    with archive.open(part) as file:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
        if math.prod(shape) * dtype.itemsize > limit:
            raise ValueError(
                f"it declares an array of {shape} {dtype!s:.20}, more than the {limit >> 20} MiB that are read"
            )
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def open_zip(path: Path, limit: int, wanted: Collection[str] | None = None) -> zipfile.ZipFile:
    """Open a zip archive. ValueError where it lists too many files, or the `wanted` ones (null: all) unpack to more.

    wanted: names without `.npy`. limit: bytes. What a file unpacks to is cut at what the archive's list says.
    """
    with open_file(path) as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # as ZipFile reads it
    if end is None:
        raise ValueError("it is no whole zip archive")
    if end[zipfile._ECD_SIZE] > LIMIT:  # type: ignore[attr-defined]
        raise ValueError("it lists more files than are read")
    archive = zipfile.ZipFile(path)
    listed = [
        part
        for part in archive.infolist()
        if wanted is None or part.filename.removesuffix(".npy") in wanted
    ]
    if sum(part.file_size for part in listed) > limit:
        archive.close()
        raise ValueError(f"it unpacks to more than {limit >> 20} MiB, the most that is read")
    return archive
