"""Whole pipelines of diffusers with small random parts: tokenizers, text encoders, networks, autoencoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
)
from PIL import Image
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from oss_exp.models.text.encoders import clip_bytes

PROMPTS = ["a red bicycle", "two cats, sleeping"]


@dataclass(frozen=True)
class Family:
    """A pipeline whose scheduler steps by Euler's method (or DDIM's), and how it is called.

    num_steps: a number that its own times divide without rounding.
    latents:   a state as the scheduler sees it, and what its samples draw from -> the `latents` that the call takes.
    atol:      of pixels, between its own samples and ours.
    """

    pipe: DiffusionPipeline
    call: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[Any, ...] = tuple(PROMPTS)
    num_steps: int = 6
    latents: Callable[[Tensor, list[torch.Generator]], Tensor] = lambda state, draws: state
    atol: float = 1e-5


FAMILIES: dict[str, Callable[[], Family]] = {}


def family(make: Callable[[], Family]) -> Callable[[], Family]:
    """Register what makes a family, under its function's name."""
    FAMILIES[make.__name__] = make
    return make


# --------------------------------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------------------------------


def lively(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Move every weight away from 0, so that prompts and conditions make a difference."""
    draw = torch.Generator().manual_seed(0)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
            for weight in part.parameters():
                weight.data += 0.05 * torch.randn(weight.shape, generator=draw)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_vae(channels: int, blocks: int = 2, **config: Any) -> AutoencoderKL:
    settings = {"block_out_channels": (8,) * blocks, "down_block_types": ("DownEncoderBlock2D",) * blocks}
    settings |= {"up_block_types": ("UpDecoderBlock2D",) * blocks, "norm_num_groups": 4, "scaling_factor": 0.4}
    return AutoencoderKL(latent_channels=channels, **settings, **config)


def clip(width: int = 24, heads: int = 3) -> tuple[CLIPTextModel, Any]:
    """A text encoder and its tokenizer of bytes."""
    tokenizer, ends = clip_bytes({"max_position_embeddings": 40})
    text = {"vocab_size": 600, "hidden_size": width, "intermediate_size": 32, "max_position_embeddings": 80}
    text |= {"projection_dim": width}
    return CLIPTextModel(CLIPTextConfig(**text, num_hidden_layers=2, num_attention_heads=heads, **ends)), tokenizer


def t5(width: int = 20) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A text encoder and its tokenizer of letters."""
    words = [(word, -3.0) for word in ("<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,.&;", "▁cats")]
    config = {"vocab_size": 40, "d_model": width, "d_kv": 5, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(**config, feed_forward_proj="gated-gelu")), T5Tokenizer(vocab=words, extra_ids=0)


def clip_with_projection(width: int = 24, heads: int = 2) -> tuple[CLIPTextModelWithProjection, Any]:
    encoder, tokenizer = clip(width, heads)
    return CLIPTextModelWithProjection(encoder.config), tokenizer


def byte_tokenizer(cls: type = PreTrainedTokenizerFast, **config: Any) -> Any:
    """A tokenizer with a token for every byte, an end, a start, a filling and a chat template."""
    special = ["<pad>", "<eos>", "<bos>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]
    vocab = {token: number for number, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    bytewise = Tokenizer(BPE(vocab, []))
    bytewise.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])])
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<pad>"}
    tokenizer = cls(tokenizer_object=bytewise, additional_special_tokens=special[3:], **names, **config)
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
    return tokenizer


def qwen_vision_language(width: int = 24) -> tuple[Qwen2_5_VLForConditionalGeneration, Any]:
    """A text encoder that sees images too, and its tokenizer of bytes."""
    tokenizer = byte_tokenizer(Qwen2Tokenizer)
    text = {
        "vocab_size": 280,
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width}
    vision |= {"patch_size": 14, "fullatt_block_indexes": [0], "window_size": 112}
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in {"image": "image_pad", "vision_start": "vision_start", "vision_end": "vision_end"}.items()
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return Qwen2_5_VLForConditionalGeneration(config), tokenizer


def umt5(width: int = 20) -> tuple[UMT5EncoderModel, T5Tokenizer]:
    config = {"vocab_size": 40, "d_model": width, "d_kv": 5, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return UMT5EncoderModel(UMT5Config(**config, feed_forward_proj="gated-gelu")), t5()[1]


def llama(width: int = 24) -> tuple[LlamaModel, PreTrainedTokenizerFast]:
    """A language model as a text encoder, and its tokenizer of bytes."""
    config = {"vocab_size": 280, "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 3}
    model = LlamaModel(LlamaConfig(**config, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))
    return model, byte_tokenizer()


def clip_vision(width: int = 24, projection: bool = False) -> tuple[CLIPVisionModel, CLIPImageProcessor]:
    """An image encoder and what prepares its images."""
    size = {"image_size": 224, "patch_size": 56, "hidden_size": width, "intermediate_size": 32, "projection_dim": width}
    config = CLIPVisionConfig(**size, num_hidden_layers=2, num_attention_heads=3)
    kind = CLIPVisionModelWithProjection if projection else CLIPVisionModel
    return kind(config), CLIPImageProcessor()


def pictures(count: int, size: int = 16) -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(count)]
