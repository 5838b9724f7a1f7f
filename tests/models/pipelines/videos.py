"""Pipelines of diffusers that make videos from text and images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLMochi,
    CogVideoXImageToVideoPipeline,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    LTXImageToVideoPipeline,
    MochiPipeline,
    MochiTransformer3DModel,
    MotionAdapter,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
)
from models.pipelines.parts import Family, family, shipped
from torch import Tensor

from oss_exp.models.tiny import videos
from oss_exp.models.tiny.parts import clip, image_vae, lively, pictures, t5, umt5
from oss_exp.models.tiny.videos import COG, LTX, SMALL, wan_transformer, wan_vae

# --------------------------------------------------------------------------------------------------
# Wan and its kin
# --------------------------------------------------------------------------------------------------


@family
def wan() -> Family:
    return shipped("WanPipeline", guidance_scale=4.0)


class EulerUniPC(UniPCMultistepScheduler):
    """UniPC as Euler's method (order 1, no corrector), with exact times.

    The original rounds the network's times and begins at 0.9997: random networks notice both.
    """

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.sigmas[0] = 1.0
        self.timesteps = 1000 * self.sigmas[:-1]


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@family
def wan_unipc() -> Family:
    encoder, tokenizer = umt5()
    scheduler = EulerUniPC(
        **FLOW, flow_shift=3.0, solver_order=1, disable_corrector=list(range(100))
    )
    pipe = WanPipeline(tokenizer, encoder, wan_vae(), scheduler, wan_transformer())
    return Family(lively(pipe), {**SMALL, "guidance_scale": 4.0, "max_sequence_length": 16})


@family
def wan_two_experts() -> Family:
    """Wan 2.2: one transformer for noisy states and one for clean ones, each with its guidance."""
    return shipped("WanPipeline", guidance_scale=4.0, guidance_scale_2=2.0)


@family
def wan_image_to_video() -> Family:
    """A pipeline of one image for all prompts."""
    pytest.importorskip("ftfy")  # the pipeline needs it
    return shipped("WanImageToVideoPipeline", guidance_scale=4.0)


@family
def wan_image_to_video_two_experts() -> Family:
    pytest.importorskip("ftfy")
    return shipped("WanImageToVideoPipeline", guidance_scale=4.0, guidance_scale_2=2.0)


@family
def skyreels() -> Family:
    pytest.importorskip("ftfy")  # the pipeline needs it
    encoder, tokenizer = umt5()
    scheduler = EulerUniPC(
        **FLOW, flow_shift=8.0, solver_order=1, disable_corrector=list(range(100))
    )

    transformer = SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=20,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )

    pipe = SkyReelsV2Pipeline(tokenizer, encoder, transformer, wan_vae(), scheduler)

    return Family(lively(pipe), {**SMALL, "guidance_scale": 4.0, "max_sequence_length": 16})


# --------------------------------------------------------------------------------------------------
# Other flow matching
# --------------------------------------------------------------------------------------------------


@family
def ltx() -> Family:
    return shipped("LTXPipeline", guidance_scale=3.0)


@family
def ltx_image_to_video() -> Family:
    """The first frame is the image; the scheduler steps the others, which have their own times."""
    pipe = lively(LTXImageToVideoPipeline(**videos.ltx_parts()))
    images = pictures(2, 32)

    def latents(state: Tensor, draws: list[torch.Generator]) -> Tensor:
        pixels = pipe.video_processor.preprocess(images, 32, 32)
        frames = []
        for image, draw in zip(pixels, draws, strict=True):
            frames.append(pipe.vae.encode(image[None, :, None]).latent_dist.sample(draw))
        first = torch.cat(frames)
        first = pipe._normalize_latents(first, pipe.vae.latents_mean, pipe.vae.latents_std)
        return pipe._pack_latents(torch.cat([first, state], dim=2))

    return Family(pipe, {**LTX, "guidance_scale": 3.0, "image": images}, latents=latents)


@family
def hunyuan_video() -> Family:
    return shipped(
        "HunyuanVideoPipeline",
        guidance_scale=6.0,
        true_cfg_scale=2.0,
        negative_prompt=["blurred", "blurred"],
    )


@family
def mochi() -> Family:
    """Its clock runs upwards, and its network answers minus the velocity."""
    # Text and frames.
    encoder, tokenizer = t5(16)
    vae = AutoencoderKLMochi(
        latent_channels=4,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
        latents_mean=None,
        latents_std=None,
    )

    # The network.
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=16,
    )

    # The pipeline.
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipe = MochiPipeline(scheduler, vae, encoder, tokenizer, transformer)
    call = {"num_frames": 7, "guidance_scale": 4.0, "max_sequence_length": 16}
    return Family(lively(pipe), SMALL | call)


# --------------------------------------------------------------------------------------------------
# Chains of betas, and a continuous clock
# --------------------------------------------------------------------------------------------------


@family
def cogvideox() -> Family:
    """A chain of 1000 steps, which 5 divide."""
    base = shipped("CogVideoXPipeline", guidance_scale=3.0)
    return Family(base.pipe, base.call, num_steps=5)


@family
def cogvideox_image_to_video() -> Family:
    pipe = CogVideoXImageToVideoPipeline(**videos.cogvideox_parts(8))
    call = {**COG, "guidance_scale": 3.0, "image": pictures(2, 32)}
    return Family(lively(pipe), call, num_steps=5)


@family
def stable_video_diffusion() -> Family:
    base = shipped("StableVideoDiffusionPipeline", max_guidance_scale=2.0)
    return Family(base.pipe, base.call, prompts=tuple(pictures(2)))


@family
def animate_diff() -> Family:
    encoder, tokenizer = clip()

    # The network.
    unet = UNet2DConditionModel(
        sample_size=12,
        cross_attention_dim=24,
        block_out_channels=(16, 16),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )

    adapter = MotionAdapter(
        block_out_channels=(16, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
    )

    # The pipeline.
    scheduler = EulerDiscreteScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
    )
    pipe = AnimateDiffPipeline(image_vae(4), encoder, tokenizer, unet, adapter, scheduler)

    return Family(lively(pipe), {**SMALL, "num_frames": 2, "guidance_scale": 3.0})


@family
def latte() -> Family:
    # The networks.
    encoder, tokenizer = t5()
    transformer = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=20,
        video_length=2,
    )

    # The pipeline.
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    pipe = LattePipeline(tokenizer, encoder, image_vae(4), transformer, scheduler)
    call = {"height": 16, "width": 16, "video_length": 2}
    call |= {"guidance_scale": 3.0, "clean_caption": False}
    return Family(lively(pipe), call)
