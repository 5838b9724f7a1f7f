"""Text encoders as released samplers use them, from files or with random weights.

They fill the cache of encodings once, and are not in memory while a model samples.

Legend: P prompts, L tokens, D features.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oss_exp.checks import require_range
from oss_exp.files import find_asset, sha256
from oss_exp.models.checkpoints.weights import digest, randomise, read
from oss_exp.models.text.prompts import PromptCache
from oss_exp.validation import shown

NAMED = 5  # prompts that are cut, in warnings
log = logging.getLogger(__name__)

Answer = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]
"""The encodings by name that a model makes of tokens (P, L) and their mask (P, L)."""


class TextModel:
    """A text encoder of transformers, from P prompts to tensors (P, ...) by name.

    Args:
        tokenizer: Its tokenizer.
        weights: SHA-256 of its weights.
        load: Builds it, once there is a prompt to encode.
        answer: Selects the encodings from its output.
        length: L, the number of tokens that prompts are padded or cut to.
    """

    def __init__(
        self,
        tokenizer: Any,
        weights: str,
        load: Callable[[], nn.Module],
        answer: Answer,
        length: int,
    ):
        self.tokenizer = tokenizer
        self.load = load
        self.answer = answer
        self.length = length

        # Everything that determines an encoding.
        vocabulary = sorted(tokenizer.get_vocab().items())
        empty = self._tokens([""])["input_ids"].tolist()
        identity = json.dumps([answer.__name__, weights, vocabulary, empty])
        self.fingerprint = sha256(identity.encode())

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokens = self._tokens(prompts)
        return self.answer(self._model, tokens["input_ids"], tokens["attention_mask"])

    @cached_property
    def _model(self) -> nn.Module:
        return self.load().eval()

    def cuts(self, prompts: Sequence[str]) -> dict[str, str]:
        """Return the end that is cut off, for every prompt with too many tokens."""
        cuts = {}
        for prompt in dict.fromkeys(prompts):
            if len(prompt.encode()) < self.length - 2:  # a token is a byte at least
                continue
            tokens = self.tokenizer([prompt], verbose=False)["input_ids"][0]
            if len(tokens) > self.length:  # the last one marks the end
                cuts[prompt] = self.tokenizer.decode(tokens[self.length - 1 : -1]).strip()
        return cuts

    def _tokens(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        padded = {
            "padding": "max_length",
            "max_length": self.length,
            "truncation": True,
            "return_tensors": "pt",
        }
        return self.tokenizer(list(prompts), return_attention_mask=True, **padded)


def encode(encoder: TextModel, prompts: Sequence[str]) -> tuple[dict[str, Tensor], str]:
    """Return the encodings (P, ...) of prompts by name, through the cache, and the fingerprint.

    A warning names the prompts that are cut. Pass the encoder without storing it, so that its
    memory is free afterwards.
    """
    cuts = encoder.cuts(prompts)
    for prompt, end in list(cuts.items())[:NAMED]:
        log.warning(
            "the text encoder cuts the prompt %s: it does not see %s", shown(prompt), shown(end)
        )
    if len(cuts) > NAMED:
        log.warning("the text encoder cuts %d more prompts", len(cuts) - NAMED)
    return PromptCache().encode(encoder, prompts), encoder.fingerprint


# ------------------------------------------------------------------------------------------------
# T5
# ------------------------------------------------------------------------------------------------


def open_t5(weights: Path, tokenizer: Path, answer: Answer, length: int) -> TextModel:
    """Return T5's encoder.

    Args:
        weights: File of its weights; config.json is beside it.
        tokenizer: Folder of its tokenizer.
        answer: Selects the encodings from its output.
        length: Number of tokens that prompts are padded or cut to.
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    config = T5Config.from_pretrained(weights.parent)

    def load() -> nn.Module:
        model = loaded(T5EncoderModel, config, weights)
        return model.float() if model.dtype == torch.float16 else model  # T5 overflows in float16

    # The hash does not depend on the names of tied weights.
    tensors = dict(read(weights))
    tensors.pop("encoder.embed_tokens.weight", None)  # the same as shared.weight
    return TextModel(T5Tokenizer.from_pretrained(tokenizer), digest(tensors), load, answer, length)


def loaded(kind: Any, config: Any, weights: Path) -> Any:
    """Return a model of transformers, of the class `kind`, from this file and no other.

    Raises ValueError where the file lacks some of its weights.
    """
    options = {"config": config, "dtype": "auto", "output_loading_info": True}
    model, report = kind.from_pretrained(None, state_dict=read(weights), **options)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{weights} lacks {len(missing)} weights of {kind.__name__}, first {missing[0]}; "
            "get it again"
        )
    return model


def random_t5_model(config: Mapping[str, Any], answer: Answer, length: int) -> TextModel:
    """Return T5's encoder with reproducible random weights, and a token for every byte."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    require_range(at_least=259, vocab_size=config.get("vocab_size"))
    model = T5EncoderModel(T5Config(**config))
    randomise(model, torch.Generator().manual_seed(0))
    return TextModel(
        ByT5Tokenizer(extra_ids=0), digest(model.state_dict()), lambda: model, answer, length
    )


# ----------------------------------------------------------------------------------------------
# The encoders of a pipeline
# ----------------------------------------------------------------------------------------------


class FluxTextEncoders:
    """The two text encoders of a FLUX pipeline, from the folder that diffusers saved it in.

    Calling it turns prompts (P) into `text` (P, L, D), T5's answer to every token, and `pooled`
    (P, D), CLIP's answer at the prompt's end. Prompts are filled up or cut to L tokens.

    Args:
        folder: A pipeline's folder, or the name of a shipped one.
        length: L, the `max_sequence_length` that the pipeline is called with.
    """

    def __init__(self, folder: str, length: int):
        require_range(at_least=1, at_most=512, length=length)
        root = find_asset(folder, "words.folder")
        self.t5 = open_t5(
            root / "text_encoder_2/model.safetensors", root / "tokenizer_2", text, length
        )
        self.clip = open_clip(root / "text_encoder/model.safetensors", root / "tokenizer", pooled)
        self.fingerprint = sha256(f"{self.t5.fingerprint} {self.clip.fingerprint}".encode())

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {**self.t5(prompts), **self.clip(prompts)}


def text(model: nn.Module, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return T5's answer to every token; FLUX has its encoder read the filling as well."""
    return {"text": model(tokens)[0]}


def pooled(model: nn.Module, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return CLIP's answer at the end of each prompt."""
    return {"pooled": model(tokens).pooler_output}


def open_clip(weights: Path, tokenizer: Path, answer: Answer) -> TextModel:
    """Return CLIP's text encoder from the file `weights`, with a tokenizer from a folder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    config = CLIPTextConfig.from_pretrained(weights.parent)
    words = CLIPTokenizer.from_pretrained(tokenizer)

    def load() -> nn.Module:
        return loaded(CLIPTextModel, config, weights).float()

    return TextModel(words, digest(read(weights)), load, answer, words.model_max_length)
