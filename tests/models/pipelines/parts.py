"""Whole pipelines of diffusers with small random parts: tokenizers, text encoders, networks, autoencoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from oss_exp.models.text.encoders import clip_bytes

PROMPTS = ["a red bicycle", "two cats, sleeping"]


@dataclass(frozen=True)
class Family:
    """A pipeline whose scheduler steps by Euler's method (or DDIM's), and how it is called."""

    pipe: DiffusionPipeline
    call: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[Any, ...] = tuple(PROMPTS)


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


def clip(width: int = 24) -> tuple[CLIPTextModel, Any]:
    """A text encoder and its tokenizer of bytes."""
    tokenizer, ends = clip_bytes({"max_position_embeddings": 40})
    text = {"vocab_size": 600, "hidden_size": width, "intermediate_size": 32, "max_position_embeddings": 40}
    return CLIPTextModel(CLIPTextConfig(**text, num_hidden_layers=2, num_attention_heads=3, **ends)), tokenizer


def t5(width: int = 20) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A text encoder and its tokenizer of letters."""
    words = [(word, -3.0) for word in ("<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,.&;", "▁cats")]
    config = {"vocab_size": 40, "d_model": width, "d_kv": 5, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(**config, feed_forward_proj="gated-gelu")), T5Tokenizer(vocab=words, extra_ids=0)
