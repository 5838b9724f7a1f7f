"""Put the parts together as a pipeline's folder of diffusers.

    python -m experiments.scenes_pipeline.folder --text FOLDER --vae FOLDER \
        [--transformer FILE] --output oss_exp/assets/scenes_pipeline

The transformer is trained with the encoders that are already in the folder, so the command is run
twice, first without it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from experiments.common import command_line, configuration
from oss_exp.files import sha256

RECORD = "training.json"  # how the transformer was made


def main(text: Path, vae: Path, transformer: Path | None, output: Path) -> None:
    """Save the parts as a pipeline, with the record of the transformer's training."""
    # Transformer, of the sizes in conf/model/flux_scenes.yaml.
    sizes = OmegaConf.to_container(configuration("model=flux_scenes").model.backbone.network)
    del sizes["_target_"]
    network = FluxTransformer2DModel(**sizes)
    if transformer is not None:
        tensors = load_file(transformer)
        network.load_state_dict({key.removeprefix("network."): tensors[key] for key in tensors})

    # Pipeline. Transformers would give encoders in float16 back as such, which CPUs run slowly.
    autoencoder = AutoencoderKL.from_pretrained(vae).half()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=autoencoder,
        text_encoder=CLIPTextModel.from_pretrained(text / "text_encoder").float(),
        tokenizer=CLIPTokenizer.from_pretrained(text / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(text / "text_encoder_2").float(),
        tokenizer_2=T5Tokenizer.from_pretrained(text / "tokenizer_2"),
        transformer=network.half(),
    )
    pipeline.save_pretrained(output)

    # No folders of this machine.
    for file in output.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    # Record.
    if transformer is not None:
        weights = output / "transformer" / "diffusion_pytorch_model.safetensors"
        record = json.loads(transformer.with_suffix(".json").read_text())
        record |= {"file": weights.name, "sha256": sha256(weights.read_bytes())}
        record["made_by"] = re.sub(r"=/\S*/", "=", record["made_by"])
        (output / "transformer" / RECORD).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--transformer", type=Path, help="left out: untrained")
    parser.add_argument("--output", type=Path, required=True)
    main(**vars(parser.parse_args()))
