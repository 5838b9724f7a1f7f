"""Prompts: lists of them in files, and their encodings, which a text encoder makes once and a folder keeps.

A model of text takes the number of a prompt in the run's list as its condition, as other models take the number of a
class, and looks its encoding up; so no text encoder is in memory while it samples. An encoding is whatever the encoders
of a family give, tensors by name. Legend: P prompts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Protocol

import safetensors.torch
import torch
from pydantic import FailFast
from safetensors import SafetensorError, safe_open
from torch import Tensor

from oss_exp.files import (
    TABLE_LIMIT,
    Record,
    find_asset,
    load_record,
    load_records,
    read_text,
    sha256,
    write_atomically,
)
from oss_exp.models.checkpoints.weights import digest

BATCH = 32  # prompts encoded at a time
REMEDY = "give a text file (.txt) with one prompt a line"

log = logging.getLogger(__name__)


def read_prompts(file: str | Path | Sequence[str]) -> list[str]:
    """The prompts of a path or a shipped file, at least one; or the prompts themselves.

    One a line (.txt); a JSON object with a "prompt" a line (.jsonl, as GenEval's metadata); or COCO's captions (.json),
    the first of every image.
    """
    if not isinstance(file, str | Path):
        return list(file)
    path = find_asset(file, "prompts")
    read = {".json": _captions, ".jsonl": _metadata}.get(path.suffix, _lines)
    prompts = [prompt.strip() for prompt in read(path)]
    if not any(prompts):
        raise ValueError(f"prompts {path} has 0 prompts; {REMEDY}")
    return [prompt for prompt in prompts if prompt]


class TextEncoder(Protocol):
    """prompts (P) -> tensors by name, (P, ...) each. fingerprint: SHA-256, known before its weights are loaded."""

    fingerprint: str

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]: ...


class PromptCache:
    """Encodings on disk, one safetensors file a prompt, found by the hash of the encoder and the prompt.

    folder: null: $OSS_EXP_CACHE/prompts, or ~/.cache/oss_exp/prompts.
    """

    def __init__(self, folder: str | Path | None = None):
        cache = Path(os.environ.get("OSS_EXP_CACHE", "~/.cache/oss_exp"))
        self.folder = Path(folder or cache / "prompts").expanduser()

    def encode(self, encoder: TextEncoder, prompts: Sequence[str]) -> dict[str, Tensor]:
        """prompts (P) -> tensors by name, (P, ...) each. Only prompts that are new to the cache reach the encoder."""
        known = {prompt: self._read(encoder.fingerprint, prompt) for prompt in dict.fromkeys(prompts)}
        new = [prompt for prompt, encoding in known.items() if encoding is None]
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            encodings = {name: tensor.cpu().unbind() for name, tensor in encoder(batch).items()}
            for prompt, *tensors in zip(batch, *encodings.values(), strict=True):
                known[prompt] = dict(zip(encodings, tensors, strict=True))
                self._write(encoder.fingerprint, prompt, known[prompt])
        return {name: torch.stack([known[prompt][name] for prompt in prompts]) for name in known[prompts[0]]}

    def _path(self, fingerprint: str, prompt: str) -> Path:
        return self.folder / f"{sha256(f'{fingerprint} {prompt}'.encode())}.safetensors"

    def _write(self, fingerprint: str, prompt: str, encoding: dict[str, Tensor]) -> None:
        about = {"prompt": prompt, "sha256": digest(encoding)}
        tensors = {name: tensor.contiguous() for name, tensor in encoding.items()}
        write_atomically(self._path(fingerprint, prompt), safetensors.torch.save(tensors, about))

    def _read(self, fingerprint: str, prompt: str) -> dict[str, Tensor] | None:
        """None: it is not there, or damaged."""
        path = self._path(fingerprint, prompt)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                encoding = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
                expected = (file.metadata() or {}).get("sha256")
        except (OSError, SafetensorError):
            encoding, expected = {}, None
        if not encoding or digest(encoding) != expected:
            log.warning("the encoding %s of %r is damaged; it is made again", path, prompt)
            return None
        return encoding


# --------------------------------------------------------------------------------------------------------------
# File formats
# --------------------------------------------------------------------------------------------------------------


class PromptRecord(Record):
    """A line of a .jsonl file."""

    prompt: str


class CaptionsRecord(Record):
    """COCO's captions_*.json: several captions of each image."""

    class Annotation(Record):
        """A caption of an image."""

        image_id: int | str
        caption: str

    annotations: Annotated[list[Annotation], FailFast()]


def _lines(path: Path) -> list[str]:
    return read_text(path, "prompts", TABLE_LIMIT).splitlines()


def _metadata(path: Path) -> list[str]:
    return [line.prompt for line in load_records(path, PromptRecord, "prompts", REMEDY, TABLE_LIMIT)]


def _captions(path: Path) -> list[str]:
    first: dict[int | str, str] = {}
    for annotation in load_record(path, CaptionsRecord, "prompts", REMEDY, TABLE_LIMIT).annotations:
        first.setdefault(annotation.image_id, annotation.caption)
    return list(first.values())
