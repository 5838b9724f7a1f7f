"""Open-Sora 1.2: videos of prompts (Zheng et al. 2024, arXiv 2412.20404) behind canonical time.

The network is `stdit3`'s, the decoder `video_vae`'s; here are the prompts, which T5 encodes, and what else the network
is told. A condition is a prompt's number. Legend: M rows, C channels, T latent frames, h x w latents; P prompts,
L tokens, D features; t (M,) float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, TypedDict

import torch
from torch import Tensor, nn

from oss_exp.checks import require_range
from oss_exp.models.checkpoints.weights import locate
from oss_exp.models.decoders.video_vae import latent_frames
from oss_exp.models.families.stdit3 import STDiT3
from oss_exp.models.guidance import Guidance
from oss_exp.models.network import Dtype, at_size, build_part
from oss_exp.models.parameterization import FlowVelocity
from oss_exp.models.text.encoders import TextModel, encode, open_t5, random_t5_model
from oss_exp.models.text.prompted import Prompted
from oss_exp.noise import FlowPath

WEIGHTS = ("model.safetensors",)
PICTURE_FPS = 120.0  # what the network was told of pictures in training
T5_WEIGHTS = ("text_encoder/model.safetensors", "text_encoder/model.safetensors.index.json")
T5_OTHERS = (
    ("text_encoder/config.json",),
    ("tokenizer/tokenizer_config.json",),
    ("tokenizer/tokenizer.json", "tokenizer/spiece.model"),
)


class OpenSoraSize(TypedDict):
    """One of the sizes of `OpenSora`. video: frames, height and width that the configuration takes by default."""

    video: Sequence[int]
    micro_batch: int
    checkpoint: str
    network: Callable[..., STDiT3]
    text_encoder: Callable[..., TextModel]
    decoder: Callable[..., nn.Module]


class OpenSora(Prompted):
    """A network of text to video at one of its sizes.

    sizes:      by name the `checkpoint` and, partial, `network`, `text_encoder` and `decoder`: only the chosen ones are
                built. `full` is the public one; `tiny` has the same layers, small.
    num_frames: of the video, 1 for a picture. height, width: pixels. fps: frames a second.
    prompts:    those that conditions number.
    ending:     what is added to each prompt, for captions in training ended with such scores. Prompts are in lower
                case, as captions were; their cleaning of addresses, file names and the like is not repeated.
    checkpoint: a file, a folder or a hub id; `random`: reproducible random weights, to try all but the pictures; null:
                that of the size.
    source:     where the public checkpoint is had, for the message when it is missing.
    """

    def __init__(
        self,
        name: str,
        size: str,
        sizes: Mapping[str, OpenSoraSize],
        num_frames: int,
        height: int,
        width: int,
        fps: float,
        guidance: Guidance,
        ending: str,
        micro_batch: int,
        dtype: Dtype,
        checkpoint: str | None,
        source: str,
        prompts: Sequence[str] = (),
        weights_set: str | None = None,
    ):
        name, chosen = at_size(name, size, sizes), sizes[size]
        shape = (latent_frames(num_frames), height // 8, width // 8)
        require_range(at_least=8, height=height, width=width)
        require_range(above=0, at_most=1e6, fps=fps)
        checkpoint = checkpoint or chosen["checkpoint"]
        if checkpoint != "random":  # a missing file is found before large networks are built
            checkpoint = str(locate(checkpoint, WEIGHTS, source))
        texts = [f"{prompt} {ending}".strip().lower() for prompt in prompts or [""]]
        encoded, encoder_sha256 = encode(build_part(sizes, size, "text_encoder"), texts)
        network = build_part(sizes, size, "network")
        super().__init__(
            name=name,
            prompts=prompts,
            encoder_sha256=encoder_sha256,
            backbone=PromptedSTDiT3(
                network,
                **encoded,
                fps=fps if num_frames > 1 else PICTURE_FPS,
                image_size=(height * width) ** 0.5,
            ),
            parameterization=FlowVelocity(FlowPath(shift=1.0, time_scale=1000.0)),
            event_shape=(network.channels, *shape),
            decoder=build_part(sizes, size, "decoder"),
            guidance=guidance,
            micro_batch=micro_batch,
            dtype=dtype,
            checkpoint=checkpoint,
            weights_set=weights_set,
        )

    def _velocity(self, x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        """Guidance's rows without a prompt repeat, in order, those of its times; they need to know whose they are."""
        free = prompts < 0
        prompts = prompts.masked_scatter(free, -1 - prompts[~free][torch.isin(t[~free], t[free])])
        return super()._velocity(x, t, prompts)


class PromptedSTDiT3(nn.Module):
    """x (M, C, T, h, w), clock (M,), prompts (M,) -> v (M, C, T, h, w); -1 - p is the null prompt in place of p.

    The null prompt is a learned encoding of which as many tokens are read as prompt p has, in training and sampling.
    text (P, L, D), mask (P, L): encodings of all prompts, and which tokens are theirs.
    """

    adaptive_norms: ClassVar[tuple[str, ...]] = ("scale_shift_table", "t_block")

    def __init__(self, network: STDiT3, text: Tensor, mask: Tensor, fps: float, image_size: float):
        super().__init__()
        require_range(above=0, at_most=1e6, fps=fps, image_size=image_size)
        null = network.y_embedder.y_embedding
        if text.shape[1:] != null.shape:
            raise ValueError(
                f"the text encoder gives {tuple(text.shape[1:])} tokens and features, the network takes "
                f"{tuple(null.shape)}; choose a text_encoder that belongs to it"
            )
        self.network, self.fps, self.image_size = network, fps, image_size
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("mask", mask.bool(), persistent=False)

    def forward(self, x: Tensor, clock: Tensor, prompts: Tensor) -> Tensor:
        numbers = torch.where(prompts < 0, -1 - prompts, prompts)
        null = self.network.y_embedder.y_embedding
        text = torch.where((prompts < 0)[:, None, None], null, self.text[numbers].to(null))
        fps = torch.full_like(clock, self.fps)
        output = self.network(x, clock, text, self.mask[numbers], fps, self.image_size)
        return -output.chunk(2, dim=1)[0]


def time_shift(num_frames: int = 102, height: int = 720, width: int = 1280) -> float:
    """By which its sampler shifts flow time: sqrt(pixels / 512^2) sqrt(latent frames) (arXiv 2412.20404)."""
    require_range(at_least=1, at_most=65_536, height=height, width=width)
    return (height * width / 512**2) ** 0.5 * latent_frames(num_frames) ** 0.5


# --------------------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------------------


def t5_masked(model: nn.Module, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """text (P, L, D), in bfloat16 as in training; mask (P, L) of the prompt's tokens, which see no others."""
    return {"text": model(tokens, mask).last_hidden_state.bfloat16(), "mask": mask.bool()}


def public_t5(checkpoint: str, length: int, source: str) -> TextModel:
    """T5's encoder (Raffel et al. 2020, arXiv 1910.10683) from a pipeline folder of diffusers, or a hub id with one.

    length: its tokens; prompts are filled up or cut to it.
    """
    setting = "model.sizes.full.text_encoder.checkpoint"
    if Path(checkpoint).is_file():
        raise ValueError(
            f"{setting}={checkpoint} is a file; give a folder with text_encoder/ and tokenizer/"
        )
    for files in T5_OTHERS:
        locate(checkpoint, files, source, setting)
    weights = locate(checkpoint, T5_WEIGHTS, source, setting)
    return open_t5(weights, weights.parents[1] / "tokenizer", t5_masked, length)


def random_t5(
    length: int,
    vocab_size: int,
    d_model: int,
    d_kv: int,
    d_ff: int,
    num_layers: int,
    num_heads: int,
    feed_forward_proj: str,
) -> TextModel:
    """Reproducible random weights and a token for every byte; but for `length` as T5Config takes them."""
    require_range(
        at_least=1, length=length, d_model=d_model, d_kv=d_kv, d_ff=d_ff, num_layers=num_layers
    )
    require_range(at_least=1, num_heads=num_heads)
    require_range(at_least=259, vocab_size=vocab_size)
    config = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": d_kv,
        "d_ff": d_ff,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "feed_forward_proj": feed_forward_proj,
    }
    return random_t5_model(config, t5_masked, length)
