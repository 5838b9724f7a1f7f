"""Small networks of prompts whose text encoder is a list of words.

Every word is a feature, so the first linear layer after it is the embedding, which is learned with
the network.

Legend: P prompts, L places for words, W words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oss_exp.checks import require_range
from oss_exp.files import sha256
from oss_exp.models.checkpoints.sets import Translate
from oss_exp.models.network import Network
from oss_exp.models.text.encoders import FluxTextEncoders
from oss_exp.models.text.prompted import Prompted


class Words:
    """A text encoder that marks the words of a prompt.

    Calling it returns `text` (P, L, W), `scale` at every place's word and 0 elsewhere; `mask`
    (P, L), the places that have a word; and `pooled` (P, W), the sum over places.

    Args:
        vocabulary: The W words.
        length: L, the most words in a prompt.
        scale: With sqrt(W), words have the size that a layer's initial weights expect.
        ordered: `text` (P, L, W + L) marks the place too, for networks that ignore the order of
            tokens.
    """

    def __init__(
        self, vocabulary: Sequence[str], length: int, scale: float = 1.0, ordered: bool = False
    ):
        require_range(at_least=1, at_most=10_000, length=length)
        require_range(above=0, at_most=1e6, scale=scale)
        self.numbers = {word: number for number, word in enumerate(vocabulary)}
        self.length = length
        self.scale = scale
        self.ordered = ordered
        self.fingerprint = sha256(repr((list(vocabulary), length, scale, ordered)).encode())

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode P prompts. Raises ValueError for unknown words, and for too many of them."""
        # One mark a word.
        text = torch.zeros(len(prompts), self.length, len(self.numbers))
        for row, prompt in zip(text, prompts, strict=True):
            words = re.findall(r"[\w-]+", prompt.lower())
            unknown = [word for word in words if word not in self.numbers]
            if unknown:
                raise ValueError(
                    f"the model does not know {unknown[0]!r} of prompt {prompt!r}; its words are "
                    f"{', '.join(self.numbers)}"
                )
            if len(words) > self.length:
                raise ValueError(
                    f"prompt {prompt!r} has {len(words)} words, the model reads {self.length}"
                )
            for place, word in enumerate(words):
                row[place, self.numbers[word]] = self.scale

        # Summaries, and places.
        mask = text.any(dim=2)
        pooled = text.sum(dim=1)
        if self.ordered:
            places = self.scale * torch.eye(self.length).expand(len(text), -1, -1)
            text = torch.cat([text, places * mask[:, :, None]], dim=2)
        return {"text": text, "mask": mask, "pooled": pooled}


def named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a network's tensors by the backbone's names, whether or not the file has these."""
    return {f"network.{key.removeprefix('network.')}": value for key, value in tensors.items()}


class Worded(Prompted):
    """A small network of prompts, trained by `task=pretrain` on images with captions.

    Args:
        words: The text encoder.
        encodings: Names of the encoder's tensors that the backbone takes. Each has a last row for
            no prompt.
        backbone: Builds the backbone from those tensors, by name.
        prompts: The prompts that conditions number.
        **network: All other arguments of `Network`.
    """

    def __init__(
        self,
        words: Words | FluxTextEncoders,
        encodings: Sequence[str],
        backbone: Callable[..., nn.Module],
        prompts: Sequence[str] = (),
        **network: Any,
    ):
        tables = words([*prompts, ""])
        super().__init__(
            prompts=prompts,
            encoder_sha256=words.fingerprint,
            backbone=backbone(**{name: tables[name] for name in encodings}),
            **network,
        )

    def _fill(self, path: Path, translate: Translate = named) -> None:
        super()._fill(path, translate)

    def _load(self, checkpoint: str) -> str:
        return sha256(f"{Network._load(self, checkpoint)} {self.encoder_sha256}".encode())
