"""Text encoders: CLIP and T5 as the released pipelines use them, from files or with random weights.

They are needed once, to fill the cache of encodings, and are not in memory while a model samples.
Legend: P prompts, L tokens, D features.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oss_exp.checks import require_range
from oss_exp.files import sha256
from oss_exp.models.checkpoints.weights import digest, randomise, read
from oss_exp.models.text.prompts import PromptCache
from oss_exp.validation import shown

NAMED = 5  # prompts that are cut, in warnings
log = logging.getLogger(__name__)

Answer = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]  # model, tokens (P, L), mask (P, L) -> by name


class TextModel:
    """A text transformer of transformers: prompts (P) -> tensors by name, (P, ...) each.

    Prompts are filled up or cut to `length` tokens L; null: those that the tokenizer names.
    weights: SHA-256 of its weights. load: makes it, once there is a prompt to encode. answer: what is taken of it.
    """

    def __init__(
        self,
        tokenizer: Any,
        weights: str,
        load: Callable[[], nn.Module],
        answer: Answer,
        length: int | None = None,
    ):
        self.tokenizer, self.load, self.answer = tokenizer, load, answer
        self.length = length or tokenizer.model_max_length
        vocabulary = sorted(tokenizer.get_vocab().items())
        empty = self._tokens([""])["input_ids"].tolist()
        self.fingerprint = sha256(json.dumps([answer.__name__, weights, vocabulary, empty]).encode())

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokens = self._tokens(prompts)
        return self.answer(self._model, tokens["input_ids"], tokens["attention_mask"])

    @cached_property
    def _model(self) -> nn.Module:
        return self.load().eval()

    def cuts(self, prompts: Sequence[str]) -> dict[str, str]:
        """The prompts that have more tokens than it reads, and what of each is left out."""
        found = {}
        for prompt in dict.fromkeys(prompts):
            if len(prompt.encode()) < self.length - 2:  # a token is a byte at least
                continue
            tokens = self.tokenizer([prompt], verbose=False)["input_ids"][0]
            if len(tokens) > self.length:  # the last one marks the end
                found[prompt] = self.tokenizer.decode(tokens[self.length - 1 : -1]).strip()
        return found

    def _tokens(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        padded = {"padding": "max_length", "max_length": self.length, "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(list(prompts), return_attention_mask=True, **padded)


class Together:
    """Several encoders that give tensors of different names."""

    def __init__(self, *encoders: TextModel):
        self.encoders = encoders
        self.fingerprint = sha256(" ".join(encoder.fingerprint for encoder in encoders).encode())

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {name: tensor for encoder in self.encoders for name, tensor in encoder(prompts).items()}

    def cuts(self, prompts: Sequence[str]) -> dict[str, str]:
        """Those that every one of them cuts: the one that reads most counts."""
        first, *others = (encoder.cuts(prompts) for encoder in self.encoders)
        shared = set(first).intersection(*others)
        return {
            prompt: min((cuts[prompt] for cuts in (first, *others)), key=len) for prompt in first if prompt in shared
        }


def encode(encoder: TextModel | Together, prompts: Sequence[str]) -> tuple[dict[str, Tensor], str]:
    """prompts (P) -> their encodings by name, (P, ...) each, through the cache, and the encoder's fingerprint.

    Prompts that it cuts are named in a warning. Hand the encoder over without keeping it: its memory is then free.
    """
    cuts = encoder.cuts(prompts)
    for prompt, rest in list(cuts.items())[:NAMED]:
        log.warning("the text encoder cuts the prompt %s: it does not see %s", shown(prompt), shown(rest))
    if len(cuts) > NAMED:
        log.warning("the text encoder cuts %d more prompts", len(cuts) - NAMED)
    return PromptCache().encode(encoder, prompts), encoder.fingerprint


# --------------------------------------------------------------------------------------------------------------
# What is taken of a model
# --------------------------------------------------------------------------------------------------------------


def clip_text(model: nn.Module, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """text (P, L, D) of every token, padding too, as Stable Diffusion takes it."""
    return {"text": model(tokens).last_hidden_state}


def clip_pooled(model: nn.Module, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """pooled (P, D), that of the last token of the prompt."""
    return {"pooled": model(tokens).pooler_output}


def t5_text(model: nn.Module, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """text (P, L, D) of every token, padding too, as FLUX takes it."""
    return {"text": model(tokens).last_hidden_state}


def t5_prompt(model: nn.Module, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """text (P, L, D) of the prompt's tokens, which do not see the padding; 0 from there on, as Wan takes it."""
    return {"text": model(tokens, mask).last_hidden_state * mask[..., None]}


# --------------------------------------------------------------------------------------------------------------
# Where they come from
# --------------------------------------------------------------------------------------------------------------


def open_text_model(
    kind: str, weights: Path, tokenizer_kind: str, tokenizer: Path, answer: Answer, length: int | None
) -> TextModel:
    """transformers' classes `kind` from the file `weights`, and `tokenizer_kind` from the folder `tokenizer`.

    Its hash does not depend on how transformers calls the weights.
    """
    import transformers

    cls = getattr(transformers, kind)
    config = cls.config_class.from_pretrained(weights.parent)

    def load() -> nn.Module:
        model, report = cls.from_pretrained(  # not from the folder: whichever files are there, these are the weights
            None, config=config, state_dict=read(weights), dtype="auto", output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{weights} lacks {len(missing)} weights of {kind}, first {missing[0]}; get it again")
        return model.float() if model.dtype == torch.float16 else model  # T5 overflows in it

    tensors = {key.removeprefix("text_model."): tensor for key, tensor in read(weights).items()}
    for copy in ("embeddings.position_ids", "encoder.embed_tokens.weight"):  # a count; what shared.weight is
        tensors.pop(copy, None)
    words = getattr(transformers, tokenizer_kind).from_pretrained(tokenizer)
    return TextModel(words, digest(tensors), load, answer, length)


def random_text_model(kind: str, config: Mapping[str, Any], answer: Answer, length: int | None) -> TextModel:
    """transformers' class `kind` with reproducible random weights and a token for every byte."""
    import transformers

    cls = getattr(transformers, kind)
    tokenizer, ends = BYTES[kind](config)
    model = cls(cls.config_class(**config, **ends))
    randomise(model, torch.Generator().manual_seed(0))
    return TextModel(tokenizer, digest(model.state_dict()), lambda: model, answer, length)


def clip_bytes(config: Mapping[str, Any]) -> tuple[Any, dict[str, int]]:
    """A tokenizer with a token for every byte, within and at the end of a word, and the numbers of the two ends."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    require_range(at_least=len(tokens), vocab_size=config.get("vocab_size"))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=config["max_position_embeddings"])
    return tokenizer, {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}


def t5_bytes(config: Mapping[str, Any]) -> tuple[Any, dict[str, int]]:
    """The same with 259 tokens; T5 knows its end."""
    from transformers import ByT5Tokenizer

    require_range(at_least=259, vocab_size=config.get("vocab_size"))
    return ByT5Tokenizer(extra_ids=0), {}


BYTES = {"CLIPTextModel": clip_bytes, "T5EncoderModel": t5_bytes, "UMT5EncoderModel": t5_bytes}
