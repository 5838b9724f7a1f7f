"""Whole pipelines of diffusers with small random parts: a run is tried in seconds, without a download.

A builder is found by the name of its pipeline's class. What it makes has the layers of the real one, so all but the
pictures is as it will be.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from oss_exp.models.tiny import images, videos
from oss_exp.models.tiny.parts import lively, pictures


class Tiny(NamedTuple):
    """What makes a small pipeline, and its size in its call."""

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
    """Return a small pipeline of diffusers' class `kind`, and its call: as given, at a small size.

    The same weights every time, float32. With a guidance of its own for a second expert there are two. An image that
    the call may have and has not is made up. ValueError for a class of which there is none.
    """
    if kind not in TINY:
        raise ValueError(
            f"pipeline_class={kind} has no size=tiny; these have one: {', '.join(TINY)}"
        )
    make, small = TINY[kind]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        pipe = lively(make(**{"experts": 2} if "guidance_scale_2" in call else {}))
    takes = inspect.signature(type(pipe).__call__).parameters
    made_up = {"image": pictures(1)[0]} if {"prompt", "image"} <= takes.keys() else {}
    return pipe, {**made_up, **call, **small}
