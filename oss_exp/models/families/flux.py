"""FLUX.1 dev and schnell: Black Forest Labs' rectified-flow transformers (2024), from a pipeline folder of diffusers.

The network's clock is canonical time itself, and it gives v. Guidance is an input of dev, distilled into it; schnell
has none. A condition is a prompt's number: CLIP's pooled vector and T5's text. Legend: M rows, P prompts, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from oss_exp.checks import SettingsOf, require_range
from oss_exp.models.checkpoints.pipelines import (
    Pipeline,
    Prompted,
    PromptedBackbone,
    require_features,
    require_multiples,
)
from oss_exp.models.decoders.image import VAE
from oss_exp.models.guidance import Guidance
from oss_exp.models.network import Dtype, at_size
from oss_exp.models.parameterization import FlowVelocity
from oss_exp.models.text.encoders import Together, clip_pooled, encode, t5_text
from oss_exp.noise import FlowPath

PARTS = {
    "transformer": ("FluxTransformer2DModel",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder_2": ("T5EncoderModel",),
    "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast"),
    "vae": ("AutoencoderKL",),
}
PATCH = 16  # pixels a side of what a token stands for: 8 of a latent, 2 x 2 latents


class FluxSize(TypedDict):
    """One of the sizes of `Flux`."""

    checkpoint: str
    height: int
    width: int
    text_length: int
    dtype: str
    transformer: Annotated[Mapping[str, Any], SettingsOf("diffusers.FluxTransformer2DModel")]
    text_encoder: Annotated[Mapping[str, Any], SettingsOf("transformers.CLIPTextConfig")]
    text_encoder_2: Annotated[Mapping[str, Any], SettingsOf("transformers.T5Config")]
    vae: Annotated[Mapping[str, Any], SettingsOf("diffusers.AutoencoderKL")]


class Flux(Prompted):
    """A text-to-image network at one of its sizes.

    sizes:             by name the `checkpoint`, and for random weights the configs of `transformer`, `text_encoder`
                       (CLIP), `text_encoder_2` (T5) and `vae` as diffusers writes them. `full` is the public one;
                       `tiny` has the same layers, small.
    height, width:     of the pictures, in pixels.
    text_length:       T5's tokens.
    embedded_guidance: the network's own input, one row a call; null for schnell, which has none.
    guidance:          two rows a call besides, against the empty prompt, for a scale other than 1.
    prompts:           those that conditions number.
    decode_batch:      images decoded at a time. decode_tile: as VAE's `tile`.
    checkpoint:        a pipeline folder or a hub id, whose own configs count; `random`; null: that of the size.
    source:            where the public checkpoint is had, for the message when it is missing.
    """

    def __init__(
        self,
        name: str,
        size: str,
        sizes: Mapping[str, FluxSize],
        height: int,
        width: int,
        text_length: int,
        embedded_guidance: float | None,
        guidance: Guidance,
        micro_batch: int,
        decode_batch: int,
        decode_tile: int | None,
        dtype: Dtype,
        checkpoint: str | None,
        source: str,
        prompts: Sequence[str] = (),
    ):
        name = at_size(name, size, sizes)
        require_multiples(PATCH, height=height, width=width)
        require_range(at_least=1, text_length=text_length)
        require_range(at_least=0, at_most=1000, embedded_guidance=embedded_guidance)
        pipeline = Pipeline("FluxPipeline", PARTS, size, sizes, checkpoint, source)
        network = pipeline.network("transformer")
        config = network.config
        if config.guidance_embeds != (embedded_guidance is not None):
            raise ValueError(
                f"model.embedded_guidance is {embedded_guidance} and the transformer of {pipeline.checkpoint} "
                f"{'takes one' if config.guidance_embeds else 'takes none'}; set a number for dev, null for schnell"
            )
        clip = pipeline.text_model("text_encoder", "tokenizer", clip_pooled)
        t5 = pipeline.text_model("text_encoder_2", "tokenizer_2", t5_text, text_length)
        encodings, sha256 = encode(Together(clip, t5), [*prompts, ""])
        del clip, t5  # gigabytes, before the transformer is read
        require_features(pipeline, "transformer", encodings["pooled"], config.pooled_projection_dim)
        require_features(pipeline, "transformer", encodings["text"], config.joint_attention_dim)
        require_range(at_least=1, decode_batch=decode_batch, decode_tile=decode_tile)
        with pipeline.making("vae"):
            vae = pipeline.configs["vae"] | {"tile": decode_tile}
            decoder = VAE(checkpoint=pipeline.checkpoint, micro_batch=decode_batch, source=source, **vae)
        super().__init__(
            name=name,
            prompts=prompts,
            encoder_sha256=sha256,
            backbone=PromptedFlux(network, embedded_guidance, patch=2, **encodings),
            parameterization=FlowVelocity(FlowPath(shift=1.0, time_scale=1.0)),
            event_shape=(config.in_channels // 4, height // 8, width // 8),
            decoder=decoder,
            guidance=guidance,
            micro_batch=micro_batch,
            dtype=dtype,
            checkpoint=pipeline.weights("transformer"),
        )


class PromptedFlux(PromptedBackbone):
    """diffusers.FluxTransformer2DModel(x (M, C, h, w), clock (M,), prompts (M,), -1 for none) -> v (M, C, h, w).

    A token is patch x patch latents of all channels. tables: `pooled` (P + 1, D) and `text` (P + 1, L, D).
    """

    adaptive_norms: ClassVar[tuple[str, ...]] = (
        "norm1.linear",
        "norm1_context.linear",
        "norm.linear",
        "norm_out.linear",
        "timestep_embedder",
    )

    def __init__(self, network: nn.Module, guidance: float | None, patch: int, **tables: Tensor):
        super().__init__(network, **tables)
        require_range(at_least=1, patch=patch)
        require_range(at_least=0, at_most=1000, guidance=guidance)
        self.guidance, self.patch = guidance, patch
        network.time_text_embed.register_forward_pre_hook(_exact)

    def forward(self, x: Tensor, clock: Tensor, prompts: Tensor) -> Tensor:
        text, rows, columns = self.text[prompts], x.shape[2] // self.patch, x.shape[3] // self.patch
        places = [torch.arange(count, device=x.device) for count in (1, rows, columns)]
        times = [1000 * clock] + ([] if self.guidance is None else [torch.full_like(clock, 1000 * self.guidance)])
        tokens = self.network(
            hidden_states=pixel_unshuffle(x, self.patch).flatten(2).mT,
            encoder_hidden_states=text,
            pooled_projections=(*times, self.pooled[prompts]),  # whole to _exact
            timestep=clock,
            img_ids=torch.cartesian_prod(*places),
            txt_ids=torch.zeros(text.shape[1], 3, dtype=torch.long, device=x.device),
        ).sample
        return pixel_shuffle(tokens.mT.unflatten(2, (rows, columns)), self.patch)


def _exact(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The last argument in place of all: diffusers rounds time and guidance to the weights' dtype on the way here.

    In bfloat16 that is to multiples of 0.004 near t = 1, more than a step there of a shifted grid of 100.
    """
    return arguments[-1]
