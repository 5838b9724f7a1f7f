"""Train the autoencoder of the scenes: pixels (3, 64, 64) to latents (8, 16, 16) and back.

python -m experiments.scenes_pipeline.autoencoder --steps 3000 --output FOLDER
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.utils import save_image

from experiments.scenes_pipeline.data import scenes

BATCH = 32
LEARNING_RATE = 2e-3
DIVERGENCE = 1e-5  # weight of the divergence from a standard normal, per latent number
CONFIG = {
    "latent_channels": 8,
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def train(steps: int, folder: Path) -> AutoencoderKL:
    """Train by squared and absolute error and a slight divergence; save the averaged weights."""
    # Network and optimizer.
    torch.manual_seed(0)
    network = AutoencoderKL(**CONFIG)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    images = iter(DataLoader(scenes(range(steps * BATCH)), BATCH, num_workers=1))

    # Steps.
    start = time.perf_counter()
    for step in range(steps):
        pixels = next(images)[0]
        with torch.autocast("cpu", torch.bfloat16):
            loss, error = _loss(network, pixels)

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        average.update_parameters(network)

        if (step + 1) % 100 == 0:
            print(step + 1, float(error), f"{time.perf_counter() - start:.0f} s", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            _save(average.module, folder)
    return average.module


def _loss(network: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    posterior = network.encode(pixels).latent_dist
    restored = network.decode(posterior.sample()).sample
    error = F.mse_loss(restored.float(), pixels)
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    return error + F.l1_loss(restored.float(), pixels) + DIVERGENCE * divergence, error.detach()


@torch.no_grad()
def _save(network: AutoencoderKL, folder: Path) -> None:
    """Write weights with the latents' scale, and a picture of scenes above their restorations."""
    # The latents' scale.
    pixels = torch.stack([scene for scene, _ in scenes(range(10**7, 10**7 + 64))])
    latents = network.encode(pixels).latent_dist.mean
    network.register_to_config(
        scaling_factor=round(1 / float(latents.std()), 4),
        shift_factor=round(float(latents.mean()), 4),
    )
    network.save_pretrained(folder)

    # How well scenes are restored.
    restored = network.decode(latents).sample.clamp(-1, 1)
    errors = (restored - pixels).square().mean((1, 2, 3)) / 4
    psnr = float((-10 * errors.log10()).mean())
    print(f"PSNR {psnr:.2f} dB, scale {network.config.scaling_factor}", flush=True)
    save_image((torch.cat([pixels[:8], restored[:8]]) + 1) / 2, folder / "restored.png", nrow=8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    train(options.steps, options.output)
