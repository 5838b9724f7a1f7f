"""Small pipelines of diffusers that generate and edit images."""

from __future__ import annotations

from typing import Any

from oss_exp.models.tiny.parts import (
    clip,
    clip_with_projection,
    diffusers,
    gemma,
    image_vae,
    qwen,
    qwen_vision_language,
    t5,
)

SD_BETAS = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}
FLUX_VAE: dict[str, Any] = {
    "shift_factor": 0.1,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

# Arguments of calls for the size.
SMALL = {"height": 24, "width": 24}
LARGER = {"height": 32, "width": 32}
SHORT = SMALL | {"max_sequence_length": 16}
FLUX = {"height": 48, "width": 32, "max_sequence_length": 16}
SANA = LARGER | {
    "use_resolution_binning": False,
    "complex_human_instruction": None,
    "max_sequence_length": 16,
}


# ------------------------------------------------------------------------------------------------
# Stable Diffusion
# ------------------------------------------------------------------------------------------------


def stable_diffusion(scheduler: Any = None) -> Any:
    return diffusers.StableDiffusionPipeline(**stable_diffusion_parts(scheduler))


def stable_diffusion_parts(scheduler: Any = None, **network: Any) -> dict[str, Any]:
    encoder, tokenizer = clip()
    return {
        "vae": image_vae(4),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "unet": unet(**network),
        "scheduler": scheduler or diffusers.EulerDiscreteScheduler(**SD_BETAS),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def unet(**config: Any) -> Any:
    settings = {
        "sample_size": 12,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(**settings | config)


def stable_diffusion_xl() -> Any:
    return diffusers.StableDiffusionXLPipeline(**stable_diffusion_xl_parts(), add_watermarker=False)


def stable_diffusion_xl_parts() -> dict[str, Any]:
    encoder, tokenizer = clip()
    encoder_2, tokenizer_2 = clip_with_projection(16)

    network = unet(
        cross_attention_dim=40,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return {
        "vae": image_vae(4),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "text_encoder_2": encoder_2,
        "tokenizer_2": tokenizer_2,
        "unet": network,
        "scheduler": diffusers.EulerDiscreteScheduler(**SD_BETAS, use_karras_sigmas=True),
    }


def stable_diffusion_3() -> Any:
    return diffusers.StableDiffusion3Pipeline(*stable_diffusion_3_parts())


def stable_diffusion_3_parts() -> tuple[Any, ...]:
    # Text encoders with their tokenizers.
    first = clip_with_projection(12)
    second = clip_with_projection(8)
    third = t5(20)

    # Network, scheduler and autoencoder.
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=20,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = image_vae(4, **FLUX_VAE)
    return transformer, scheduler, vae, *first, *second, *third


# ------------------------------------------------------------------------------------------------
# Transformers
# ------------------------------------------------------------------------------------------------


def pixart_sigma() -> Any:
    """Build PixArt Sigma, whose network predicts a variance too; its own scheduler is DDIM."""
    encoder, tokenizer = t5()
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=20,
        sample_size=12,
        use_additional_conditions=False,
    )

    betas = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
    scheduler = diffusers.DDIMScheduler(**betas, clip_sample=False)
    return diffusers.PixArtSigmaPipeline(tokenizer, encoder, image_vae(4), transformer, scheduler)


def sana() -> Any:
    # Network.
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=24,
        sample_size=6,
    )

    # Autoencoder.
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )

    # Text encoder and scheduler.
    encoder, tokenizer = gemma()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.SanaPipeline(tokenizer, encoder, vae, transformer, scheduler)


def qwen_image() -> Any:
    encoder, tokenizer = qwen_vision_language()
    return diffusers.QwenImagePipeline(
        qwen_image_scheduler(), qwen_vae(), encoder, tokenizer, qwen_image_transformer()
    )


def qwen_image_transformer() -> Any:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 4),
    )


def qwen_image_scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        shift_terminal=0.02,
        max_image_seq_len=8192,
    )


def qwen_vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.0, 1.5, 2.0, 0.5],
    )


def z_image() -> Any:
    """Build Z-Image, whose network takes lists of states, and whose loop inverts its clock."""
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 4, 4],
        axes_lens=[128, 32, 32],
    )

    encoder, tokenizer = qwen()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.ZImagePipeline(
        scheduler, image_vae(4, **FLUX_VAE), encoder, tokenizer, transformer
    )


# ------------------------------------------------------------------------------------------------
# FLUX
# ------------------------------------------------------------------------------------------------


def flux() -> Any:
    return diffusers.FluxPipeline(*flux_parts(), flux_transformer(32))


def flux_kontext() -> Any:
    """Build FLUX.1 Kontext, where the image's tokens follow those of the state."""
    return diffusers.FluxKontextPipeline(*flux_parts(), flux_transformer(32))


def flux_parts() -> tuple[Any, ...]:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return scheduler, image_vae(8, 4, **FLUX_VAE), *clip(), *t5()


def flux_transformer(channels: int, **config: Any) -> Any:
    return diffusers.FluxTransformer2DModel(
        in_channels=channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 4),
        **config,
    )
