"""Weights of published checkpoints: where they are, what they hold, and random ones in their place.

Files are known by what is in them, not by what they are called, and none can run code: safetensors, torch's files
through its loader of tensors alone, and pickles of EDM through `safe_pickle`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
import torch
from pydantic import JsonValue, TypeAdapter, field_validator
from torch import Tensor, nn

from oss_exp.files import ASSETS, Record, load_record
from oss_exp.models.checkpoints import safe_pickle
from oss_exp.models.network import UNTRAINED

HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
ENDINGS = {".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".json"}  # owner/name.pt is a file that is missing
CONTAINERS = ("ema", "model_ema", "state_dict", "model")  # a file may hold several: averaged weights first
LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled

# --------------------------------------------------------------------------------------------------------------
# Where
# --------------------------------------------------------------------------------------------------------------


class ShardIndex(Record):
    """model.safetensors.index.json, as the hub has it. weight_map: {key: the file of it}, beside the index."""

    weight_map: dict[str, str]

    @field_validator("weight_map")
    @classmethod
    def _beside(cls, files: dict[str, str]) -> dict[str, str]:
        for file in files.values():
            if file != Path(file).name or not file:
                raise ValueError(f"must name files beside the index, got {file!r:.80}")
        return files


def locate(checkpoint: str, files: Sequence[str], source: str, setting: str = "model.checkpoint") -> Path:
    """A file; a shipped one; the first of `files` in a folder, or in the hub's repository `owner/name[@revision]`.

    Of an index of shards, all shards are fetched too. FileNotFoundError says what is missing, why, and `source`: where
    the public checkpoint is had. setting: the configuration's name of `checkpoint`.
    """
    if checkpoint == UNTRAINED:
        raise ValueError("this model is made of published parts, which are not trained here; choose another model")
    remedy = (
        f"the public checkpoint is at {source}: download it and set {setting}=FILE, or set model.size=tiny to try "
        "without it"
    )
    path = Path(checkpoint).expanduser()
    for file in (path, ASSETS / checkpoint):
        if file.is_file():
            return file
    if path.is_dir():
        found = next((path / file for file in files if (path / file).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"checkpoint folder {path} has none of {', '.join(files)}; {remedy}")
        return found
    match = HUB_ID.fullmatch(checkpoint)
    if match is None or path.suffix in ENDINGS:
        raise FileNotFoundError(f"checkpoint {checkpoint} is no file, folder or hub id (owner/name); {remedy}")
    found, reason = _download(match["repository"], match["revision"], files)
    if found is None:
        wanted = " or ".join(files)
        raise FileNotFoundError(f"checkpoint {checkpoint}: cannot get {wanted} from the hub, {reason}; {remedy}")
    return found


def _download(repository: str, revision: str | None, files: Sequence[str]) -> tuple[Path | None, str]:
    """The first of `files` that the repository has, in the hub's cache; or none and why."""
    from huggingface_hub import hf_hub_download, utils

    reasons = {  # from the narrow to the wide: the first that fits
        utils.GatedRepoError: "which gives it only to those who accepted its licence and logged in (hf auth login)",
        utils.RepositoryNotFoundError: "which has no such public repository",
        utils.RevisionNotFoundError: f"whose repository has no revision {revision}",
        utils.LocalEntryNotFoundError: "which cannot be reached, and it is not in the local cache",
        utils.EntryNotFoundError: "whose repository has no such file",
    }

    reason, unreachable = "", False

    def fetch(file: str) -> Path:
        return Path(hf_hub_download(repository, file, revision=revision, local_files_only=unreachable))

    for file in files:
        try:
            path = fetch(file)
            if file.endswith(".index.json"):
                for shard in _shards(path).values():
                    fetch(str(PurePosixPath(file).with_name(shard)))
            return path, ""
        except Exception as error:  # its HTTP library's too, which differs by version
            first_line = f"which fails: {str(error).partition(chr(10))[0]}"
            reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), first_line)
            unreachable = isinstance(error, utils.LocalEntryNotFoundError)  # do not wait for the hub again
            if not isinstance(error, utils.EntryNotFoundError):
                break
    return None, reason


# --------------------------------------------------------------------------------------------------------------
# What
# --------------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its key, the averaged ones where the file has several sets. No code is run.

    ValueError where the file is cut short, damaged, of another kind, or holds more than tensors. A changed byte is
    found in torch's zip files by their checksums, and in every file with its SHA-256 beside it: `FILE.sha256` as
    sha256sum writes it, or `x.json` of `x.safetensors` as this program does. Without one, safetensors, pickles and
    torch's old files show damage to their structure but not to their numbers.
    """
    _check_hash(path)
    content = _chosen(_content(path))
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no weights by name but a {type(content).__name__}; give a file of weights")
    for key, value in content.items():
        plain = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
        if not (isinstance(key, str) and plain):
            what = f"a {type(value).__name__} at {key!r:.80}" if isinstance(key, str) else "names that are no text"
            raise ValueError(f"{path} holds {what} where only tensors belong; give a file of weights alone")
    return {key: value.detach() for key, value in content.items()}


def file_sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _check_hash(path: Path) -> None:
    found = None
    for beside, expected in _expected(path):
        found = found or file_sha256(path)
        if found != expected:
            raise ValueError(
                f"checkpoint {path} is damaged or was replaced: its SHA-256 is {found[:12]}..., {beside.name} says "
                f"{expected[:12]}...; download or make it again"
            )


def _expected(path: Path) -> Iterator[tuple[Path, str]]:
    """Files beside it that vouch for its bytes, and their hashes."""
    beside = path.with_name(f"{path.name}.sha256")
    if beside.is_file():
        yield beside, (beside.read_text(errors="replace").split() or [""])[0].lower()
    beside = path.with_suffix(".json")
    if path.suffix == ".safetensors" and beside.is_file():
        record = load_record(beside, TypeAdapter(JsonValue), "provenance of checkpoint", "restore the file")
        if isinstance(record, dict) and "sha256" in record:
            yield beside, str(record["sha256"])


def _content(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(32)
    if head[8:9] == b"{":  # after the length of this header
        return _safetensors(path)
    if head.startswith(b"PK") or LEGACY in head:
        return _torch(path)
    if head.startswith(b"\x80"):
        return safe_pickle.tensors_of(_chosen(safe_pickle.load(path)), path)
    if head.lstrip().startswith(b"{"):
        return _sharded(path)
    reason = "is empty" if not head else "is cut short, or neither safetensors, a torch file nor a pickle"
    raise ValueError(f"checkpoint {path} {reason}; download it again")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # its own kinds
        raise ValueError(f"checkpoint {path} is damaged ({error}); download it again") from None


def _torch(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch itself does not look at the checksums
                    raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        with torch.serialization.safe_globals([argparse.Namespace]):  # settings that some keep beside their weights
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's text advises to trust the file
        raise ValueError(
            f"checkpoint {path} is damaged or holds more than tensors, and nothing of it was run; "
            "give a file of weights alone"
        ) from None
    except Exception as error:  # zipfile and torch raise many kinds for broken bytes
        reason = str(error).partition("\n")[0]
        raise ValueError(f"checkpoint {path} is damaged ({reason:.200}); download it again") from None


def _shards(index: Path) -> dict[str, str]:
    """The file of every key."""
    return load_record(index, ShardIndex, "index of shards", "download it again, or give a file of weights").weight_map


def _sharded(index: Path) -> dict[str, Tensor]:
    shards, tensors = _shards(index), {}
    for name in sorted(set(shards.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise FileNotFoundError(
                f"shard {shard} of {index.name} does not exist; download all shards into one folder"
            )
        _check_hash(shard)
        tensors |= {key: tensor for key, tensor in _safetensors(shard).items() if shards.get(key) == name}
    if missing := sorted(shards.keys() - tensors.keys()):
        raise ValueError(f"the shards of {index} lack {len(missing)} weights, first {missing[0]}; download them again")
    return tensors


def _chosen(content: Any) -> Any:
    """The innermost set of weights; a file may hold itself, so as many levels as there are names."""
    for _ in CONTAINERS:
        if not isinstance(content, dict):
            break
        inner = (content.get(name) for name in CONTAINERS)
        content = next((each for each in inner if isinstance(each, dict | safe_pickle.Module)), content)
    return content


# --------------------------------------------------------------------------------------------------------------
# In their place, and by which name
# --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Fill all parameters, the same for every dtype and device: signals keep their size, nothing is zero.

    Matrices and kernels: N(0, 1 / fan-in). Gains (`weight` of one dimension): 1 + 0.2 N. The rest: 0.1 N. Buffers are
    tables that the architecture fixes, and stay.
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
    """A linear layer as transformers' authors begin training: signals keep their size, which torch's default halves."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and numbers: the same whatever file they were in, and in which order."""
    found = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key]
        found.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
