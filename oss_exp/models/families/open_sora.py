"""Run Open-Sora 1.2, which makes videos of prompts (Zheng et al. 2024, arXiv 2412.20404).

The network is in `stdit3`, the decoder in `video_vae`; here are the prompts, which T5
encodes, and the network's other inputs. A condition is the index of a prompt.
Shapes: M rows, C channels, T latent frames, h x w latents; P prompts, L tokens, D
features; t (M,) float64.
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
PICTURE_FPS = 120.0  # of pictures, in training
T5_WEIGHTS = ("text_encoder/model.safetensors", "text_encoder/model.safetensors.index.json")
T5_OTHERS = (
    ("text_encoder/config.json",),
    ("tokenizer/tokenizer_config.json",),
    ("tokenizer/tokenizer.json", "tokenizer/spiece.model"),
)


class OpenSoraSize(TypedDict):
    """A size of `OpenSora`.

    Attributes:
        video: Frames, height and width, the defaults of the configuration.
        micro_batch: Network rows that are evaluated at a time, the same.
        checkpoint: The public weights, or "random".
        network: Builds the network.
        text_encoder: Builds the text encoder.
        decoder: Builds the decoder.
    """

    video: Sequence[int]
    micro_batch: int
    checkpoint: str
    network: Callable[..., STDiT3]
    text_encoder: Callable[..., TextModel]
    decoder: Callable[..., nn.Module]


class OpenSora(Prompted):
    """A network of text to video at one of its sizes.

    Args:
        name: Name of the model.
        size: Name of the size.
        sizes: What differs, by name. Of `network`, `text_encoder` and `decoder`, which
            are partial, only the chosen ones are built. "full" is the public network;
            "tiny" has the same layers, small.
        num_frames: Frames of the video; 1 for a picture.
        height: Pixels.
        width: Pixels.
        fps: Frames a second.
        guidance: As in `Network`.
        ending: Text that is appended to each prompt, such as the scores that captions
            ended with in training. Prompts become lower case, as captions were; the
            cleaning of addresses, file names and the like is not repeated.
        micro_batch: As in `Network`.
        dtype: As in `Network`.
        checkpoint: A file, a folder or a hub id; "random": reproducible random weights,
            to try all but the pictures; None: that of the size.
        source: URL of the public checkpoint, quoted in the error when it is missing.
        prompts: The prompts that conditions are indices of.
        weights_set: As in `Network`.
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
        if checkpoint != "random":  # fail before large networks are built
            checkpoint = str(locate(checkpoint, WEIGHTS, source))

        # Prompts.
        texts = [f"{prompt} {ending}".strip().lower() for prompt in prompts or [""]]
        encoded, encoder_sha256 = encode(build_part(sizes, size, "text_encoder"), texts)

        # Network.
        network = build_part(sizes, size, "network")
        rate = fps if num_frames > 1 else PICTURE_FPS
        image_size = (height * width) ** 0.5
        backbone = PromptedSTDiT3(network, **encoded, fps=rate, image_size=image_size)

        super().__init__(
            name=name,
            prompts=prompts,
            encoder_sha256=encoder_sha256,
            backbone=backbone,
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
        """Return the velocity (M, *E), telling the rows of the null prompt whose place they take.

        Under guidance they repeat, in order, the rows with a prompt at the same times.
        """
        free = prompts < 0
        prompts = prompts.masked_scatter(free, -1 - prompts[~free][torch.isin(t[~free], t[free])])
        return super()._velocity(x, t, prompts)


class PromptedSTDiT3(nn.Module):
    """An STDiT3 with the encodings of its prompts.

    The null prompt is a learned encoding, of which as many tokens are read as the
    prompt has in whose place it is, in training and in sampling.

    Args:
        network: The network.
        text: Encodings of the prompts (P, L, D).
        mask: Which of their tokens (P, L) are the prompt's.
        fps: Frames a second.
        image_size: Root of the video's area in pixels.
    """

    adaptive_norms: ClassVar[tuple[str, ...]] = ("scale_shift_table", "t_block")

    def __init__(self, network: STDiT3, text: Tensor, mask: Tensor, fps: float, image_size: float):
        super().__init__()
        require_range(above=0, at_most=1e6, fps=fps, image_size=image_size)
        null = network.y_embedder.y_embedding
        if text.shape[1:] != null.shape:
            raise ValueError(
                f"the text encoder gives {tuple(text.shape[1:])} tokens and features, the network "
                f"takes {tuple(null.shape)}; choose a text_encoder that belongs to it"
            )
        self.network = network
        self.fps = fps
        self.image_size = image_size
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("mask", mask.bool(), persistent=False)

    def forward(self, x: Tensor, clock: Tensor, prompts: Tensor) -> Tensor:
        """Return v (M, C, T, h, w) at x (M, C, T, h, w).

        Args:
            x: Latents (M, C, T, h, w).
            clock: The network's clock (M,).
            prompts: Indices of prompts (M,); -1 - p for the null prompt in place of
                prompt p.
        """
        numbers = torch.where(prompts < 0, -1 - prompts, prompts)
        null = self.network.y_embedder.y_embedding
        text = torch.where((prompts < 0)[:, None, None], null, self.text[numbers].to(null))
        fps = torch.full_like(clock, self.fps)
        output = self.network(x, clock, text, self.mask[numbers], fps, self.image_size)
        return -output.chunk(2, dim=1)[0]


def time_shift(num_frames: int = 102, height: int = 720, width: int = 1280) -> float:
    """Return the shift of flow time in Open-Sora's sampler (arXiv 2412.20404).

    It is sqrt(pixels / 512^2) sqrt(latent frames).
    """
    require_range(at_least=1, at_most=65_536, height=height, width=width)
    return (height * width / 512**2) ** 0.5 * latent_frames(num_frames) ** 0.5


# ------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------


def t5_masked(model: nn.Module, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the encodings `text` (P, L, D) and `mask` (P, L) of prompts.

    The encodings are in bfloat16, as in training. Tokens of a prompt, which the mask
    marks, see no others.
    """
    return {"text": model(tokens, mask).last_hidden_state.bfloat16(), "mask": mask.bool()}


def public_t5(checkpoint: str, length: int, source: str) -> TextModel:
    """Return the encoder of T5 (Raffel et al. 2020, arXiv 1910.10683).

    Args:
        checkpoint: A pipeline folder of diffusers, or a hub id of one.
        length: Number of tokens; prompts are filled up or cut to it.
        source: URL of the checkpoint, quoted in the error when it is missing.
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
    """Return an encoder with reproducible random weights and a token for every byte.

    Arguments but `length`, the number of tokens, are those of T5Config.
    """
    require_range(at_least=1, length=length, num_layers=num_layers, num_heads=num_heads)
    require_range(at_least=1, d_model=d_model, d_kv=d_kv, d_ff=d_ff)
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
