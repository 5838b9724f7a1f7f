"""Encodings of prompts, which a text encoder makes once and a folder keeps.

A model of text takes the number of a prompt in the run's list as its condition, as other models take the number of a
class, and looks its encoding up; so no text encoder is in memory while it samples. An encoding is whatever the encoders
of a family give, tensors by name. Legend: P prompts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from oss_exp.files import (
    sha256,
    write_atomically,
)
from oss_exp.models.checkpoints.weights import digest

BATCH = 32  # prompts encoded at a time

log = logging.getLogger(__name__)


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
        known = {
            prompt: self._read(encoder.fingerprint, prompt) for prompt in dict.fromkeys(prompts)
        }
        new = [prompt for prompt, encoding in known.items() if encoding is None]
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            encodings = {name: tensor.cpu().unbind() for name, tensor in encoder(batch).items()}
            for prompt, *tensors in zip(batch, *encodings.values(), strict=True):
                known[prompt] = dict(zip(encodings, tensors, strict=True))
                self._write(encoder.fingerprint, prompt, known[prompt])
        return {
            name: torch.stack([known[prompt][name] for prompt in prompts])
            for name in known[prompts[0]]
        }

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
