"""Weights of published checkpoints: where they are, what they hold, and random ones in their place.

Files are known by what is in them, not by what they are called, and none can run code: safetensors, torch's files
through its loader of tensors alone, and pickles of EDM through `safe_pickle`.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from pydantic import JsonValue, TypeAdapter, field_validator
from torch import Tensor, nn

from oss_exp.files import ASSETS, Record, load_record, load_safetensors, open_zip, read_text
from oss_exp.models.checkpoints import safe_pickle
from oss_exp.models.checkpoints.sets import Sets, Translate, fitting, named, sets_in

HUB_ID = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?"
)
ENDINGS = {
    ".safetensors",
    ".pt",
    ".pth",
    ".bin",
    ".ckpt",
    ".pkl",
    ".json",
}  # owner/name.pt is a file that is missing
UNTRAINED = "untrained"  # in place of a checkpoint: the weights as initialised, for training
DATA = re.compile(  # settings and numbers that trainings keep beside their weights, which stand-ins take the place of
    r"(argparse|collections|datetime|lightning|numpy|omegaconf|pathlib|pytorch_lightning|typing)\..*"
    r"|builtins\.(bool|dict|float|int|list|set|str|tuple)"
)
KINDS = {  # what else people are given: a file by how it begins
    b"GGUF": "a GGUF file, which is quantised",
    b"version https://git-lfs": "a pointer of Git LFS and not yet the file itself (git lfs pull)",
    b"\x89HDF": "an HDF5 file",
    b"<": "a page of the web",
}
MOST_TENSORS = 200_000  # of an index of shards; the largest public models have some ten thousand
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


def locate(
    checkpoint: str,
    files: Sequence[str],
    source: str,
    setting: str = "model.checkpoint",
    own: bool = False,
) -> Path:
    """A file; a shipped one; the first of `files` in a folder, or in the hub's repository `owner/name[@revision]`.

    Each of the files may also be there in shards, as .bin or in half precision. Of an index of shards, all shards are
    fetched too. own: a folder may be a run of ours, as `trained_in` takes it. FileNotFoundError says what is missing,
    why, and `source`: where the public checkpoint is had. setting: the configuration's name of `checkpoint`.
    """
    if checkpoint == UNTRAINED:
        raise ValueError(
            "this model is made of published parts, which are not trained here; choose another model"
        )
    remedy = (
        f"the public checkpoint is at {source}: download it and set {setting}=FILE, or set model.size=tiny to try "
        "without it"
    )
    path = Path(checkpoint).expanduser()
    for file in (path, ASSETS / checkpoint):
        if file.is_file():
            return file
    if path.is_dir():
        found = next((path / file for file in spelled(files) if (path / file).is_file()), None)
        if found is None and own:
            return trained_in(path)
        if found is None:
            raise FileNotFoundError(
                f"checkpoint folder {path} has none of {', '.join(files)}; {remedy}"
            )
        return found
    match = HUB_ID.fullmatch(checkpoint)
    if match is None or path.suffix in ENDINGS:
        raise FileNotFoundError(
            f"checkpoint {checkpoint} is no file, folder or hub id (owner/name); {remedy}"
        )
    found, reason = _download(match["repository"], match["revision"], spelled(files))
    if found is None:
        wanted = " or ".join(files)
        raise FileNotFoundError(
            f"checkpoint {checkpoint}: cannot get {wanted} from the hub, {reason}; {remedy}"
        )
    return found


def spelled(files: Sequence[str]) -> list[str]:
    """The names of `files`, then those under which diffusers and transformers save the same weights."""
    found = dict.fromkeys(files)
    for file in files:
        stem = file.removesuffix(".safetensors")
        if stem != file:
            folder, _, name = stem.rpartition("/")
            older = f"{folder}/pytorch_model".lstrip("/") if name == "model" else stem
            found |= dict.fromkeys(
                [f"{file}.index.json", f"{older}.bin", f"{older}.bin.index.json"]
            )
            found |= dict.fromkeys(
                [f"{stem}.fp16.safetensors", f"{file}.index.fp16.json", f"{older}.fp16.bin"]
            )
    return list(found)


def trained_in(folder: Path) -> Path:
    """The only file of weights in a folder, as task=pretrain leaves it, or else the last checkpoint of a training.

    FileNotFoundError where there is none, ValueError where there are several.
    """
    files = sorted(
        path for path in folder.iterdir() if path.suffix in ENDINGS - {".json"} and path.is_file()
    )
    files = sorted(folder.glob("*.index*.json")) or files
    if not files and (last := folder / "checkpoints" / "last.ckpt").is_file():
        return last
    if not files:
        raise FileNotFoundError(
            f"checkpoint folder {folder} has no weights ({', '.join(sorted(ENDINGS - {'.json'}))}), nor a run's "
            "checkpoints/last.ckpt; give the file of weights"
        )
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:8])
        raise ValueError(
            f"checkpoint folder {folder} has {len(files)} files of weights ({names:.400}); give one of them"
        )
    return files[0]


def _download(
    repository: str, revision: str | None, files: Sequence[str]
) -> tuple[Path | None, str]:
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
        return Path(
            hf_hub_download(repository, file, revision=revision, local_files_only=unreachable)
        )

    for file in files:
        try:
            path = fetch(file)
            if ".index." in file:
                for shard in _shards(path).values():
                    fetch(str(PurePosixPath(file).with_name(shard)))
            return path, ""
        except Exception as error:  # its HTTP library's too, which differs by version
            first_line = f"which fails: {str(error).partition(chr(10))[0]}"
            reason = next(
                (text for kind, text in reasons.items() if isinstance(error, kind)), first_line
            )
            unreachable = isinstance(
                error, utils.LocalEntryNotFoundError
            )  # do not wait for the hub again
            if not isinstance(error, utils.EntryNotFoundError):
                break
    return None, reason


# --------------------------------------------------------------------------------------------------------------
# What
# --------------------------------------------------------------------------------------------------------------


def read(path: Path, weights_set: str | None = None) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its key, the averaged ones where the file has several sets. No code is run.

    ValueError where the file is cut short, damaged, of another kind, or holds more than tensors. A changed byte is
    found in torch's zip files by their checksums, and in every file with its SHA-256 beside it: `FILE.sha256` as
    sha256sum writes it, or `x.json` of `x.safetensors` as this program does. Without one, safetensors, pickles and
    torch's old files show damage to their structure but not to their numbers.
    """
    return named(_sets(path), path, weights_set)


def read_for(
    path: Path, own: Mapping[str, Tensor], translate: Translate, weights_set: str | None, model: str
) -> Mapping[str, Tensor]:
    """A checkpoint's tensors for the network with the weights `own`; the arguments and ValueErrors of `fitting`."""
    return fitting(_sets(path), path, own, translate, weights_set, model)


def _sets(path: Path) -> Sets:
    _check_hash(path)
    return sets_in(_content(path), path)


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
        yield beside, (read_text(beside, "checksum").split() or [""])[0].lower()
    beside = path.with_suffix(".json")
    if path.suffix == ".safetensors" and beside.is_file():
        record = load_record(
            beside, TypeAdapter(JsonValue), "provenance of checkpoint", "restore the file"
        )
        if isinstance(record, dict) and "sha256" in record:
            yield beside, str(record["sha256"])


def _content(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(64)
    if head.lstrip().startswith(b"{"):
        return _sharded(path)
    return _single(path, head)


def _single(path: Path, head: bytes) -> Any:
    if head[8:9] == b"{":  # after the length of this header
        return load_safetensors(path, "checkpoint")
    if head.startswith(b"PK") or LEGACY in head[:32]:
        return _torch(path, zipped=head.startswith(b"PK"))
    if head.startswith(b"\x80"):
        return safe_pickle.load(path)
    kind = next((kind for start, kind in KINDS.items() if head.lstrip().startswith(start)), None)
    reason = (
        "is empty"
        if not head
        else "is cut short, or neither safetensors, a torch file nor a pickle"
    )
    raise ValueError(f"checkpoint {path} {f'is {kind}' if kind else reason}; download it again")


def _torch(path: Path, zipped: bool) -> Any:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data.find(b"bytearray") >= 0:  # which torch would make, of any size
                raise _AnotherKind("one that asks for memory")
        if not zipped:
            with safe_pickle.Bounded(path) as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        _check_zip(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            known: list[Any] = [
                (safe_pickle.Ignored, name) for name in asked if DATA.fullmatch(name)
            ]
            with torch.serialization.safe_globals(known):
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's text advises to trust the file
        asked = re.search(
            r"(?i)(?:global|class|function)(?::? GLOBAL)? <?([\w.]+\.[\w.]+)", str(error)
        )
        damage = (
            "" if zipped or asked else "is damaged or "
        )  # the checksums of a zip file have been compared
        what = f" ({asked[1]:.100})" if asked else ""
        raise ValueError(
            f"checkpoint {path} {damage}holds more than tensors{what}, and nothing of it was run; give a file of "
            "weights alone, as torch.save(model.state_dict(), FILE) writes it, or download it again"
        ) from None
    except _AnotherKind as error:
        raise ValueError(f"checkpoint {path} is {error}; give a file of weights alone") from None
    except Exception as error:  # zipfile and torch raise many kinds for broken bytes
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"checkpoint {path} is damaged ({reason:.200}); download it again"
        ) from None


class _AnotherKind(Exception):
    """A whole zip archive that holds no weights."""


def _check_zip(path: Path) -> None:
    """Raise what is wrong with a torch file: its checksums, which torch does not compare, its sizes, or its kind."""
    with open_zip(path, path.stat().st_size) as archive:  # nothing in it is compressed
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        sizes = {part.filename.rpartition("/")[2]: part.file_size for part in archive.infolist()}
    if "constants.pkl" in sizes:
        raise _AnotherKind("a program (TorchScript)")
    if "data.pkl" not in sizes:
        raise _AnotherKind("a zip archive of something else than a torch file")
    if sizes["data.pkl"] > safe_pickle.STEPS:
        raise _AnotherKind(
            f"a list of more than {safe_pickle.STEPS >> 20} MiB of names, more than is read"
        )


def _shards(index: Path) -> dict[str, str]:
    """The file of every key."""
    remedy = "download it again, or give a file of weights"
    return load_record(index, ShardIndex, "index of shards", remedy, fields=MOST_TENSORS).weight_map


def _sharded(index: Path) -> dict[str, Tensor]:
    shards, tensors = _shards(index), {}
    for name in sorted(set(shards.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise FileNotFoundError(
                f"shard {shard} of {index.name} does not exist; download all shards into one folder"
            )
        _check_hash(shard)
        with shard.open("rb") as file:
            content = _single(shard, file.read(64))
        tensors |= {
            key: each
            for key, each in named(sets_in(content, shard), shard).items()
            if shards.get(key) == name
        }
    if missing := sorted(shards.keys() - tensors.keys()):
        raise ValueError(
            f"the shards of {index} lack {len(missing)} weights, first {missing[0]}; download them again"
        )
    return tensors


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
