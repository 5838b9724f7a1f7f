"""Whole pipelines of diffusers with small random parts, to try a run in seconds without a download.

A builder is looked up by the name of its pipeline's class. Its pipeline has the layers of the real
one, so everything but the pictures is realistic.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from oss_exp.models.tiny import images, videos
from oss_exp.models.tiny.parts import lively, pictures


class Tiny(NamedTuple):
    """A builder of a small pipeline, and the arguments of a call at its size."""

    make: Callable[..., Any]
    call: Mapping[str, Any]


TINY = {
    "CogVideoXPipeline": Tiny(videos.cogvideox, videos.COG),
    "FluxKontextPipeline": Tiny(
        images.flux_kontext, images.FLUX | {"max_area": 48 * 32, "_auto_resize": False}
    ),
    "FluxPipeline": Tiny(images.flux, images.FLUX),
    "HunyuanVideoPipeline": Tiny(videos.hunyuan_video, videos.HUNYUAN),
    "LTXPipeline": Tiny(videos.ltx, videos.LTX),
    "PixArtSigmaPipeline": Tiny(
        images.pixart_sigma, images.SHORT | {"use_resolution_binning": False}
    ),
    "QwenImagePipeline": Tiny(images.qwen_image, images.LARGER),
    "SanaPipeline": Tiny(images.sana, images.SANA),
    "StableDiffusion3Pipeline": Tiny(images.stable_diffusion_3, images.SHORT),
    "StableDiffusionPipeline": Tiny(images.stable_diffusion, images.SMALL),
    "StableDiffusionXLPipeline": Tiny(images.stable_diffusion_xl, images.SMALL),
    "StableVideoDiffusionPipeline": Tiny(videos.stable_video_diffusion, videos.SVD),
    "WanImageToVideoPipeline": Tiny(videos.wan_image_to_video, videos.WAN),
    "WanPipeline": Tiny(videos.wan, videos.WAN),
    "ZImagePipeline": Tiny(images.z_image, images.SMALL | {"max_sequence_length": 64}),
}


def tiny(kind: str | None, call: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a small pipeline, and the arguments to call it with.

    Its weights are float32, and the same every time. It has two experts if the call has a guidance
    for the second one.

    Args:
        kind: Name of the pipeline's class in diffusers.
        call: Arguments of the call. Those for the size are replaced, and a missing image is made
            up.

    Raises:
        ValueError: For a class without a small pipeline.
    """
    if kind not in TINY:
        raise ValueError(
            f"pipeline_class={kind} has no size=tiny; these have one: {', '.join(TINY)}"
        )
    make, size = TINY[kind]
    options = {"experts": 2} if "guidance_scale_2" in call else {}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        pipe = lively(make(**options))

    parameters = inspect.signature(type(pipe).__call__).parameters
    takes_image = {"prompt", "image"} <= parameters.keys()
    image = {"image": pictures(1)[0]} if takes_image else {}
    return pipe, {**image, **call, **size}
