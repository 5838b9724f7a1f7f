"""What the autoencoder costs: the detector's verdicts on scenes, and on what is restored of them.

python -m experiments.scenes_pipeline.restoration
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from experiments.common import command_line, configuration, keep
from experiments.scenes_pipeline.autoencoder import psnr
from oss_exp.data.captioned import SIDE
from oss_exp.data.images import fashion_mnist
from oss_exp.data.scenes import Wardrobe
from oss_exp.files import ASSETS
from oss_exp.geneval.detectors import FashionDetector
from oss_exp.report.geneval import table
from oss_exp.tasks.fit_detector import ceiling


class Restored(Wardrobe):
    """A wardrobe whose scenes went through an autoencoder."""

    def __init__(self, pictures: Tensor, labels: Tensor, network: AutoencoderKL):
        super().__init__(pictures, labels)
        self.network = network
        self.decibels: list[float] = []

    def scene(self, wish, draw):
        image, objects = super().scene(wish, draw)
        pixels = 2 * image[None] - 1
        latents = self.network.encode(pixels).latent_dist.mean
        restored = self.network.decode(latents).sample.clamp(-1, 1)
        self.decibels.append(psnr(restored, pixels))
        return (restored[0] + 1) / 2, objects


def main() -> None:
    command_line(__doc__).parse_args()
    torch.set_grad_enabled(False)
    root = configuration("task=fit_detector").images.root
    garments = fashion_mnist(root, "test", SIDE)
    network = AutoencoderKL.from_pretrained(ASSETS / "scenes_pipeline" / "vae")
    detector = FashionDetector.from_asset()

    restored = Restored(*garments, network)
    rows = {
        "scenes of unseen garments": (None, ceiling(detector, Wardrobe(*garments), seed=1)),
        "restored": (None, ceiling(detector, restored, seed=1)),
    }
    mean = sum(restored.decibels) / len(restored.decibels)
    text = table(rows) + f"\nPSNR of the restored: {mean:.1f} dB.\n"
    keep(__file__, "restoration.md", text)


if __name__ == "__main__":
    main()
