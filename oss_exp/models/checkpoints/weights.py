"""The weights of a checkpoint: read without running code, hashed, or random in their place.

Files are recognised by their content, not by their name: safetensors, torch's files through its
loader of tensors alone, and pickles of EDM through `safe_pickle`.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue, TypeAdapter
from torch import Tensor, nn

from oss_exp.files import load_record, load_safetensors, open_zip, read_text
from oss_exp.models.checkpoints import safe_pickle
from oss_exp.models.checkpoints.location import UNTRAINED, locate, read_index, spelled, trained_in
from oss_exp.models.checkpoints.sets import Sets, Translate, fitting, named, sets_in

__all__ = [
    "UNTRAINED",
    "digest",
    "file_sha256",
    "locate",
    "randomise",
    "read",
    "read_for",
    "spelled",
    "trained_in",
    "xavier",
]

# Settings and numbers that trainings save beside their weights; stand-ins take their place.
DATA = re.compile(
    r"(argparse|collections|datetime|lightning|numpy|omegaconf|pathlib|pytorch_lightning|typing)\..*"
    r"|builtins\.(bool|dict|float|int|list|set|str|tuple)"
)

# Files of other kinds, by their beginning.
OTHER_KINDS = {
    b"GGUF": "a GGUF file, which is quantised",
    b"version https://git-lfs": "a pointer of Git LFS and not yet the file itself (git lfs pull)",
    b"\x89HDF": "an HDF5 file",
    b"<": "a page of the web",
}
LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled


def read(path: Path, weights_set: str | None = None) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint by its key. No code is run.

    Torch's zip files have checksums, which are compared, and so is the SHA-256 beside any file:
    `FILE.sha256` as sha256sum writes it, or `x.json` of `x.safetensors` as this program does.
    Without one, safetensors, pickles and torch's old files reveal damage to their structure, but
    not to their numbers.

    Args:
        path: The file, or an index of shards.
        weights_set: Name of the set, if the file has several; None for the averaged one.

    Raises:
        ValueError: If the file is cut short, damaged, of another kind, or holds more than tensors.
    """
    return named(_sets(path), path, weights_set)


def read_for(
    path: Path, own: Mapping[str, Tensor], translate: Translate, weights_set: str | None, model: str
) -> Mapping[str, Tensor]:
    """Return a checkpoint's tensors for the network with the weights `own`, as in `fitting`."""
    return fitting(_sets(path), path, own, translate, weights_set, model)


def _sets(path: Path) -> Sets:
    _check_hash(path)
    return sets_in(_content(path), path)


# ------------------------------------------------------------------------------------------------
# Hashes
# ------------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and numbers, in whatever order and file."""
    sha256 = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key]
        sha256.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def _check_hash(path: Path) -> None:
    """Raise ValueError if a hash beside a file is not the file's."""
    actual = None
    for beside, expected in _expected_hashes(path):
        actual = actual or file_sha256(path)
        if actual != expected:
            raise ValueError(
                f"checkpoint {path} is damaged or was replaced: its SHA-256 is {actual[:12]}..., "
                f"{beside.name} says {expected[:12]}...; download or make it again"
            )


def _expected_hashes(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files beside a checkpoint that have its hash, with the hash."""
    beside = path.with_name(f"{path.name}.sha256")
    if beside.is_file():
        yield beside, (read_text(beside, "checksum").split() or [""])[0].lower()
    beside = path.with_suffix(".json")
    if path.suffix == ".safetensors" and beside.is_file():
        kind = TypeAdapter(JsonValue)
        record = load_record(beside, kind, "provenance of checkpoint", "restore the file")
        if isinstance(record, dict) and "sha256" in record:
            yield beside, str(record["sha256"])


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def _content(path: Path) -> Any:
    """Return the content of a file, or of all shards of an index."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.lstrip().startswith(b"{"):
        return _sharded(path)
    return _single(path, head)


def _single(path: Path, head: bytes) -> Any:
    """Return the content of a file that begins with `head`."""
    if head[8:9] == b"{":  # after the length of this header
        return load_safetensors(path, "checkpoint")
    if head.startswith(b"PK") or LEGACY in head[:32]:
        return _torch(path, zipped=head.startswith(b"PK"))
    if head.startswith(b"\x80"):
        return safe_pickle.load(path)

    # No checkpoint.
    reason = "is cut short, or neither safetensors, a torch file nor a pickle"
    if not head:
        reason = "is empty"
    for start, kind in OTHER_KINDS.items():
        if head.lstrip().startswith(start):
            reason = f"is {kind}"
            break
    raise ValueError(f"checkpoint {path} {reason}; download it again")


def _sharded(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all shards of an index."""
    shards = read_index(index)
    tensors = {}
    for name in sorted(set(shards.values())):
        # One shard.
        shard = index.parent / name
        if not shard.is_file():
            raise FileNotFoundError(
                f"shard {shard} of {index.name} does not exist; download all shards into one folder"
            )
        _check_hash(shard)
        with shard.open("rb") as file:
            head = file.read(64)
        content = named(sets_in(_single(shard, head), shard), shard)

        # Its tensors, as far as the index has them there.
        for key, value in content.items():
            if shards.get(key) == name:
                tensors[key] = value

    missing = sorted(shards.keys() - tensors.keys())
    if missing:
        raise ValueError(
            f"the shards of {index} lack {len(missing)} weights, first {missing[0]}; "
            "download them again"
        )
    return tensors


# ------------------------------------------------------------------------------------------------
# Torch's files
# ------------------------------------------------------------------------------------------------


class _AnotherKind(Exception):
    """An intact file that holds no weights."""


def _torch(path: Path, zipped: bool) -> Any:
    """Return the content of a torch file, through torch's loader of tensors alone."""
    try:
        _refuse_bytearrays(path)
        if zipped:
            _check_zip(path)
            return _load_zip(path)
        with safe_pickle.Bounded(path) as file:
            return torch.load(file, map_location="cpu", weights_only=True)

    except pickle.UnpicklingError as error:
        # Torch's own message advises to trust the file.
        request = re.search(
            r"(?i)(?:global|class|function)(?::? GLOBAL)? <?([\w.]+\.[\w.]+)", str(error)
        )
        damage = "" if zipped or request else "is damaged or "  # zip files passed their checksums
        name = f" ({request[1]:.100})" if request else ""
        raise ValueError(
            f"checkpoint {path} {damage}holds more than tensors{name}, and nothing of it was run; "
            "give a file of weights alone, as torch.save(model.state_dict(), FILE) writes it, "
            "or download it again"
        ) from None

    except _AnotherKind as error:
        raise ValueError(f"checkpoint {path} is {error}; give a file of weights alone") from None

    except Exception as error:  # zipfile and torch raise many kinds for broken bytes
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"checkpoint {path} is damaged ({reason:.200}); download it again"
        ) from None


def _load_zip(path: Path) -> Any:
    """Load a zip file, with stand-ins for the settings and numbers beside its weights."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        stand_ins: list[Any] = []
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
            if DATA.fullmatch(name):
                stand_ins.append((safe_pickle.Ignored, name))
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)


def _refuse_bytearrays(path: Path) -> None:
    """Raise _AnotherKind for a file that could make torch allocate a bytearray of any size."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(b"bytearray") >= 0:
            raise _AnotherKind("one that asks for memory")


def _check_zip(path: Path) -> None:
    """Raise an error for wrong checksums, which torch ignores, and for other kinds of archives."""
    with open_zip(path, path.stat().st_size) as archive:  # nothing in it is compressed
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        sizes = {part.filename.rpartition("/")[2]: part.file_size for part in archive.infolist()}
    if "constants.pkl" in sizes:
        raise _AnotherKind("a program (TorchScript)")
    if "data.pkl" not in sizes:
        raise _AnotherKind("a zip archive of something else than a torch file")
    if sizes["data.pkl"] > safe_pickle.STEPS:
        limit = safe_pickle.STEPS >> 20
        raise _AnotherKind(f"a list of more than {limit} MiB of names, more than is read")


# ------------------------------------------------------------------------------------------------
# Random weights
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Fill all parameters, equally for every dtype and device.

    Signals keep their size and nothing is zero: matrices and kernels get N(0, 1 / fan-in), gains
    (`weight` of one dimension) 1 + 0.2 N, the others 0.1 N. Buffers are tables of the architecture,
    and stay.
    """
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.ndim > 1:
            values /= prod(parameter.shape[1:]) ** 0.5
        elif parameter.ndim == 1 and name.rpartition(".")[2] == "weight":
            values = 1 + 0.2 * values
        else:
            values *= 0.1
        parameter.copy_(values)


def xavier(module: nn.Module) -> None:
    """Initialise a linear layer as the authors of transformers do.

    Signals keep their size, which torch's default halves.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
