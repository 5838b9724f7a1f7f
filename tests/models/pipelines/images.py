"""Pipelines of diffusers that make images from text."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLFlux2,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
)
from models.pipelines.parts import Family, family, shipped
from transformers import (
    BertConfig,
    BertModel,
    GlmConfig,
    GlmModel,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    UMT5Config,
    UMT5EncoderModel,
)

from oss_exp.models.tiny import images
from oss_exp.models.tiny.images import FLUX_VAE, LARGER, SD_BETAS
from oss_exp.models.tiny.parts import ENDS, LAYERS, byte_tokenizer, gemma, image_vae, lively, t5

SMALL = images.SMALL | {"guidance_scale": 3.0}


def stable_diffusion_of(scheduler: Any) -> Family:
    """Stable Diffusion with another scheduler."""
    return Family(lively(images.stable_diffusion(scheduler)), SMALL)


@family
def stable_diffusion() -> Family:
    return shipped("StableDiffusionPipeline", guidance_scale=3.0)


@family
def stable_diffusion_ddim() -> Family:
    """Stable Diffusion with a negative prompt for each sample."""
    base = stable_diffusion_of(DDIMScheduler(**SD_BETAS, set_alpha_to_one=True, clip_sample=False))
    return Family(base.pipe, SMALL | {"negative_prompt": ["blue", "a dog, awake"]})


@family
def stable_diffusion_v() -> Family:
    """A v-network whose chain ends at pure noise."""
    betas = SD_BETAS | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    base = stable_diffusion_of(
        DDIMScheduler(**betas, prediction_type="v_prediction", clip_sample=False)
    )
    return Family(base.pipe, base.call, num_steps=5)


@family
def stable_diffusion_xl() -> Family:
    return shipped("StableDiffusionXLPipeline", guidance_scale=3.0)


@family
def stable_diffusion_3() -> Family:
    return shipped("StableDiffusion3Pipeline", guidance_scale=3.0)


@family
def pixart_sigma() -> Family:
    return shipped("PixArtSigmaPipeline", guidance_scale=3.0, clean_caption=False)


@family
def sana() -> Family:
    return shipped("SanaPipeline", guidance_scale=3.0)


@family
def aura_flow() -> Family:
    # The networks.
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=280,
            d_model=20,
            d_kv=5,
            d_ff=32,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
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
    """The loop turns the network's clock and the sign of its answer."""
    # The networks.
    encoder, tokenizer = gemma()

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
    pipe = Lumina2Pipeline(transformer, scheduler, image_vae(4, **FLUX_VAE), encoder, tokenizer)

    return Family(
        lively(pipe), SMALL | LARGER | {"max_sequence_length": 32, "system_prompt": "draw"}
    )


@family
def chroma() -> Family:
    """A pipeline that guides by two calls of its network."""
    # The networks.
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

    return Family(
        lively(pipe),
        SMALL | {"max_sequence_length": 16, "negative_prompt": ["dull", "a very bad drawing"]},
    )


@family
def qwen_image() -> Family:
    """True guidance by two calls, with the norm kept."""
    return shipped("QwenImagePipeline", true_cfg_scale=3.0, negative_prompt=["dull", "bad"])


@family
def z_image() -> Family:
    return shipped("ZImagePipeline", guidance_scale=3.0)


@family
def hunyuan_dit() -> Family:
    """A v-network with two text encoders."""
    # The network.
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

    # Text.
    bert = BertModel(
        BertConfig(
            vocab_size=280,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )

    encoder, tokenizer = t5(24)

    # The pipeline.
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.018,
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
    )

    pipe = HunyuanDiTPipeline(
        image_vae(4),
        bert,
        byte_tokenizer(),
        transformer,
        scheduler,
        None,
        None,
        False,
        encoder,
        tokenizer,
    )

    return Family(lively(pipe), SMALL | {"use_resolution_binning": False})


@family
def cogview_4() -> Family:
    """Its network's clock is the time before the shift, in whole numbers."""
    return Family(lively(CogView4Pipeline(*cogview_4_parts(4))), SMALL | LARGER)


def cogview_4_parts(channels: int) -> tuple[Any, ...]:
    """The parts of CogView 4, with this many channels of the network's input."""
    # The networks.
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
        use_dynamic_shifting=True,
        base_shift=0.25,
        max_shift=0.75,
        base_image_seq_len=256,
        time_shift_type="linear",
    )

    return byte_tokenizer(), encoder, image_vae(4), transformer, scheduler


@family
def flux() -> Family:
    return shipped("FluxPipeline", guidance_scale=3.5)


@family
def flux_2_klein() -> Family:
    # The networks.
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
    """A pipeline of classes, which draws its latents itself."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=12,
    )

    scheduler = DDIMScheduler(
        beta_schedule="linear", beta_start=0.0001, beta_end=0.02, clip_sample=False
    )

    return Family(
        lively(DiTPipeline(transformer, image_vae(4), scheduler)), {"guidance_scale": 3.0}, (3, 7)
    )
