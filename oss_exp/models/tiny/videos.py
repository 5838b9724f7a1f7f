"""Small pipelines of diffusers that generate videos from texts and from images."""

from __future__ import annotations

from typing import Any

import torch

from oss_exp.models.tiny.parts import clip, clip_vision, diffusers, llama, t5, umt5

# Arguments of calls for the size.
SMALL = {"height": 16, "width": 16, "num_frames": 5}
WAN = SMALL | {"max_sequence_length": 16}
LTX = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}
COG = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}
HUNYUAN = WAN | {"prompt_template": {"template": "a video of {}", "crop_start": 4}}
SVD = {"height": 16, "width": 16, "num_frames": 2}


# ------------------------------------------------------------------------------------------------
# Flow matching
# ------------------------------------------------------------------------------------------------


def wan(experts: int = 1) -> Any:
    """Build Wan; with two experts, it has one transformer for noisy states and one for others."""
    encoder, tokenizer = umt5()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    networks = [wan_transformer(), wan_transformer(ffn_dim=40)][:experts]
    config = {"boundary_ratio": 0.875} if experts == 2 else {}
    return diffusers.WanPipeline(tokenizer, encoder, wan_vae(), scheduler, *networks, **config)


def wan_image_to_video(experts: int = 1) -> Any:
    """Build Wan for images; two experts get the image in their channels only."""
    encoder, tokenizer = umt5()
    vae = wan_vae()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

    # Networks, with or without an encoder of the image.
    if experts == 2:
        networks = {
            "transformer": wan_transformer(in_channels=12),
            "transformer_2": wan_transformer(in_channels=12, ffn_dim=40),
            "boundary_ratio": 0.9,
            "image_encoder": None,
            "image_processor": None,
        }
    else:
        vision, processor = clip_vision()
        networks = {
            "transformer": wan_transformer(in_channels=12, image_dim=24, added_kv_proj_dim=24),
            "image_encoder": vision,
            "image_processor": processor,
        }
    return diffusers.WanImageToVideoPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae, scheduler=scheduler, **networks
    )


def wan_vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 1.5, 0.7, 1.2],
    )


def wan_transformer(**config: Any) -> Any:
    torch.manual_seed(len(str(config)))
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 20,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return diffusers.WanTransformer3DModel(**settings | config)


def ltx() -> Any:
    return diffusers.LTXPipeline(**ltx_parts())


def ltx_parts() -> dict[str, Any]:
    encoder, tokenizer = t5()

    # Autoencoder.
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=1,
        patch_size_t=1,
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        downsample_type=("conv", "conv"),
    )

    # Network.
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=20,
    )

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.1
    )
    return {
        "scheduler": scheduler,
        "vae": vae,
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "transformer": transformer,
    }


def hunyuan_video() -> Any:
    encoder, tokenizer = llama()
    encoder_2, tokenizer_2 = clip()

    # Autoencoder and network.
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=24,
        pooled_projection_dim=24,
        rope_axes_dim=(4, 4, 4),
    )

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return diffusers.HunyuanVideoPipeline(
        encoder, tokenizer, transformer, vae, scheduler, encoder_2, tokenizer_2
    )


# ------------------------------------------------------------------------------------------------
# A chain of betas, and a continuous clock
# ------------------------------------------------------------------------------------------------


def cogvideox() -> Any:
    """Build CogVideoX, whose chain ends in pure noise, and whose noise levels are shifted."""
    return diffusers.CogVideoXPipeline(**cogvideox_parts(4))


def cogvideox_parts(channels: int) -> dict[str, Any]:
    encoder, tokenizer = t5()

    # Autoencoder and network.
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=20,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )

    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": encoder,
        "vae": vae,
        "transformer": transformer,
        "scheduler": scheduler,
    }


def stable_video_diffusion() -> Any:
    """Build Stable Video Diffusion, which takes images but no text; its clock is log(sigma) / 4."""
    vision, processor = clip_vision(projection=True)

    # Autoencoder and network.
    vae = diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32), latent_channels=4
    )
    network = diffusers.UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 32),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=24,
        num_attention_heads=2,
        num_frames=2,
    )

    # Scheduler.
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing="leading",
        steps_offset=1,
    )
    return diffusers.StableVideoDiffusionPipeline(vae, vision, network, scheduler, processor)
