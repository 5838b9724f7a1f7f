"""Wan 2.1, text to video (Wan 2025, arXiv 2503.20314), from a pipeline folder of diffusers.

The network's clock is 1000 t, any number of it, and it gives v; the released samplers round it to whole numbers, which
makes steps of length 0 in fine grids. A condition is a prompt's number.
Legend: M rows, P prompts, L tokens, D features.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypedDict

from torch import Tensor

from oss_exp.checks import SettingsOf, require_range
from oss_exp.models.checkpoints.pipelines import (
    Pipeline,
    Prompted,
    PromptedBackbone,
    require_features,
    require_multiples,
)
from oss_exp.models.decoders.image import WanVAE
from oss_exp.models.guidance import Guidance
from oss_exp.models.network import Dtype, at_size
from oss_exp.models.parameterization import FlowVelocity
from oss_exp.models.text.encoders import encode, t5_prompt
from oss_exp.noise import FlowPath

PARTS = {
    "transformer": ("WanTransformer3DModel",),
    "text_encoder": ("UMT5EncoderModel",),
    "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
    "vae": ("AutoencoderKLWan",),
}


class WanSize(TypedDict):
    """One of the sizes of `Wan`."""

    checkpoint: str
    frames: int
    height: int
    width: int
    text_length: int
    dtype: str
    transformer: Annotated[Mapping[str, Any], SettingsOf("diffusers.WanTransformer3DModel")]
    text_encoder: Annotated[Mapping[str, Any], SettingsOf("transformers.UMT5Config")]
    vae: Annotated[Mapping[str, Any], SettingsOf("diffusers.AutoencoderKLWan")]


class Wan(Prompted):
    """A text-to-video network at one of its sizes.

    sizes:           by name the `checkpoint`, and for random weights the configs of `transformer`, `text_encoder`
                     (UMT5) and `vae` as diffusers writes them. `full` is the public one; `tiny` has the same layers,
                     small.
    frames:          4 n + 1. height, width: in pixels.
    text_length:     UMT5's tokens.
    negative_prompt: what guidance leads away from.
    prompts:         those that conditions number.
    decode_batch:    videos decoded at a time.
    checkpoint:      a pipeline folder or a hub id, whose own configs count; `random`; null: that of the size.
    source:          where the public checkpoint is had, for the message when it is missing.
    """

    def __init__(
        self,
        name: str,
        size: str,
        sizes: Mapping[str, WanSize],
        frames: int,
        height: int,
        width: int,
        text_length: int,
        negative_prompt: str,
        guidance: Guidance,
        micro_batch: int,
        decode_batch: int,
        dtype: Dtype,
        checkpoint: str | None,
        source: str,
        prompts: Sequence[str] = (),
    ):
        name = at_size(name, size, sizes)
        require_multiples(16, height=height, width=width)  # 8 of a latent, 2 x 2 latents a token
        require_range(at_least=1, text_length=text_length)
        if frames < 1 or frames % 4 != 1:
            raise ValueError(f"frames must be 4 n + 1, such as 81, got {frames!r}")
        pipeline = Pipeline("WanPipeline", PARTS, size, sizes, checkpoint, source)
        network = pipeline.network("transformer")
        config = network.config
        network.rope = type(network.rope)(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
        texts = [cleaned(prompt) for prompt in (*prompts, negative_prompt)]
        encodings, sha256 = encode(pipeline.text_model("text_encoder", "tokenizer", t5_prompt, text_length), texts)
        require_features(pipeline, "transformer", encodings["text"], config.text_dim)
        require_range(at_least=1, decode_batch=decode_batch)
        with pipeline.making("vae"):
            decoder = WanVAE(pipeline.checkpoint, decode_batch, source, **pipeline.configs["vae"])
        super().__init__(
            name=name,
            prompts=prompts,
            encoder_sha256=sha256,
            backbone=PromptedWan(network, text=encodings["text"]),
            parameterization=FlowVelocity(FlowPath(shift=1.0, time_scale=1000.0)),
            event_shape=(config.in_channels, frames // 4 + 1, height // 8, width // 8),
            decoder=decoder,
            guidance=guidance,
            micro_batch=micro_batch,
            dtype=dtype,
            checkpoint=pipeline.weights("transformer"),
        )


class PromptedWan(PromptedBackbone):
    """diffusers.WanTransformer3DModel(x (M, C, f, h, w), clock (M,), prompts (M,), -1 for none) -> v as x.

    text: encodings (P + 1, L, D).
    """

    adaptive_norms: ClassVar[tuple[str, ...]] = ("scale_shift_table", "time_embedder")

    def forward(self, x: Tensor, clock: Tensor, prompts: Tensor) -> Tensor:
        return self.network(x.to(self.text), clock, encoder_hidden_states=self.text[prompts]).sample


def cleaned(prompt: str) -> str:
    """As the released pipeline does before it encodes."""
    return " ".join(html.unescape(html.unescape(prompt)).split())
