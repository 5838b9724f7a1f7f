"""The search for a checkpoint's file: by path, in a folder, among shipped files, or on the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pydantic import field_validator

from oss_exp.files import ASSETS, Record, load_record

UNTRAINED = "untrained"  # in place of a checkpoint: the weights as initialised, for training

HUB_ID = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?"
)

# owner/name.pt is a missing file, and no hub id.
ENDINGS = {".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".json"}
WEIGHT_ENDINGS = ENDINGS - {".json"}

MAX_TENSORS = 200_000  # in an index of shards; the largest public models have some ten thousand


def locate(
    checkpoint: str,
    files: Sequence[str],
    source: str,
    setting: str = "model.checkpoint",
    own: bool = False,
) -> Path:
    """Return the file of a checkpoint; it is downloaded if it is on the hub.

    Args:
        checkpoint: A file, the name of a shipped file, a folder, or a repository of the hub as
            `owner/name[@revision]`.
        files: Names to look for in a folder or repository; the first one that exists is taken.
            Each may also exist in shards, as .bin or in half precision.
        source: URL of the public checkpoint, quoted in the error when it is missing.
        setting: Name of `checkpoint` in the configuration, for errors.
        own: The folder may be the output of a training, see `trained_in`.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if checkpoint == UNTRAINED:
        raise ValueError(
            "this model is made of published parts, which are not trained here; "
            "choose another model"
        )
    remedy = (
        f"the public checkpoint is at {source}: download it and set {setting}=FILE, or set "
        "model.size=tiny to try without it"
    )

    # A file.
    path = Path(checkpoint).expanduser()
    for file in (path, ASSETS / checkpoint):
        if file.is_file():
            return file

    # A folder.
    if path.is_dir():
        for name in spelled(files):
            if (path / name).is_file():
                return path / name
        if own:
            return trained_in(path)
        raise FileNotFoundError(
            f"checkpoint folder {path} has none of {', '.join(files)}; {remedy}"
        )

    # A repository.
    match = HUB_ID.fullmatch(checkpoint)
    if match is None or path.suffix in ENDINGS:
        raise FileNotFoundError(
            f"checkpoint {checkpoint} is no file, folder or hub id (owner/name); {remedy}"
        )
    download, reason = _download(match["repository"], match["revision"], spelled(files))
    if download is None:
        raise FileNotFoundError(
            f"checkpoint {checkpoint}: cannot get {' or '.join(files)} from the hub, {reason}; "
            f"{remedy}"
        )
    return download


def spelled(files: Sequence[str]) -> list[str]:
    """Return the names, then those that diffusers and transformers give the same weights."""
    names = list(files)
    for file in files:
        stem = file.removesuffix(".safetensors")
        if stem == file:
            continue
        folder, _, name = stem.rpartition("/")
        older = f"{folder}/pytorch_model".lstrip("/") if name == "model" else stem
        names += [f"{file}.index.json", f"{older}.bin", f"{older}.bin.index.json"]
        names += [f"{stem}.fp16.safetensors", f"{file}.index.fp16.json", f"{older}.fp16.bin"]
    return list(dict.fromkeys(names))


def trained_in(folder: Path) -> Path:
    """Return the only file of weights in a folder, else the last checkpoint of its training.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are several.
    """
    # An index of shards stands for its shards.
    files = sorted(folder.glob("*.index*.json"))
    if not files:
        for path in sorted(folder.iterdir()):
            if path.suffix in WEIGHT_ENDINGS and path.is_file():
                files.append(path)
    last = folder / "checkpoints" / "last.ckpt"
    if not files and last.is_file():
        return last

    # Exactly one.
    if not files:
        raise FileNotFoundError(
            f"checkpoint folder {folder} has no weights ({', '.join(sorted(WEIGHT_ENDINGS))}), "
            "nor a run's checkpoints/last.ckpt; give the file of weights"
        )
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:8])
        raise ValueError(
            f"checkpoint folder {folder} has {len(files)} files of weights ({names:.400}); "
            "give one of them"
        )
    return files[0]


class ShardIndex(Record):
    """model.safetensors.index.json, as on the hub.

    Attributes:
        weight_map: The file of every key, beside the index.
    """

    weight_map: dict[str, str]

    @field_validator("weight_map")
    @classmethod
    def _beside(cls, files: dict[str, str]) -> dict[str, str]:
        for file in files.values():
            if file != Path(file).name or not file:
                raise ValueError(f"must name files beside the index, got {file!r:.80}")
        return files


def read_index(index: Path) -> dict[str, str]:
    """Return the file of every key in an index of shards."""
    remedy = "download it again, or give a file of weights"
    return load_record(index, ShardIndex, "index of shards", remedy, fields=MAX_TENSORS).weight_map


def _download(
    repository: str, revision: str | None, files: Sequence[str]
) -> tuple[Path | None, str]:
    """Return the first of the files that a repository has, in the hub's cache.

    All shards of an index are downloaded too. Without any file, None and the reason are returned.
    """
    from huggingface_hub import hf_hub_download, utils

    # From the narrow to the wide: the first that fits is quoted.
    reasons = {
        utils.GatedRepoError: "which gives it only to those who accepted its licence and logged in "
        "(hf auth login)",
        utils.RepositoryNotFoundError: "which has no such public repository",
        utils.RevisionNotFoundError: f"whose repository has no revision {revision}",
        utils.LocalEntryNotFoundError: "which cannot be reached, and it is not in the local cache",
        utils.EntryNotFoundError: "whose repository has no such file",
    }
    reason = ""
    unreachable = False

    def fetch(file: str) -> Path:
        path = hf_hub_download(repository, file, revision=revision, local_files_only=unreachable)
        return Path(path)

    for file in files:
        try:
            path = fetch(file)
            if ".index." in file:
                for shard in read_index(path).values():
                    fetch(str(PurePosixPath(file).with_name(shard)))
            return path, ""
        except Exception as error:  # the kinds of its HTTP library differ by version
            reason = f"which fails: {str(error).partition(chr(10))[0]}"
            for kind, text in reasons.items():
                if isinstance(error, kind):
                    reason = text
                    break

            # Do not wait for an unreachable hub twice.
            unreachable = isinstance(error, utils.LocalEntryNotFoundError)
            if not isinstance(error, utils.EntryNotFoundError):
                break
    return None, reason
