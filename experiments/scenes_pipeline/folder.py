"""Put the parts together as a folder of diffusers, in half precision.

    python -m experiments.scenes_pipeline.folder --text FOLDER --vae FOLDER --transformer FILE \
        --output oss_exp/assets/scenes_pipeline
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
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

import oss_exp

CONF = Path(oss_exp.__file__).parents[1] / "conf"


def network_config() -> dict:
    """Return the transformer's sizes, which conf/model/flux_scenes.yaml has."""
    with initialize_config_dir(str(CONF.resolve()), version_base=None):
        network = dict(compose("config", ["model=flux_scenes"]).model.backbone.network)
    del network["_target_"]
    return network


def main(text: Path, vae: Path, transformer: Path, output: Path) -> None:
    network = FluxTransformer2DModel(**network_config())
    tensors = load_file(transformer)
    network.load_state_dict({key.removeprefix("network."): each for key, each in tensors.items()})
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
    for name in ("text", "vae", "transformer", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    main(**vars(parser.parse_args()))
