"""Encode scenes, or videos of moving garments, with the trained autoencoder.

python -m experiments.scenes_pipeline.latents scenes --vae FOLDER --output FILE
python -m experiments.scenes_pipeline.latents videos --vae FOLDER --output FILE
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from oss_exp.data.captioned import MovingFashion
from oss_exp.data.scenes import FashionScenes

BATCH = 100
KINDS = {"scenes": FashionScenes, "videos": MovingFashion}
DATA = os.environ.get("OSS_EXP_DATA", "data")


@torch.no_grad()
def main(kind: str, vae: Path, count: int, output: Path) -> None:
    """Write `latents` (count, C, [F,] h, w) float16 as a network takes them, and `labels`."""
    network = AutoencoderKL.from_pretrained(vae).eval()
    images = KINDS[kind](DATA)
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randperm(len(images), generator=draw)[:count].tolist()

    latents = []
    labels = []
    for pixels, captions in tqdm(DataLoader(Subset(images, numbers), BATCH)):
        latents.append(encoded(network, pixels).half())
        labels.append(captions)

    tensors = {"latents": torch.cat(latents), "labels": torch.cat(labels)}
    save_file(tensors, output, {"captions": json.dumps(images.captions)})


def encoded(network: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Encode pictures (B, C, H, W), or each frame of videos (B, C, F, H, W); grey ones as RGB."""
    # Frames as a batch.
    frames = pixels.movedim(1, -3).reshape(-1, *pixels.shape[1:2], *pixels.shape[-2:])
    means = network.encode(frames.expand(-1, 3, -1, -1)).latent_dist.mean
    latents = means.reshape(len(pixels), *pixels.shape[2:-2], *means.shape[1:])
    scaled = (latents - network.config.shift_factor) * network.config.scaling_factor
    return scaled.movedim(-3, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--output", type=Path, required=True)
    main(**vars(parser.parse_args()))
