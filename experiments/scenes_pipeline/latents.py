"""Encode scenes with the trained autoencoder, for `images=captioned_latents`.

python -m experiments.scenes_pipeline.latents --vae FOLDER --count 300000 --output FILE
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from experiments.common import command_line
from experiments.scenes_pipeline.data import scenes

BATCH = 250


@lru_cache
def autoencoder(folder: Path) -> AutoencoderKL:
    """Return the autoencoder, in the fastest form on a CPU; its latents are exact to 0.5 %."""
    torch.set_num_threads(1)
    network = AutoencoderKL.from_pretrained(folder).eval().bfloat16()
    return network.to(memory_format=torch.channels_last)


@torch.no_grad()
def encoded(first: int, vae: Path) -> tuple[Tensor, Tensor]:
    """Return the latents (BATCH, C, h, w) as a network takes them, and the captions' numbers."""
    network = autoencoder(vae)
    items = scenes(range(first, first + BATCH))
    pixels = torch.stack([pixels for pixels, _ in items]).bfloat16()
    means = network.encode(pixels.to(memory_format=torch.channels_last)).latent_dist.mean.float()
    latents = (means - network.config.shift_factor) * network.config.scaling_factor
    return latents.half().contiguous(), torch.tensor([caption for _, caption in items])


def main(vae: Path, count: int, processes: int, output: Path) -> None:
    """Write `latents` (count, C, h, w) float16, `labels` and all captions."""
    firsts = range(0, count, BATCH)
    with ProcessPoolExecutor(processes) as pool:
        parts = list(tqdm(pool.map(partial(encoded, vae=vae), firsts), total=len(firsts)))
    latents, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    captions = scenes([]).dataset.captions
    save_file({"latents": latents, "labels": labels}, output, {"captions": json.dumps(captions)})


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    main(**vars(parser.parse_args()))
