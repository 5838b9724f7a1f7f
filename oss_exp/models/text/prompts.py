"""A cache of text encodings on disk, so that every prompt is encoded once.

The condition of a text model is the number of a prompt in the run's list, as the condition of
other models is the number of a class. The model looks the prompt's encoding up, so no text encoder
is in memory while it samples. An encoding is whatever the encoders of a family return: tensors by
name.

Legend: P prompts.
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

from oss_exp.files import sha256, write_atomically
from oss_exp.models.checkpoints.weights import digest

BATCH = 32  # prompts encoded at a time

log = logging.getLogger(__name__)


class TextEncoder(Protocol):
    """A function from P prompts to tensors (P, ...) by name.

    Attributes:
        fingerprint: Its SHA-256, which is available before weights are loaded.
    """

    fingerprint: str

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]: ...


class PromptCache:
    """Encodings on disk: one safetensors file for every encoder and prompt, named by their hash.

    Args:
        folder: None for $OSS_EXP_CACHE/prompts, or ~/.cache/oss_exp/prompts.
    """

    def __init__(self, folder: str | Path | None = None):
        cache = Path(os.environ.get("OSS_EXP_CACHE", "~/.cache/oss_exp"))
        self.folder = Path(folder or cache / "prompts").expanduser()

    def encode(self, encoder: TextEncoder, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the encodings of P prompts: tensors (P, ...) by name.

        Only prompts that are not in the cache are passed to the encoder.
        """
        # The cache.
        encodings: dict[str, dict[str, Tensor]] = {}
        missing = []
        for prompt in dict.fromkeys(prompts):
            encoding = self._read(encoder.fingerprint, prompt)
            if encoding is None:
                missing.append(prompt)
            else:
                encodings[prompt] = encoding

        # The encoder.
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            tensors = {name: tensor.cpu() for name, tensor in encoder(batch).items()}
            for prompt, *rows in zip(batch, *tensors.values(), strict=True):
                encodings[prompt] = dict(zip(tensors, rows, strict=True))
                self._write(encoder.fingerprint, prompt, encodings[prompt])

        # One table for every name.
        tables = {}
        for name in encodings[prompts[0]]:
            tables[name] = torch.stack([encodings[prompt][name] for prompt in prompts])
        return tables

    def _path(self, fingerprint: str, prompt: str) -> Path:
        return self.folder / f"{sha256(f'{fingerprint} {prompt}'.encode())}.safetensors"

    def _write(self, fingerprint: str, prompt: str, encoding: dict[str, Tensor]) -> None:
        about = {"prompt": prompt, "sha256": digest(encoding)}
        tensors = {name: tensor.contiguous() for name, tensor in encoding.items()}
        write_atomically(self._path(fingerprint, prompt), safetensors.torch.save(tensors, about))

    def _read(self, fingerprint: str, prompt: str) -> dict[str, Tensor] | None:
        """Return an encoding, or None if it is missing or damaged."""
        path = self._path(fingerprint, prompt)
        if not path.is_file():
            return None

        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                encoding = {name: file.get_tensor(name) for name in names}
                expected = (file.metadata() or {}).get("sha256")
        except (OSError, SafetensorError):
            encoding = {}
            expected = None

        if not encoding or digest(encoding) != expected:
            log.warning("the encoding %s of %r is damaged; it is made again", path, prompt)
            return None
        return encoding
