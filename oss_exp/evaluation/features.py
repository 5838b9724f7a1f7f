"""Networks that turn images into features, for distances and metrics: (M, C, H, W) in [0, 1] -> (M, F)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn


class InceptionV3(nn.Module):
    """The 2048 pool features of the FID literature's Inception-V3, through torch-fidelity. Grey images become RGB.

    weights: torch-fidelity's `pt_inception-2015-12-05-6726825d.pth`, from a local file.
    """

    def __init__(self, weights: str):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"Inception weights {weights} do not exist; get pt_inception-2015-12-05-6726825d.pth from "
                "torch-fidelity's releases and set its path"
            )
        self.network = FeatureExtractorInceptionV3("inception", ["2048"], str(weights))

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return self.network((images * 255).round().byte())[0]


class RandomFeatures(nn.Module):
    """A fixed random convolutional network: features without any weights to download; texture rather than meaning."""

    def __init__(self, channels: int, width: int, seed: int):
        super().__init__()
        sizes = [channels, width, 2 * width, 4 * width]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(sizes))
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x, features = images.float() * 2 - 1, []
        for layer in self.layers:
            x = layer(x).relu()
            features.append(x.mean(dim=(2, 3)))
            features.append(x.amax(dim=(2, 3)))
        return torch.cat(features, dim=1)
