"""Pipelines of diffusers that make images of texts."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from models.pipelines.parts import (
    Family,
    byte_tokenizer,
    clip,
    clip_with_projection,
    family,
    image_vae,
    lively,
    qwen_vision_language,
    t5,
)
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SMALL = {"height": 24, "width": 24, "guidance_scale": 3.0}
LARGER = {"height": 32, "width": 32}
LAYERS = {
    "vocab_size": 280,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
FLUX_VAE: dict[str, Any] = {"shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}


def unet(**config: Any) -> UNet2DConditionModel:
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
    return UNet2DConditionModel(**settings | config)


def stable_diffusion_of(scheduler: Any) -> Family:
    encoder, tokenizer = clip()
    pipe = StableDiffusionPipeline(
        image_vae(4), encoder, tokenizer, unet(), scheduler, None, None, requires_safety_checker=False
    )
    return Family(lively(pipe), SMALL)


@family
def stable_diffusion() -> Family:
    return stable_diffusion_of(EulerDiscreteScheduler(**SD_BETAS))


@family
def stable_diffusion_ddim() -> Family:
    """With a negative prompt for each sample, which the search follows."""
    made = stable_diffusion_of(DDIMScheduler(**SD_BETAS, set_alpha_to_one=True, clip_sample=False))
    return Family(made.pipe, SMALL | {"negative_prompt": ["blue", "a dog, awake"]})


@family
def stable_diffusion_v() -> Family:
    """A v-network whose chain ends at pure noise."""
    betas = SD_BETAS | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    made = stable_diffusion_of(DDIMScheduler(**betas, prediction_type="v_prediction", clip_sample=False))
    return Family(made.pipe, made.call, num_steps=5)


@family
def stable_diffusion_xl() -> Family:
    return Family(lively(StableDiffusionXLPipeline(**stable_diffusion_xl_parts(), add_watermarker=False)), SMALL)


def stable_diffusion_xl_parts() -> dict[str, Any]:
    first, second = clip(), clip_with_projection(16)
    network = unet(
        cross_attention_dim=40,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return {
        "vae": image_vae(4),
        "text_encoder": first[0],
        "tokenizer": first[1],
        "text_encoder_2": second[0],
        "tokenizer_2": second[1],
        "unet": network,
        "scheduler": EulerDiscreteScheduler(**SD_BETAS, use_karras_sigmas=True),
    }


@family
def stable_diffusion_3() -> Family:
    return Family(lively(StableDiffusion3Pipeline(*stable_diffusion_3_parts())), SMALL | {"max_sequence_length": 16})


def stable_diffusion_3_parts() -> tuple[Any, ...]:
    first, second, third = clip_with_projection(12), clip_with_projection(8), t5(20)
    transformer = SD3Transformer2DModel(
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
    vae = image_vae(4, **FLUX_VAE)
    return transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, *first, *second, *third


@family
def pixart_sigma() -> Family:
    """Its network says a variance too, and its own scheduler is DDIM."""
    encoder, tokenizer = t5()
    transformer = PixArtTransformer2DModel(
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
    scheduler = DDIMScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02, clip_sample=False)
    pipe = PixArtSigmaPipeline(tokenizer, encoder, image_vae(4), transformer, scheduler)
    return Family(
        lively(pipe), SMALL | {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 16}
    )


@family
def sana() -> Family:
    transformer = SanaTransformer2DModel(
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
    vae = AutoencoderDC(
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
    encoder = Gemma2Model(Gemma2Config(**LAYERS, **ENDS, query_pre_attn_scalar=8))
    pipe = SanaPipeline(byte_tokenizer(), encoder, vae, transformer, FlowMatchEulerDiscreteScheduler(shift=3.0))
    call = {"use_resolution_binning": False, "complex_human_instruction": None, "max_sequence_length": 16}
    return Family(lively(pipe), SMALL | LARGER | call)


@family
def aura_flow() -> Family:
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=280, d_model=20, d_kv=5, d_ff=32, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
        )
    )
    transformer = AuraFlowTransformer2DModel(
        sample_size=12,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=20,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    pipe = AuraFlowPipeline(byte_tokenizer(), encoder, image_vae(4), transformer, scheduler)
    return Family(lively(pipe), SMALL | {"max_sequence_length": 16})


@family
def lumina_2() -> Family:
    """Its clock runs up in the network, and its answer has the other sign; the loop turns both."""
    encoder = Gemma2Model(Gemma2Config(**LAYERS, **ENDS, query_pre_attn_scalar=8))
    transformer = Lumina2Transformer2DModel(
        sample_size=12,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(48, 24, 24),
        cap_feat_dim=24,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    pipe = Lumina2Pipeline(transformer, scheduler, image_vae(4, **FLUX_VAE), encoder, byte_tokenizer())
    return Family(lively(pipe), SMALL | LARGER | {"max_sequence_length": 32, "system_prompt": "draw"})


@family
def chroma() -> Family:
    """It guides by two calls of its network."""
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=20,
        axes_dims_rope=(4, 4, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    encoder, tokenizer = t5()
    scheduler = FlowMatchEulerDiscreteScheduler(use_beta_sigmas=False)
    pipe = ChromaPipeline(scheduler, image_vae(4, **FLUX_VAE), encoder, tokenizer, transformer)
    return Family(lively(pipe), SMALL | {"max_sequence_length": 16, "negative_prompt": ["dull", "a very bad drawing"]})


@family
def qwen_image() -> Family:
    """True guidance by two calls, with a norm."""
    encoder, tokenizer = qwen_vision_language()
    pipe = QwenImagePipeline(qwen_image_scheduler(), qwen_vae(), encoder, tokenizer, qwen_image_transformer())
    call = {"height": 32, "width": 32, "true_cfg_scale": 3.0, "negative_prompt": ["dull", "bad"]}
    return Family(lively(pipe), call)


def qwen_image_transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 4),
    )


def qwen_image_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02, max_image_seq_len=8192
    )


def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.0, 1.5, 2.0, 0.5],
    )


@family
def z_image() -> Family:
    """Its network takes lists of states, and its clock is turned by the loop."""
    transformer = ZImageTransformer2DModel(
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
    encoder = Qwen3Model(Qwen3Config(**LAYERS, **ENDS))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = ZImagePipeline(scheduler, image_vae(4, **FLUX_VAE), encoder, byte_tokenizer(Qwen2Tokenizer), transformer)
    return Family(lively(pipe), SMALL | {"max_sequence_length": 64})


@family
def hunyuan_dit() -> Family:
    """A v-network."""
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=12,
        hidden_size=16,
        num_layers=2,
        mlp_ratio=2.0,
        cross_attention_dim=16,
        cross_attention_dim_t5=24,
        pooled_projection_dim=16,
        text_len=77,
        text_len_t5=256,
        activation_fn="gelu-approximate",
        use_style_cond_and_image_meta_size=False,
    )
    bert = BertModel(
        BertConfig(vocab_size=280, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    encoder, tokenizer = t5(24)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.018, prediction_type="v_prediction",
        clip_sample=False, steps_offset=1,
    )  # fmt: skip
    pipe = HunyuanDiTPipeline(
        image_vae(4), bert, byte_tokenizer(), transformer, scheduler, None, None, False, encoder, tokenizer
    )
    return Family(lively(pipe), SMALL | {"use_resolution_binning": False})


@family
def cogview_4() -> Family:
    """Its network is told whole times, before the shift of its noise levels."""
    return Family(lively(CogView4Pipeline(*cogview_4_parts(4))), SMALL | LARGER)


def cogview_4_parts(channels: int) -> tuple[Any, ...]:
    encoder = GlmModel(GlmConfig(**LAYERS, **ENDS))
    transformer = CogView4Transformer2DModel(
        in_channels=channels,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=24,
        sample_size=12,
        rope_axes_dim=(24, 24),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear"
    )
    return byte_tokenizer(), encoder, image_vae(4), transformer, scheduler


@family
def flux() -> Family:
    return Family(lively(FluxPipeline(*flux_parts(), flux_transformer(32))), FLUX_CALL)


FLUX_CALL = {"height": 48, "width": 32, "guidance_scale": 3.5, "max_sequence_length": 16}


def flux_parts() -> tuple[Any, ...]:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return scheduler, image_vae(8, 4, **FLUX_VAE), *clip(), *t5()


def flux_transformer(channels: int, **config: Any) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
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


@family
def flux_2_klein() -> Family:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=72,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    encoder = Qwen3ForCausalLM(Qwen3Config(**LAYERS, **ENDS))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = Flux2KleinPipeline(scheduler, vae, encoder, byte_tokenizer(Qwen2Tokenizer), transformer)
    call = {
        "height": 32,
        "width": 32,
        "guidance_scale": 3.0,
        "max_sequence_length": 32,
        "text_encoder_out_layers": (0, 1, 2),
    }
    return Family(lively(pipe), call, latents=lambda state, draws: state.mT.unflatten(2, (8, 8)))


@family
def dit() -> Family:
    """Classes in place of prompts; it takes no latents."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=12
    )
    scheduler = DDIMScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02, clip_sample=False)
    return Family(lively(DiTPipeline(transformer, image_vae(4), scheduler)), {"guidance_scale": 3.0}, (3, 7))
