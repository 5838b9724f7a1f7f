"""Train the autoencoder of the scenes: pixels (3, 64, 64) to latents (4, 16, 16) and back.

    python -m experiments.scenes_pipeline.autoencoder wide --output WIDE
    python -m experiments.scenes_pipeline.autoencoder narrow --wide WIDE --output FOLDER
    python -m experiments.scenes_pipeline.autoencoder decoder --vae FOLDER --output FOLDER

The first has 8 channels. The second keeps the 4 combinations of them that vary most, because a
small transformer learns fewer numbers sooner, and trains the decoder on. So does the third, while
the latents stay as they are, and with them a transformer that has learned them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.utils import save_image

from experiments.common import command_line
from experiments.scenes_pipeline.data import scenes

BATCH = 32
LEARNING_RATE = 2e-3
DIVERGENCE = 1e-5  # weight of the divergence from a standard normal, per latent number
KEPT = 4  # channels
NOISE = 0.1  # added to latents when the decoder trains on; they have the size 1
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


# ----------------------------------------------------------------------------------------------
# Stages
# ----------------------------------------------------------------------------------------------


def wide(steps: int, folder: Path) -> None:
    """Train encoder and decoder."""
    torch.manual_seed(0)
    network = AutoencoderKL(**CONFIG)
    train(network, network.parameters(), steps, folder)


def narrow(steps: int, folder: Path, wide: Path) -> None:
    """Keep the principal channels, and train the decoder on."""
    train_decoder(principal(AutoencoderKL.from_pretrained(wide)), steps, folder)


def decoder(steps: int, folder: Path, vae: Path) -> None:
    """Train the decoder on."""
    train_decoder(AutoencoderKL.from_pretrained(vae), steps, folder)


def train_decoder(network: AutoencoderKL, steps: int, folder: Path) -> None:
    """Train the decoder; the encoder stays."""
    torch.manual_seed(0)
    network.encoder.requires_grad_(False)
    train(network, network.decoder.parameters(), steps, folder)


@torch.no_grad()
def principal(wide: AutoencoderKL) -> AutoencoderKL:
    """Return an autoencoder whose latents are `wide`'s first principal components."""
    # Components, over all places of some scenes.
    pixels = torch.stack([scene for scene, _ in scenes(range(512))])
    latents = torch.cat([wide.encode(rows).latent_dist.mean for rows in pixels.split(64)])
    flat = latents.movedim(1, -1).flatten(0, 2).double()
    mean = flat.mean(0).float()
    basis = torch.linalg.eigh(torch.cov(flat.mT)).eigenvectors.flip(1)[:, :KEPT].float()
    basis *= basis.sum(0).sign()

    # The encoder's last layer and the decoder's first take the change of basis.
    weights = wide.state_dict()
    channels = len(mean)
    kernel, bias = weights["encoder.conv_out.weight"], weights["encoder.conv_out.bias"]
    means = torch.einsum("ck,cxij->kxij", basis, kernel[:channels])
    weights["encoder.conv_out.weight"] = torch.cat([means, torch.zeros_like(means)])
    variance = bias[channels:].mean().expand(KEPT)
    weights["encoder.conv_out.bias"] = torch.cat([(bias[:channels] - mean) @ basis, variance])
    kernel, bias = weights["decoder.conv_in.weight"], weights["decoder.conv_in.bias"]
    weights["decoder.conv_in.weight"] = torch.einsum("ocij,ck->okij", kernel, basis)
    weights["decoder.conv_in.bias"] = bias + torch.einsum("ocij,c->o", kernel, mean)

    network = AutoencoderKL(**{**CONFIG, "latent_channels": KEPT})
    network.load_state_dict(weights)
    size = float(((flat.float() - mean) @ basis).std())
    network.register_to_config(scaling_factor=round(1 / size, 4), shift_factor=0.0)
    return network


# ----------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------


def train(
    network: AutoencoderKL, weights: Iterable[nn.Parameter], steps: int, folder: Path
) -> None:
    """Train weights by squared and absolute error; save the network with averaged weights.

    A network that is not scaled yet also has a slight divergence of its latents in the loss, and
    gets the scale of its latents. In one that is, noise is added to them.
    """
    is_scaled = network.config.shift_factor is not None
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    images = iter(DataLoader(scenes(range(steps * BATCH)), BATCH))

    # Steps.
    start = time.perf_counter()
    for step in range(steps):
        pixels = next(images)[0]
        with torch.autocast("cpu", torch.bfloat16):
            posterior = network.encode(pixels).latent_dist
            latents = posterior.sample()
            if is_scaled:
                latents += NOISE / network.config.scaling_factor * torch.randn_like(latents)
            restored = network.decode(latents).sample.float()
        error = F.mse_loss(restored, pixels)
        loss = error + F.l1_loss(restored, pixels)
        if not is_scaled:
            loss += DIVERGENCE * posterior.kl().mean() / posterior.mean[0].numel()

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)

        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - start
            print(step + 1, f"{error.detach():.5f} {seconds:.0f} s", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save(average.module, is_scaled, folder)


@torch.no_grad()
def save(network: AutoencoderKL, is_scaled: bool, folder: Path) -> None:
    """Write the weights, and a picture of scenes above their restorations."""
    # The latents' scale.
    pixels = torch.stack([scene for scene, _ in scenes(range(10**7, 10**7 + 64))])
    latents = network.encode(pixels).latent_dist.mean
    if not is_scaled:
        network.register_to_config(
            scaling_factor=round(1 / float(latents.std()), 4),
            shift_factor=round(float(latents.mean()), 4),
        )
    network.save_pretrained(folder)

    # How well scenes are restored.
    restored = network.decode(latents).sample.clamp(-1, 1)
    print(
        f"PSNR {psnr(restored, pixels):.2f} dB, scale {network.config.scaling_factor}", flush=True
    )
    save_image((torch.cat([pixels[:8], restored[:8]]) + 1) / 2, folder / "restored.png", nrow=8)


def psnr(restored: Tensor, pixels: Tensor) -> float:
    """Return the mean peak signal-to-noise ratio of pictures in [-1, 1], in dB."""
    errors = (restored - pixels).square().mean((1, 2, 3)) / 4
    return float((-10 * errors.log10()).mean())


if __name__ == "__main__":
    parser = command_line(__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    first = stages.add_parser("wide")
    first.add_argument("--steps", type=int, default=3000)
    second = stages.add_parser("narrow")
    second.add_argument("--steps", type=int, default=700)
    second.add_argument("--wide", type=Path, required=True)
    third = stages.add_parser("decoder")
    third.add_argument("--steps", type=int, default=4000)
    third.add_argument("--vae", type=Path, required=True)
    for stage in (first, second, third):
        stage.add_argument("--output", type=Path, required=True, dest="folder")
    options = vars(parser.parse_args())
    {"wide": wide, "narrow": narrow, "decoder": decoder}[options.pop("stage")](**options)
