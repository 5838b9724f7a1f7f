"""Stable Diffusion 1 and 2 and what was made of them: a pipeline folder of diffusers behind canonical time.

(Rombach et al. 2022, arXiv 2112.10752.) The folder's own configs say what the parts are and how they were trained, so
one class serves every pipeline of a U-Net, a CLIP text encoder and a VAE. A condition is a prompt's number.
Legend: M rows, *E event dims, P prompts, L tokens, D features; t (M,) float64.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oss_exp.files import read_json, sha256
from oss_exp.models.decoders import VAE
from oss_exp.models.guidance import Guidance
from oss_exp.models.network import Network
from oss_exp.models.parameterization import Noise, Parameterization, VPVelocity
from oss_exp.models.prompts import PromptCache, read_prompts
from oss_exp.models.weights import digest, locate, randomise, read
from oss_exp.noise import DDPMPath, linear_betas, scaled_linear_betas
from oss_exp.solvers import BoundVelocity

PARTS = {
    "unet": ("UNet2DConditionModel",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "vae": ("AutoencoderKL",),
}
OTHERS = ("scheduler", "safety_checker", "feature_extractor", "image_encoder")  # parts that change no picture here
CONFIGS = {
    "unet": "unet/config.json",
    "text_encoder": "text_encoder/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
SCALE = {"scaling_factor": 0.18215}  # of a VAE whose config is older than this key
UNET = ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors.index.json")
TEXT_ENCODER = ("text_encoder/model.safetensors",)
TOKENIZER = (  # old layout or new
    ("tokenizer/tokenizer_config.json",),
    ("tokenizer/vocab.json", "tokenizer/tokenizer.json"),
    ("tokenizer/merges.txt", "tokenizer/tokenizer.json"),
    ("tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json"),
)


class StableDiffusion(Network):
    """A text-to-image network at one of its sizes.

    sizes:        by name the `checkpoint`, and for random weights the configs of `unet`, `text_encoder`, `vae` and
                  `scheduler` as diffusers writes them. `full` is the public one; `tiny` has the same layers, small.
    prompts:      the file of the prompts that conditions number, as `read_prompts` takes it.
    decode_batch: images decoded at a time.
    checkpoint:   a pipeline folder or a hub id, whose own configs count; `random`: reproducible random weights, to try
                  all but the pictures; null: that of the size.
    source:       where the public checkpoint is had, for the message when it is missing.
    """

    def __init__(
        self,
        name: str,
        size: str,
        sizes: Mapping[str, Mapping[str, Any]],
        guidance: Guidance,
        prompts: str,
        micro_batch: int,
        decode_batch: int,
        dtype: str,
        checkpoint: str | None,
        source: str,
    ):
        if size not in sizes:
            raise ValueError(f"model.size must be one of {', '.join(sizes)}, got {size!r}")
        self.prompts, self.source = read_prompts(prompts), source
        checkpoint = checkpoint or sizes[size]["checkpoint"]
        if checkpoint == "random":
            configs = sizes[size]
            encoder = random_clip(configs["text_encoder"])
        else:
            folder, configs = open_pipeline(checkpoint, source)
            encoder = pipeline_clip(folder)
        parameterization, unet = trained_as(configs["scheduler"]), square_unet(configs["unet"])
        self.encoder_sha256 = encoder.fingerprint
        table = PromptCache().encode(encoder, [*self.prompts, ""])["text"]
        if table.shape[-1] != unet.config.cross_attention_dim:
            raise ValueError(
                f"the text encoder of {checkpoint} gives {table.shape[-1]} features, its U-Net takes "
                f"{unet.config.cross_attention_dim}; choose a model.checkpoint whose parts belong together"
            )
        super().__init__(
            name=name if size == "full" else f"{name}_{size}",
            backbone=PromptedUNet(unet, table),
            parameterization=parameterization,
            event_shape=(unet.config.in_channels, unet.config.sample_size, unet.config.sample_size),
            num_classes=None,
            decoder=VAE(checkpoint=checkpoint, micro_batch=decode_batch, source=source, **SCALE | configs["vae"]),
            guidance=guidance,
            micro_batch=micro_batch,
            dtype=dtype,
            checkpoint=checkpoint,
        )

    def velocity(self, condition: Tensor | None, guidance: Guidance | None = None) -> BoundVelocity:
        """condition: numbers of prompts (B,)."""
        if condition is None or condition.is_floating_point() or condition.ndim != 1:
            raise ValueError(f"{self.name} makes pictures of prompts; set data=prompts data.prompts=FILE")
        if not bool(((condition >= 0) & (condition < len(self.prompts))).all()):
            raise ValueError(
                f"{self.name} has {len(self.prompts)} prompts and is asked for number {int(condition.max())}; give "
                "model.prompts and data.prompts the same file"
            )
        return (guidance or self.guidance).bind(self._velocity, condition, self.micro_batch)

    def _load(self, checkpoint: str) -> str:
        """Fill the U-Net; the hash is of it and the text encoder, for both make the velocity."""
        unet = self.backbone.network
        if checkpoint == "random":
            randomise(unet, torch.Generator().manual_seed(0))
        else:
            path = locate(checkpoint, UNET, self.source)
            self._fill({f"network.{key}": tensor for key, tensor in read(path).items()}, path)
        return sha256(f"{digest(unet.state_dict())} {self.encoder_sha256}".encode())


class PromptedUNet(nn.Module):
    """diffusers.UNet2DConditionModel(x (M, *E), clock (M,), prompts (M,), -1 for none) -> (M, *E).

    table: encodings (P + 1, L, D) of all prompts, at last, where -1 finds it, that of the empty one.
    """

    def __init__(self, network: nn.Module, table: Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor, clock: Tensor, prompts: Tensor) -> Tensor:
        return self.network(x, clock, encoder_hidden_states=self.table[prompts]).sample


class CLIP:
    """CLIP's text transformer (Radford et al. 2021, arXiv 2103.00020): prompts (P) -> text (P, L, D).

    As in diffusers' pipelines, prompts are filled up or cut to the L = 77 tokens that it knows.
    weights: SHA-256 of its weights. load: makes it, once there is a prompt to encode.
    """

    def __init__(self, tokenizer: Callable[..., Any], weights: str, load: Callable[[], nn.Module]):
        self.tokenizer, self.load = tokenizer, load
        vocabulary = sorted(tokenizer.get_vocab().items())
        self.fingerprint = sha256(json.dumps([weights, vocabulary, self._tokens([""]).tolist()]).encode())

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"text": self._model(self._tokens(prompts)).last_hidden_state}

    @cached_property
    def _model(self) -> nn.Module:
        return self.load().eval()

    def _tokens(self, prompts: Sequence[str]) -> Tensor:
        length = self.tokenizer.model_max_length
        padded = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(list(prompts), **padded).input_ids


# --------------------------------------------------------------------------------------------------------------
# Where the parts come from
# --------------------------------------------------------------------------------------------------------------


def open_pipeline(checkpoint: str, source: str) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A pipeline folder, or that of a hub id with all files that are needed -> the folder, the configs of its parts.

    ValueError for a pipeline of other parts.
    """
    index = locate(checkpoint, ("model_index.json",), source)
    if index.name != "model_index.json":
        raise ValueError(
            f"model.checkpoint={checkpoint} is a file and should be a pipeline folder; make one with "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER) of diffusers"
        )
    kinds = {part: kind[-1] for part, kind in read_object(index).items() if isinstance(kind, list) and kind}
    for part in sorted({*PARTS, *kinds} - {*OTHERS}):
        expected = PARTS.get(part, (None,))
        if kinds.get(part) not in expected:
            raise ValueError(
                f"{index} is of another kind of model: its {part} is {kinds.get(part)}, that of Stable Diffusion is "
                f"{' or '.join(map(str, expected))}; choose another model.checkpoint"
            )
    for files in (UNET, TEXT_ENCODER, *TOKENIZER):
        locate(checkpoint, files, source)
    configs = {part: read_object(locate(checkpoint, (file,), source)) for part, file in CONFIGS.items()}
    return index.parent, configs


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of diffusers, without its notes about itself."""
    record = read_json(file, "config")
    if not isinstance(record, dict):
        raise ValueError(f"config {file} is no JSON object; get it again")
    return {key: value for key, value in record.items() if not key.startswith("_")}


def pipeline_clip(folder: Path) -> CLIP:
    """The text encoder of a pipeline folder. Its hash does not depend on how transformers calls the weights."""
    from transformers import CLIPTextModel, CLIPTokenizer

    def load() -> nn.Module:
        model, report = CLIPTextModel.from_pretrained(path.parent, use_safetensors=True, output_loading_info=True)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{path} lacks {len(missing)} weights of CLIPTextModel, first {missing[0]}; get it again")
        return model.float()

    path = folder / TEXT_ENCODER[0]
    weights = {key.removeprefix("text_model."): tensor for key, tensor in read(path).items()}
    weights.pop("embeddings.position_ids", None)
    return CLIP(CLIPTokenizer.from_pretrained(folder / "tokenizer"), digest(weights), load)


def random_clip(config: Mapping[str, Any]) -> CLIP:
    """A text encoder with reproducible random weights and a token for every byte, within and at the end of a word."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=config["max_position_embeddings"])
    model = CLIPTextModel(CLIPTextConfig(**config, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1))
    randomise(model, torch.Generator().manual_seed(0))
    return CLIP(tokenizer, digest(model.state_dict()), lambda: model)


def square_unet(config: Mapping[str, Any]) -> nn.Module:
    """The U-Net of a config, not yet filled; ValueError for one of inpainting or of no one size."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(config)
    channels, answers, size = unet.config.in_channels, unet.config.out_channels, unet.config.sample_size
    if channels != answers or not isinstance(size, int):
        raise ValueError(
            f"the U-Net takes {channels} channels, gives {answers}, and has sample_size={size}; choose a "
            "model.checkpoint of text to square images, not of inpainting or upscaling"
        )
    return unet


# --------------------------------------------------------------------------------------------------------------
# How it was trained
# --------------------------------------------------------------------------------------------------------------


def trained_as(scheduler: Mapping[str, Any]) -> Parameterization:
    """What the config of a pipeline's scheduler says of its network; ValueError for what is not known here."""
    rules = {"linear": linear_betas, "scaled_linear": scaled_linear_betas}
    answers = {"epsilon": Noise, "v_prediction": VPVelocity}
    rule, answer = scheduler.get("beta_schedule"), scheduler.get("prediction_type", "epsilon")
    if rule not in rules or answer not in answers or scheduler.get("trained_betas") is not None:
        raise ValueError(
            f"the pipeline's scheduler has beta_schedule={rule}, prediction_type={answer}, trained_betas="
            f"{scheduler.get('trained_betas')}; known are {', '.join(rules)}; {', '.join(answers)}; and null"
        )
    if scheduler.get("rescale_betas_zero_snr"):
        raise ValueError("the pipeline's scheduler has rescale_betas_zero_snr=true; choose a model.checkpoint without")
    num_steps = scheduler["num_train_timesteps"]
    path = DDPMPath(rules[rule](num_steps, scheduler["beta_start"], scheduler["beta_end"]))
    return answers[answer](path, float(path.canonical(torch.tensor(num_steps - 1.0, dtype=torch.float64))))
