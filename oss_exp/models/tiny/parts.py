"""Parts of pipelines with small random weights: tokenizers, encoders, autoencoders and images."""

from __future__ import annotations

import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

# Their names are exported lazily, so type checkers do not see them.
diffusers: Any = import_module("diffusers")
transformers: Any = import_module("transformers")

LAYERS = {
    "vocab_size": 280,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
T5 = {
    "vocab_size": 40,
    "d_kv": 5,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}


def lively(pipe: Any) -> Any:
    """Move every weight away from 0, so that prompts and conditions have an effect."""
    generator = torch.Generator().manual_seed(0)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
            for weight in part.parameters():
                weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(count: int, size: int = 16) -> list[Image.Image]:
    """Return images of random pixels, the same every time."""
    generator = np.random.default_rng(0)
    images = []
    for _ in range(count):
        pixels = generator.integers(0, 255, (size, size, 3), dtype=np.uint8)
        images.append(Image.fromarray(pixels))
    return images


def image_vae(channels: int, blocks: int = 2, **config: Any) -> Any:
    settings = {
        "block_out_channels": (8,) * blocks,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "norm_num_groups": 4,
        "scaling_factor": 0.4,
    }
    return diffusers.AutoencoderKL(latent_channels=channels, **settings, **config)


# ------------------------------------------------------------------------------------------------
# Tokenizers
# ------------------------------------------------------------------------------------------------


def clip_bytes(length: int) -> tuple[Any, dict[str, int]]:
    """Return a tokenizer with two tokens for every byte, and the numbers of start and end.

    One token is for a byte within a word, and one for a byte at the end of a word.
    """
    letters = sorted(ByteLevel.alphabet())
    final_letters = [f"{letter}</w>" for letter in letters]
    tokens = [*letters, *final_letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}

    # CLIP's tokenizer reads files.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=length)
    return tokenizer, {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}


def t5_letters() -> Any:
    """Return a tokenizer with a token for every letter, and one for cats."""
    words = ("<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,.&;", "▁cats")
    scores = [(word, -3.0) for word in words]
    return transformers.T5Tokenizer(vocab=scores, extra_ids=0)


def byte_tokenizer(cls: type = transformers.PreTrainedTokenizerFast, **config: Any) -> Any:
    """Return a tokenizer with a token for every byte, special tokens and a chat template."""
    special = ["<pad>", "<eos>", "<bos>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokens = [*special, *sorted(ByteLevel.alphabet())]
    vocab = {token: number for number, token in enumerate(tokens)}

    # Bytes.
    bytewise = Tokenizer(BPE(vocab, []))
    bytewise.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
    )

    # Special tokens.
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<pad>"}
    tokenizer = cls(
        tokenizer_object=bytewise, additional_special_tokens=special[3:], **names, **config
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
    )
    return tokenizer


# ------------------------------------------------------------------------------------------------
# Encoders of texts and images, with their tokenizers and processors
# ------------------------------------------------------------------------------------------------


def clip(width: int = 24, heads: int = 3) -> tuple[Any, Any]:
    tokenizer, ends = clip_bytes(77)
    text = {
        "vocab_size": 600,
        "hidden_size": width,
        "intermediate_size": 32,
        "max_position_embeddings": 80,
        "projection_dim": width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
    }
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**text, **ends)), tokenizer


def clip_with_projection(width: int = 24, heads: int = 2) -> tuple[Any, Any]:
    encoder, tokenizer = clip(width, heads)
    return transformers.CLIPTextModelWithProjection(encoder.config), tokenizer


def t5(width: int = 20) -> tuple[Any, Any]:
    return transformers.T5EncoderModel(transformers.T5Config(d_model=width, **T5)), t5_letters()


def umt5(width: int = 20) -> tuple[Any, Any]:
    return transformers.UMT5EncoderModel(transformers.UMT5Config(d_model=width, **T5)), t5_letters()


def llama(width: int = 24) -> tuple[Any, Any]:
    config = {
        "vocab_size": 280,
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    return transformers.LlamaModel(transformers.LlamaConfig(**config)), byte_tokenizer()


def gemma() -> tuple[Any, Any]:
    config = transformers.Gemma2Config(**LAYERS, **ENDS, query_pre_attn_scalar=8)
    return transformers.Gemma2Model(config), byte_tokenizer()


def qwen() -> tuple[Any, Any]:
    config = transformers.Qwen3Config(**LAYERS, **ENDS)
    return transformers.Qwen3Model(config), byte_tokenizer(transformers.Qwen2Tokenizer)


def qwen_vision_language(width: int = 24) -> tuple[Any, Any]:
    """Return a text encoder that takes images too, and its tokenizer."""
    tokenizer = byte_tokenizer(transformers.Qwen2Tokenizer)

    # Settings of its two halves.
    text = {
        "vocab_size": 280,
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
        **ENDS,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": width,
        "patch_size": 14,
        "fullatt_block_indexes": [0],
        "window_size": 112,
    }

    # Tokens that mark an image.
    ids = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer


def clip_vision(width: int = 24, projection: bool = False) -> tuple[Any, Any]:
    size = {
        "image_size": 224,
        "patch_size": 56,
        "hidden_size": width,
        "intermediate_size": 32,
        "projection_dim": width,
    }
    config = transformers.CLIPVisionConfig(**size, num_hidden_layers=2, num_attention_heads=3)
    if projection:
        encoder = transformers.CLIPVisionModelWithProjection(config)
    else:
        encoder = transformers.CLIPVisionModel(config)
    return encoder, transformers.CLIPImageProcessor()
