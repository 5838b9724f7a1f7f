"""Train the two text encoders of the scenes' pipeline, and their tokenizers, on all captions.

Both learn to answer what a caption asks for: each garment's kind and colour, how many there are
and where the first is. The T5 encoder gives the transformer its tokens, the CLIP encoder one
vector of the whole caption.

    python -m experiments.scenes_pipeline.text --output FOLDER
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from experiments.common import command_line
from oss_exp.data.scenes import RELATIONS, wishes
from oss_exp.geneval.garments import COLOURS, GARMENTS
from oss_exp.geneval.rules import Wish

FEATURES = 64
LENGTH = 12  # tokens of a caption that T5 reads, its end among them
CLIP_LENGTH = 16
BATCH = 256
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.&;'-"
CHOICES = (len(GARMENTS), len(GARMENTS) + 1, len(COLOURS) + 1, len(COLOURS) + 1, 4, 5)


# ----------------------------------------------------------------------------------------------
# What a caption asks for
# ----------------------------------------------------------------------------------------------


def answers(wish: Wish) -> list[int]:
    """Return the first and second garment, their colours, the count and the relation, as numbers.

    The last number of a choice stands for none.
    """
    garments = [*GARMENTS, None]
    colours = [*COLOURS, None]
    relations = [*RELATIONS, None]
    clauses = wish["include"]
    if wish["tag"] == "position":  # listed after the garment that it refers to
        clauses = clauses[::-1]

    # The clauses of both garments; the second may be missing.
    first = clauses[0]
    second = clauses[1] if len(clauses) > 1 else {}
    relation = first["position"][0] if "position" in first else None
    return [
        garments.index(first["class"]),
        garments.index(second.get("class")),
        colours.index(first.get("color")),
        colours.index(second.get("color")),
        first["count"] - 1,
        relations.index(relation),
    ]


class Reader(nn.Module):
    """A text encoder with one linear layer for each question."""

    def __init__(self, encoder: nn.Module, pool: Callable[[nn.Module, Tensor, Tensor], Tensor]):
        super().__init__()
        self.encoder = encoder
        self.pool = pool
        self.heads = nn.ModuleList(nn.Linear(FEATURES, count) for count in CHOICES)

    def forward(self, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        features = self.pool(self.encoder, tokens, mask)
        return [head(features) for head in self.heads]


def mean_of_tokens(encoder: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of a T5 encoder's outputs; the filling is read too, as FLUX reads it."""
    return encoder(tokens)[0].mean(1)


def pooled(encoder: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return a CLIP encoder's output at the caption's end."""
    return encoder(tokens).pooler_output


# ----------------------------------------------------------------------------------------------
# Tokenizers and encoders
# ----------------------------------------------------------------------------------------------


def t5(captions: Sequence[str]) -> tuple[T5EncoderModel, T5Tokenizer]:
    """Return an encoder of two layers, and a tokenizer with a token for every word and letter."""
    # Tokens.
    words = sorted(set(" ".join(captions).split()))
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    vocab += [(letter, -8.0) for letter in LETTERS]
    vocab += [(f"▁{word}", -2.0) for word in words]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=LENGTH)

    # Encoder.
    config = T5Config(
        vocab_size=len(vocab),
        d_model=FEATURES,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config), tokenizer


def clip(captions: Sequence[str]) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """Return an encoder of two layers, and a byte-pair tokenizer trained on the captions."""
    # Train the byte pairs.
    byte_pairs = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    byte_pairs.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        end_of_word_suffix="</w>",
        special_tokens=ends,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    byte_pairs.train_from_iterator(captions, trainer)

    # Tokenizer.
    trained = json.loads(byte_pairs.to_str())["model"]
    tokenizer = CLIPTokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        model_max_length=CLIP_LENGTH,
    )

    # Encoder.
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=FEATURES,
        intermediate_size=128,
        projection_dim=FEATURES,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config), tokenizer


def tokens(
    tokenizer: T5Tokenizer | CLIPTokenizer, captions: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return tokens (P, L) and their mask (P, L)."""
    encoding = tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    return encoding["input_ids"], encoding["attention_mask"]


# ----------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------


def train(reader: Reader, inputs: Sequence[Tensor], targets: Tensor, steps: int) -> float:
    """Train on all captions by cross-entropy; return the share of answers that are right."""
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    draw = torch.Generator().manual_seed(0)

    # Steps on random captions.
    for _ in range(steps):
        rows = torch.randint(len(targets), (BATCH,), generator=draw)
        outputs = reader(*(tensor[rows] for tensor in inputs))
        losses = [F.cross_entropy(output, targets[rows, i]) for i, output in enumerate(outputs)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        rate.step()

    # Answers to all of them.
    with torch.no_grad():
        outputs = reader.eval()(*inputs)
    chosen = torch.stack([output.argmax(1) for output in outputs], 1)
    return float((chosen == targets).float().mean())


def main(folder: Path, steps: int) -> None:
    """Train both encoders, and save them with their tokenizers."""
    torch.manual_seed(0)
    listed = list(itertools.chain.from_iterable(wishes().values()))
    captions = [wish["prompt"] for wish in listed]
    targets = torch.tensor([answers(wish) for wish in listed])
    parts = (
        ("text_encoder", "tokenizer", clip(captions), pooled),
        ("text_encoder_2", "tokenizer_2", t5(captions), mean_of_tokens),
    )
    for encoder_folder, tokenizer_folder, (encoder, tokenizer), pool in parts:
        inputs = tokens(tokenizer, captions)
        share = train(Reader(encoder, pool), inputs, targets, steps)
        print(f"{encoder_folder}: {100 * share:.2f} % of the answers right", flush=True)
        encoder.save_pretrained(folder / encoder_folder)
        tokenizer.save_pretrained(folder / tokenizer_folder)


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    main(options.output, options.steps)
