"""Stable Diffusion 1 and 2 and what was made of them: a pipeline folder of diffusers behind canonical time.

(Rombach et al. 2022, arXiv 2112.10752.) The folder's own configs say what the parts are and how they were trained, so
one class serves every pipeline of a U-Net, a CLIP text encoder and a VAE. A condition is a prompt's number.
Legend: M rows, *E event dims, P prompts, L tokens, D features; t (M,) float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypedDict

import torch
from torch import Tensor

from oss_exp.checks import SettingsOf, require_range
from oss_exp.models.checkpoints.pipelines import Pipeline, Prompted, PromptedBackbone, require_features
from oss_exp.models.decoders.image import VAE
from oss_exp.models.guidance import Guidance
from oss_exp.models.network import Dtype, at_size
from oss_exp.models.parameterization import NoisePrediction, Parameterization, VPVelocity
from oss_exp.models.text.encoders import clip_text, encode
from oss_exp.noise import DDPMPath, linear_betas, scaled_linear_betas

PARTS = {
    "unet": ("UNet2DConditionModel",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "vae": ("AutoencoderKL",),
    "scheduler": (),
}
SCALE = {"scaling_factor": 0.18215}  # of a VAE whose config is older than this key


class StableDiffusionSize(TypedDict):
    """One of the sizes of `StableDiffusion`."""

    checkpoint: str
    unet: Annotated[Mapping[str, Any], SettingsOf("diffusers.UNet2DConditionModel")]
    text_encoder: Annotated[Mapping[str, Any], SettingsOf("transformers.CLIPTextConfig")]
    vae: Annotated[Mapping[str, Any], SettingsOf("diffusers.AutoencoderKL")]
    scheduler: Annotated[Mapping[str, Any], SettingsOf("diffusers.DDIMScheduler")]


class StableDiffusion(Prompted):
    """A text-to-image network at one of its sizes.

    sizes:        by name the `checkpoint`, and for random weights the configs of `unet`, `text_encoder`, `vae` and
                  `scheduler` as diffusers writes them. `full` is the public one; `tiny` has the same layers, small.
    prompts:      those that conditions number.
    decode_batch: images decoded at a time.
    checkpoint:   a pipeline folder or a hub id, whose own configs count; `random`: reproducible random weights, to try
                  all but the pictures; null: that of the size.
    source:       where the public checkpoint is had, for the message when it is missing.
    """

    def __init__(
        self,
        name: str,
        size: str,
        sizes: Mapping[str, StableDiffusionSize],
        guidance: Guidance,
        micro_batch: int,
        decode_batch: int,
        dtype: Dtype,
        checkpoint: str | None,
        source: str,
        prompts: Sequence[str] = (),
    ):
        name = at_size(name, size, sizes)
        pipeline = Pipeline("StableDiffusionPipeline", PARTS, size, sizes, checkpoint, source)
        with pipeline.making("scheduler"):
            parameterization = trained_as(pipeline.configs["scheduler"])
        unet = pipeline.network("unet")
        channels, side = unet.config.in_channels, unet.config.sample_size
        with pipeline.making("unet"):
            if not isinstance(side, int) or side < 1:
                raise ValueError(f"the unet has sample_size={side}; choose a model.checkpoint of square images")
        encodings, sha256 = encode(pipeline.text_model("text_encoder", "tokenizer", clip_text), [*prompts, ""])
        require_features(pipeline, "unet", encodings["text"], unet.config.cross_attention_dim)
        require_range(at_least=1, decode_batch=decode_batch)
        with pipeline.making("vae"):
            vae = SCALE | pipeline.configs["vae"]
            decoder = VAE(checkpoint=pipeline.checkpoint, micro_batch=decode_batch, source=source, **vae)
        super().__init__(
            name=name,
            prompts=prompts,
            encoder_sha256=sha256,
            backbone=PromptedUNet(unet, table=encodings["text"]),
            parameterization=parameterization,
            event_shape=(channels, side, side),
            decoder=decoder,
            guidance=guidance,
            micro_batch=micro_batch,
            dtype=dtype,
            checkpoint=pipeline.weights("unet"),
        )


class PromptedUNet(PromptedBackbone):
    """diffusers.UNet2DConditionModel(x (M, *E), clock (M,), prompts (M,), -1 for none) -> (M, *E).

    table: encodings (P + 1, L, D).
    """

    adaptive_norms: ClassVar[tuple[str, ...]] = ("time_emb_proj", "time_embedding")

    def forward(self, x: Tensor, clock: Tensor, prompts: Tensor) -> Tensor:
        return self.network(x, clock, encoder_hidden_states=self.table[prompts]).sample


DEFAULTS: Mapping[str, Any] = {  # of diffusers' schedulers, for what a config leaves out
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}


def trained_as(scheduler: Mapping[str, Any]) -> Parameterization:
    """What the config of a pipeline's scheduler says of its network; ValueError for what is not known here."""
    rules = {"linear": linear_betas, "scaled_linear": scaled_linear_betas}
    answers = {"epsilon": NoisePrediction, "v_prediction": VPVelocity}
    scheduler = {**DEFAULTS, **scheduler}
    rule, answer, zero_snr = (scheduler[key] for key in ("beta_schedule", "prediction_type", "rescale_betas_zero_snr"))
    if rule not in rules or answer not in answers or scheduler.get("trained_betas") is not None:
        raise ValueError(
            f"the pipeline's scheduler has beta_schedule={rule}, prediction_type={answer}, trained_betas="
            f"{scheduler.get('trained_betas')}; known are {', '.join(rules)}; {', '.join(answers)}; and null"
        )
    if zero_snr and answer == "epsilon":
        raise ValueError(
            "the pipeline's scheduler has rescale_betas_zero_snr=true and prediction_type=epsilon, which says nothing "
            "at pure noise; choose a model.checkpoint with v_prediction"
        )
    num_steps, start, end = (scheduler[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
    require_range(at_least=2, num_train_timesteps=num_steps)
    require_range(above=0, below=1, beta_start=start, beta_end=end)
    path = DDPMPath(rules[rule](num_steps, start, end, bool(zero_snr)))
    return answers[answer](path, float(path.canonical(torch.tensor(num_steps - 1.0, dtype=torch.float64))))
