"""Put the parts together as a folder of diffusers, in half precision.

    python -m experiments.scenes_pipeline.folder --text FOLDER --vae FOLDER --transformer FILE \
        --output oss_exp/assets/scenes_pipeline

The transformer is trained with the encoders and the autoencoder already in the folder, so the
command is run twice, first without it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

import oss_exp

CONF = Path(oss_exp.__file__).parents[1] / "conf"


def network_config() -> dict:
    """Return the transformer's sizes, which conf/model/flux_scenes.yaml has."""
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        network = compose("config", ["model=flux_scenes"]).model.backbone.network
    sizes = OmegaConf.to_container(network)
    del sizes["_target_"]
    return sizes


def main(text: Path, vae: Path, transformer: Path | None, output: Path) -> None:
    """Load the parts, and save them as a pipeline."""
    # Transformer.
    network = FluxTransformer2DModel(**network_config())
    if transformer is not None:
        tensors = load_file(transformer)
        network.load_state_dict({key.removeprefix("network."): tensors[key] for key in tensors})

    # Pipeline.
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL.from_pretrained(vae),
        text_encoder=CLIPTextModel.from_pretrained(text / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(text / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(text / "text_encoder_2"),
        tokenizer_2=T5Tokenizer.from_pretrained(text / "tokenizer_2"),
        transformer=network,
    )
    pipeline.to(torch.float16).save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--transformer", type=Path, help="left out: untrained")
    parser.add_argument("--output", type=Path, required=True)
    main(**vars(parser.parse_args()))
