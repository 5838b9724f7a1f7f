"""Pipelines of diffusers that make sound from text."""

from __future__ import annotations

from diffusers import (
    AutoencoderOobleck,
    CosineDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LongCatAudioDiTPipeline,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from models.pipelines.parts import Family, family

from oss_exp.models.tiny.parts import lively, t5, umt5


def stable_audio_of(scheduler: EDMEulerScheduler | CosineDPMSolverMultistepScheduler) -> Family:
    """Stable Audio with another scheduler."""
    # Text and sound.
    encoder, tokenizer = t5(16)
    vae = AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        audio_channels=2,
        sampling_rate=16,
    )

    # The network.
    projection = StableAudioProjectionModel(
        text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=8
    )
    transformer = StableAudioDiTModel(
        sample_size=24,
        in_channels=4,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=32,
        cross_attention_input_dim=16,
    )

    pipe = StableAudioPipeline(vae, encoder, projection, tokenizer, transformer, scheduler)
    tokenizer.model_max_length = 16

    return Family(lively(pipe), {"guidance_scale": 3.0})


@family
def stable_audio() -> Family:
    """A v-network in EDM's coordinates, with EDM's clock instead of its own scheduler's."""
    return stable_audio_of(
        EDMEulerScheduler(
            sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, prediction_type="v_prediction"
        )
    )


@family
def longcat_audio() -> Family:
    """Flow matching whose clock runs upwards."""
    encoder, tokenizer = umt5()
    tokenizer.model_max_length = 16

    vae = LongCatAudioDiTVae(
        channels=4,
        c_mults=[1, 2],
        strides=[2, 2],
        latent_dim=4,
        encoder_latent_dim=8,
        downsampling_ratio=4,
        sample_rate=16,
    )

    transformer = LongCatAudioDiTTransformer(
        dit_dim=24, dit_depth=2, dit_heads=2, dit_text_dim=20, latent_dim=4
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True)
    pipe = LongCatAudioDiTPipeline(vae, encoder, tokenizer, transformer, scheduler)

    return Family(lively(pipe), {"guidance_scale": 3.0, "audio_duration_s": 3.0})
