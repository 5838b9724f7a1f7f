"""Pipelines of diffusers that make videos of texts and of images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LattePipeline,
    LatteTransformer3DModel,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    MotionAdapter,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from models.pipelines.parts import Family, clip, clip_vision, family, image_vae, lively, llama, pictures, t5, umt5
from torch import Tensor

SMALL = {"height": 16, "width": 16, "num_frames": 5}


# --------------------------------------------------------------------------------------------------------------
# Wan and its kin
# --------------------------------------------------------------------------------------------------------------


def wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 1.5, 0.7, 1.2],
    )  # fmt: skip


def wan_transformer(**config: Any) -> WanTransformer3DModel:
    torch.manual_seed(len(str(config)))
    settings = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
    settings |= {"text_dim": 20, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32}
    return WanTransformer3DModel(**settings | config)


@family
def wan() -> Family:
    encoder, tokenizer = umt5()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(tokenizer, encoder, wan_vae(), scheduler, wan_transformer())
    return Family(lively(pipe), {**SMALL, "guidance_scale": 4.0, "max_sequence_length": 16})


class EulerUniPC(UniPCMultistepScheduler):
    """UniPC, which at order 1 and without its corrector is Euler's method, with times that are no whole numbers.

    diffusers' tells the network whole numbers and begins at 0.9997, which a network of random weights sees.
    """

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.sigmas[0] = 1.0
        self.timesteps = 1000 * self.sigmas[:-1]


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@family
def wan_unipc() -> Family:
    encoder, tokenizer = umt5()
    scheduler = EulerUniPC(**FLOW, flow_shift=3.0, solver_order=1, disable_corrector=list(range(100)))
    pipe = WanPipeline(tokenizer, encoder, wan_vae(), scheduler, wan_transformer())
    return Family(lively(pipe), {**SMALL, "guidance_scale": 4.0, "max_sequence_length": 16})


@family
def wan_two_experts() -> Family:
    """Wan 2.2: one transformer for noisy states, another one for the rest, each with its guidance."""
    encoder, tokenizer = umt5()
    pipe = WanPipeline(
        tokenizer, encoder, wan_vae(), FlowMatchEulerDiscreteScheduler(shift=3.0), wan_transformer(),
        wan_transformer(ffn_dim=40), boundary_ratio=0.875,
    )  # fmt: skip
    call = {**SMALL, "guidance_scale": 4.0, "guidance_scale_2": 2.0, "max_sequence_length": 16}
    return Family(lively(pipe), call)


@family
def wan_image_to_video() -> Family:
    """One image for all prompts, as the pipeline has it."""
    pytest.importorskip("ftfy")  # without which the pipeline fails
    encoder, tokenizer = umt5()
    vision, processor = clip_vision()
    pipe = WanImageToVideoPipeline(
        tokenizer, encoder, wan_vae(), FlowMatchEulerDiscreteScheduler(shift=3.0), processor, vision,
        wan_transformer(in_channels=12, image_dim=24, added_kv_proj_dim=24),
    )  # fmt: skip
    call = {**SMALL, "guidance_scale": 4.0, "image": pictures(1)[0], "max_sequence_length": 16}
    return Family(lively(pipe), call)


@family
def skyreels() -> Family:
    pytest.importorskip("ftfy")  # without which the pipeline fails
    encoder, tokenizer = umt5()
    scheduler = EulerUniPC(**FLOW, flow_shift=8.0, solver_order=1, disable_corrector=list(range(100)))
    transformer = SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=20, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    pipe = SkyReelsV2Pipeline(tokenizer, encoder, transformer, wan_vae(), scheduler)
    return Family(lively(pipe), {**SMALL, "guidance_scale": 4.0, "max_sequence_length": 16})


# --------------------------------------------------------------------------------------------------------------
# Other flow matching
# --------------------------------------------------------------------------------------------------------------


def ltx_parts() -> dict[str, Any]:
    encoder, tokenizer = t5()
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True), decoder_inject_noise=(False,) * 3,
        upsample_residual=(False, False), upsample_factor=(1, 1), patch_size=1, patch_size_t=1,
        down_block_types=("LTXVideoDownBlock3D",) * 2, downsample_type=("conv", "conv"),
    )  # fmt: skip
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        num_layers=2, caption_channels=20,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    return {
        "scheduler": scheduler, "vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "transformer": transformer
    }  # fmt: skip


LTX = {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 3.0, "max_sequence_length": 16}


@family
def ltx() -> Family:
    return Family(lively(LTXPipeline(**ltx_parts())), LTX)


@family
def ltx_image_to_video() -> Family:
    """Its first frame is the image: the scheduler sees the others only, at times of their own."""

    pipe = lively(LTXImageToVideoPipeline(**ltx_parts()))
    images = pictures(2, 32)

    def latents(state: Tensor, draws: list[torch.Generator]) -> Tensor:
        pixels = pipe.video_processor.preprocess(images, 32, 32)
        encoded = [pipe.vae.encode(image[None, :, None]).latent_dist for image in pixels]
        first = torch.cat([each.sample(draw) for each, draw in zip(encoded, draws, strict=True)])
        first = pipe._normalize_latents(first, pipe.vae.latents_mean, pipe.vae.latents_std)
        return pipe._pack_latents(torch.cat([first, state], dim=2))

    return Family(pipe, {**LTX, "image": images}, latents=latents)


@family
def hunyuan_video() -> Family:
    encoder, tokenizer = llama()
    encoder_2, tokenizer_2 = clip()
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=24, pooled_projection_dim=24, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = HunyuanVideoPipeline(encoder, tokenizer, transformer, vae, scheduler, encoder_2, tokenizer_2)
    template = {"template": "a video of {}", "crop_start": 4}
    call = {**SMALL, "guidance_scale": 6.0, "prompt_template": template, "max_sequence_length": 16}
    return Family(lively(pipe), call | {"true_cfg_scale": 2.0, "negative_prompt": ["blurred"] * 2})


@family
def mochi() -> Family:
    """Its clock runs up while noise goes away, and its network gives the velocity's opposite."""
    encoder, tokenizer = t5(16)
    vae = AutoencoderKLMochi(
        latent_channels=4, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5, latents_mean=None, latents_std=None,
    )  # fmt: skip
    transformer = MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=8, max_sequence_length=16,
    )  # fmt: skip
    pipe = MochiPipeline(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), vae, encoder, tokenizer, transformer)
    return Family(lively(pipe), {**SMALL, "num_frames": 7, "guidance_scale": 4.0, "max_sequence_length": 16})


# --------------------------------------------------------------------------------------------------------------
# Chains of betas, and a continuous clock
# --------------------------------------------------------------------------------------------------------------


def cogvideox_parts(channels: int) -> dict[str, Any]:
    encoder, tokenizer = t5()
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4, time_embed_dim=8,
        text_embed_dim=20, num_layers=2, sample_width=4, sample_height=4, sample_frames=5, max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    return {
        "tokenizer": tokenizer, "text_encoder": encoder, "vae": vae, "transformer": transformer, "scheduler": scheduler
    }  # fmt: skip


COG = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 3.0, "max_sequence_length": 16}


@family
def cogvideox() -> Family:
    """A chain of betas that ends in pure noise, its noise levels shifted. 5 steps divide its 1000 evenly."""
    return Family(lively(CogVideoXPipeline(**cogvideox_parts(4))), COG, num_steps=5)


@family
def cogvideox_image_to_video() -> Family:
    pipe = CogVideoXImageToVideoPipeline(**cogvideox_parts(8))
    return Family(lively(pipe), {**COG, "image": pictures(2, 32)}, num_steps=5)


@family
def stable_video_diffusion() -> Family:
    """Of images, without a text; its clock is log(sigma) / 4."""
    vision, processor = clip_vision(projection=True)
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32), latent_channels=4,
    )  # fmt: skip
    unet = UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), block_out_channels=(32, 32),
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, layers_per_block=1,
        cross_attention_dim=24, num_attention_heads=2, num_frames=2,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0,
        timestep_spacing="leading", steps_offset=1,
    )  # fmt: skip
    pipe = StableVideoDiffusionPipeline(vae, vision, unet, scheduler, processor)
    call = {"height": 16, "width": 16, "num_frames": 2, "max_guidance_scale": 2.0}
    return Family(lively(pipe), call, prompts=tuple(pictures(2)))


@family
def animate_diff() -> Family:
    encoder, tokenizer = clip()
    unet = UNet2DConditionModel(
        sample_size=12, cross_attention_dim=24, block_out_channels=(16, 16), norm_num_groups=8, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    adapter = MotionAdapter(
        block_out_channels=(16, 16), motion_layers_per_block=1, motion_norm_num_groups=8, motion_num_attention_heads=2,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    pipe = AnimateDiffPipeline(image_vae(4), encoder, tokenizer, unet, adapter, scheduler)
    return Family(lively(pipe), {**SMALL, "num_frames": 2, "guidance_scale": 3.0})


@family
def latte() -> Family:
    encoder, tokenizer = t5()
    transformer = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=1, attention_bias=True,
        sample_size=8, patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=20, video_length=2,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    pipe = LattePipeline(tokenizer, encoder, image_vae(4), transformer, scheduler)
    call = {"height": 16, "width": 16, "video_length": 2, "guidance_scale": 3.0, "clean_caption": False}
    return Family(lively(pipe), call)
