"""Files that are whole or absent: atomic writes, hashes, records, and tensors with a provenance.

Every result of a run goes through `write_atomically`, so an interrupt or a full disk
leaves the old file or none. A file that is read becomes a record in `load_record`, the
only place where its size and its types are checked. A tensor asset `x.safetensors`
comes with `x.json`, which holds its SHA-256 and its provenance.
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
AGAIN = "write it again with the command that made it"
# Ending of the names of unfinished files, which no other program uses.
UNFINISHED = ".oss_exp.tmp"

# The largest files that are read, in bytes.
CONFIG_LIMIT = 1 << 18  # 256 KiB: a configuration
LIMIT = 1 << 24  # 16 MiB: a file that only describes something
TABLE_LIMIT = 1 << 27  # 128 MiB: a file with numbers for every sample or every training step
ARRAYS_LIMIT = 1 << 29  # 512 MiB: the arrays of an .npz file or the tensors of an asset
# The most values in a JSON file. A list or an object, which needs 100 bytes, counts as four.
NODES = 1 << 24
DEEP = 200  # levels of a record or a configuration

Count = Annotated[int, Field(ge=0, lt=2**63)]
# There may be millions; reading ends at the first wrong one.
Numbers = TypeAliasType("Numbers", Annotated[list[float], FailFast()])
R = TypeVar("R")
T = TypeVar("T")
P = TypeVar("P", bound="Provenance")


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Write a file under a temporary name in the same folder, then rename it.

    Missing folders are made.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written. The message names the file, the fault
            and the remedy.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content

    # Temporary file.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED
        )
    except OSError as error:
        reason = f"no file can be made in {path.absolute().parent} ({error.strerror or error})"
        raise OSError(f"cannot write {path}: {reason}; choose another folder") from error

    # Content.
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:  # Ctrl-C too
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                f"cannot write {path}: {error.strerror or error}; "
                "free space or choose another folder"
            ) from error
        raise

    return path


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that a killed process left below a folder.

    No other process may be writing there.
    """
    for path in folder.rglob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def sha256(data: bytes) -> str:
    """Return the SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


class Record(BaseModel):
    """The base of records: the typed content of a file.

    Types are strict (`true` is not 1, 1.0 is not a whole number) and numbers finite.
    Other fields are ignored; a format of this program starts with `format:
    Literal[...]` and `version: Literal[...]`, and sets `extra="forbid"`.
    """

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore")


class Provenance(Record):
    """The JSON beside a file of tensors: their hash and any other fields."""

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
    """Read a JSON file in UTF-8, with or without a byte order mark.

    Of two fields with the same name the last one counts.

    Args:
        path: The file.
        form: A `Record` class or a TypeAdapter, which the content must fit.
        what: What the file is, for error messages.
        remedy: What to do about a wrong file, for error messages.
        limit: Most bytes of the file.
        fields: Most fields of all objects together. pydantic may copy an object for
            each field that it lacks.

    Returns:
        The content as `form`.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it is too large or more than 200 levels deep, is not JSON, has
            another format or version, or does not fit `form`. The message names the
            file, the field and the remedy.
    """
    data = read_bytes(path, what, limit)
    if data.count(b":") > fields:
        raise ValueError(
            f"{what} {path} has more than {fields:,} fields, the limit for such a file"
        )
    return parse_record(data, form, f"{what} {path}", remedy)


def load_records(
    path: str | Path,
    form: type[R] | TypeAdapter[R],
    what: str,
    remedy: str = AGAIN,
    limit: int = LIMIT,
) -> list[R]:
    """Read a file with one JSON value a line (.jsonl); empty lines are skipped.

    Arguments and errors are those of `load_record`; messages name the line too.
    """
    data = read_bytes(path, what, limit)
    _check_nodes(data, f"{what} {path}")
    records: list[R] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            records.append(parse_record(line, form, f"{what} {path}, line {number}", remedy))
    return records


def parse_record(data: str | bytes, form: type[R] | TypeAdapter[R], name: str, remedy: str) -> R:
    """Return the JSON in `data` as `form`.

    Raises:
        ValueError: As `load_record` does, with `name` for what the data is and where.
    """
    _check_nodes(data.encode() if isinstance(data, str) else data, name)
    try:
        if isinstance(form, TypeAdapter):
            return form.validate_json(data)
        assert issubclass(form, BaseModel)
        return form.model_validate_json(data)
    except ValidationError as error:
        raise ValueError(f"{name}{_reason(data, error)}; {remedy}") from None


def _check_nodes(data: bytes, name: str) -> None:
    """Raise ValueError for JSON with so many values that they would fill the memory."""
    brackets = data.count(b"[") + data.count(b"{")
    if 4 * brackets + data.count(b",") > NODES:
        raise ValueError(
            f"{name} has more values than the {NODES // 4:,} lists or {NODES:,} numbers "
            "of the limit"
        )


def _reason(data: str | bytes, error: ValidationError) -> str:
    """Return what is wrong with the data, to follow its name in a message."""
    # Not JSON.
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {})["error"]
        if not data.strip():
            return " is empty"
        if reason.startswith("recursion limit"):
            return f" has lists or objects more than 200 levels deep ({reason})"
        return f" is not complete JSON ({reason})"

    # Another format or version.
    content = from_json(data)
    fault = find_fault(error, content)
    if fault.field in ("format", "version") and fault.field in content:
        return f" is of another {fault.field}: `{fault.field}` {fault.text}"

    # A wrong field.
    return f": {'field ' * bool(fault.field)}{describe(error, given=content)}"


def read_text(path: str | Path, what: str, limit: int = LIMIT) -> str:
    """Read a file in UTF-8, with or without a byte order mark.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it holds more than `limit` bytes or is not text.
    """
    try:
        return read_bytes(path, what, limit).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} is not UTF-8 text ({error}); save it as UTF-8") from None


def read_bytes(path: str | Path, what: str, limit: int) -> bytes:
    """Read a text file as bytes without the byte order mark; errors as in `read_binary`."""
    return read_binary(path, what, limit).removeprefix(codecs.BOM_UTF8)


def read_binary(path: str | Path, what: str, limit: int) -> bytes:
    """Read a file as bytes.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it holds more than `limit` bytes or cannot be read.
    """
    path = Path(path)

    # Read no more than the limit.
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

    # The file may have grown since its size was read.
    if max(len(data), size) > limit:
        raise ValueError(
            f"{what} {path} is larger than {limit / 2**20:g} MiB, the limit for such a file"
        )

    return data


def open_file(path: Path) -> BinaryIO:
    """Open a file. Raises ValueError for a folder, and for a pipe or device, which may not end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a file but a folder, a pipe or a device")
    return path.open("rb")


def load_config(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML file as plain data, without making objects or resolving interpolations.

    Raises:
        ValueError: If the file has more than 256 KiB or 200 levels, has aliases, or is
            not a mapping with text keys.
    """
    text = read_text(path, what, CONFIG_LIMIT)
    try:
        # Structure.
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has aliases, which a configuration must not have")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEP:
                raise ValueError(f"it is more than {DEEP} levels deep")

        # Content.
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{what} {path} cannot be read: {' '.join(str(error).split()):.200}"
        ) from None

    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{what} {path} must be a mapping of names, got {shown(content)}")
    return content


def inside(folder: Path, *parts: str) -> Path:
    """Return a path below a folder. Raises ValueError if a link leads out of the folder."""
    path = folder.joinpath(*parts)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(
            f"{path} leads out of its folder; give a folder of whole files, without links to others"
        )
    return path


def beside(path: Path, ending: str) -> Path:
    """Return the path of a file that belongs to a JSON file.

    "oss_5.json" with the ending ".mean.safetensors" gives "oss_5.mean.safetensors".
    Only `.json` is removed from a name, so two names never share a file.
    """
    return path.with_name(path.name.removesuffix(".json") + ending)


def save_asset(
    path: str | Path, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]
) -> str:
    """Write a safetensors file, and its hash and provenance to the `.json` beside it.

    Returns:
        The SHA-256 of the tensor file.
    """
    path = Path(path)
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_atomically(path, data)
    record = {"file": path.name, "sha256": sha256(data), **provenance}
    write_atomically(path.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    return record["sha256"]


def load_asset(
    path: str | Path, what: str, form: type[P] = Provenance, limit: int = ARRAYS_LIMIT
) -> tuple[dict[str, Tensor], P]:
    """Return the tensors and the provenance of an asset.

    Args:
        path: The tensor file.
        what: What it is, for error messages.
        form: The record of the provenance.
        limit: Most bytes of the tensor file.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the tensor file is larger than `limit`, or does not have the hash in the
            `.json`.
    """
    path = Path(path)
    json_path = path.with_suffix(".json")
    record = load_record(json_path, form, f"provenance of {what}", "restore the file")
    return load_tensors(path, record.sha256, what, limit), record


def find_asset(file: str | Path, what: str) -> Path:
    """Return a path that exists, or that of the file of this name shipped with the package.

    Raises:
        FileNotFoundError: If there is neither.
    """
    path = Path(file).expanduser()
    if not path.exists() and not (path := ASSETS / file).exists():
        shipped = ", ".join(sorted(asset.name for asset in ASSETS.glob(f"*{path.suffix}")))
        raise FileNotFoundError(
            f"{what} {file} is neither a path that exists nor a shipped file ({shipped})"
        )
    return path


def shipped_schedule(file: str | Path) -> Path:
    """Return the path of a step schedule; for a bare name without a file, of the shipped one."""
    path = Path(file).expanduser()
    shipped = ASSETS / "schedules" / path.name
    is_bare_name = str(file) == path.name
    return shipped if is_bare_name and not path.exists() and shipped.is_file() else path


def load_tensors(
    path: Path, expected_sha256: str | None, what: str, limit: int = ARRAYS_LIMIT
) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If its SHA-256 is not the expected one, or it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path} does not exist (folder: {path.absolute().parent})")
    data = read_binary(path, what, limit)
    if sha256(data) != expected_sha256:
        raise ValueError(
            f"{what} {path} is damaged or was replaced: its SHA-256 is {sha256(data)[:12]}..., "
            f"expected {str(expected_sha256)[:12]}...; restore the file or make it again"
        )
    return parse_safetensors(data[:8], f"{what} {path}", lambda: safetensors.torch.load(data))


def load_safetensors(path: Path, what: str) -> dict[str, Tensor]:
    """Read a safetensors file without a known hash. Raises ValueError if it is damaged."""
    with open_file(path) as file:
        start = file.read(8)
    return parse_safetensors(start, f"{what} {path}", lambda: safetensors.torch.load_file(path))


def parse_safetensors(start: bytes, name: str, parse: Callable[[], T]) -> T:
    """Return the result of `parse`, with errors that name the file.

    Args:
        start: First eight bytes of the file, the length of its header.
        name: What the file is and where, for error messages.
        parse: Reads the file.

    Raises:
        ValueError: If the header is too long or the file damaged.
    """
    if (header := int.from_bytes(start, "little")) > LIMIT:
        raise ValueError(
            f"{name} is not a safetensors file, or one whose header of {header >> 20} MiB is "
            f"larger than the limit of {LIMIT >> 20} MiB"
        )
    try:
        return parse()
    except Exception as error:  # safetensors has its own errors
        raise ValueError(
            f"{name} is truncated or not a safetensors file ({error!s:.200}); get it again"
        ) from None


def load_arrays(
    path: Path,
    what: str,
    remedy: str,
    wanted: Collection[str] | None,
    limit: int = ARRAYS_LIMIT,
    taken: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> dict[str, Any]:
    """Read arrays of an .npz file, one at a time.

    Objects are not unpickled.

    Args:
        path: The file.
        what: What the file is, for error messages.
        remedy: What to do about a wrong file, for error messages.
        wanted: Names of the arrays to read; None reads all.
        limit: Most bytes of the arrays that are read.
        taken: Applied to each array; its result is kept in place of the array.

    Returns:
        {name: array}, with None for arrays that were not wanted, since they may fill
        the memory.

    Raises:
        ValueError: If the file is damaged, or the arrays are larger than `limit`.
    """
    try:
        with open_zip(path, limit, wanted) as archive:
            arrays: dict[str, Any] = {}
            for part in archive.infolist():
                name = part.filename.removesuffix(".npy")
                arrays[name] = None
                if wanted is None or name in wanted:
                    arrays[name] = taken(_read_array(archive, part, limit))
            return arrays
    except Exception as error:  # zipfile and NumPy raise many kinds for broken bytes
        raise ValueError(
            f"{what} {path} cannot be read as an .npz file: {error!s:.200}; {remedy}"
        ) from None


def _read_array(archive: zipfile.ZipFile, part: zipfile.ZipInfo, limit: int) -> np.ndarray:
    """Read one array.

    Raises:
        ValueError: If it declares more than `limit` bytes, which NumPy would allocate
            unread.
    """
    with archive.open(part) as file:
        # Header.
        if np.lib.format.read_magic(file) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)

        if math.prod(shape) * dtype.itemsize > limit:
            raise ValueError(
                f"it declares an array of {shape} {dtype!s:.20}, "
                f"more than the limit of {limit >> 20} MiB"
            )

        # Array.
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def open_zip(path: Path, limit: int, wanted: Collection[str] | None = None) -> zipfile.ZipFile:
    """Open a zip archive.

    Args:
        path: The archive.
        limit: Most bytes that the wanted files unpack to. zipfile itself stops reading
            a file at the size in the archive's list.
        wanted: Names, without `.npy`, of the files that will be read; None: all.

    Raises:
        ValueError: If the archive is damaged or too large.
    """
    # List of files.
    with open_file(path) as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # as ZipFile reads it
    if end is None:
        raise ValueError("it is not a complete zip archive")
    if end[zipfile._ECD_SIZE] > LIMIT:  # type: ignore[attr-defined]
        raise ValueError("it lists too many files")

    # Sizes.
    archive = zipfile.ZipFile(path)
    total = 0
    for part in archive.infolist():
        if wanted is None or part.filename.removesuffix(".npy") in wanted:
            total += part.file_size

    if total > limit:
        archive.close()
        raise ValueError(f"it unpacks to more than {limit >> 20} MiB, the limit")
    return archive
