"""Pipelines of diffusers that make images of texts."""

from __future__ import annotations

from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from models.pipelines.parts import Family, clip, family, image_vae, lively, t5

SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@family
def stable_diffusion() -> Family:
    encoder, tokenizer = clip()
    unet = UNet2DConditionModel(
        sample_size=12,
        cross_attention_dim=24,
        attention_head_dim=4,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipe = StableDiffusionPipeline(
        image_vae(4), encoder, tokenizer, unet, EulerDiscreteScheduler(**SD_BETAS), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    return Family(lively(pipe), {"height": 24, "width": 24, "guidance_scale": 3.0})


@family
def flux() -> Family:
    encoder, tokenizer = clip()
    transformer = FluxTransformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 4),
    )
    vae = image_vae(8, 4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipe = FluxPipeline(scheduler, vae, encoder, tokenizer, *t5(), transformer)
    return Family(lively(pipe), {"height": 48, "width": 32, "guidance_scale": 3.5, "max_sequence_length": 16})
