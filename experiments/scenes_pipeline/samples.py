"""Draw pictures of all six kinds of prompts with the shipped pipeline.

python -m experiments.scenes_pipeline.samples
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from diffusers import DiffusionPipeline

from experiments.common import command_line, keep, png
from oss_exp.files import ASSETS

PROMPTS = [
    "a dress",
    "a sandal and a pullover",
    "three trousers",
    "an orange bag",
    "a boot left of a coat",
    "a green shirt and a white sneaker",
]
EACH = 5


def main() -> None:
    """Draw EACH pictures of every prompt, in 100 steps with guidance 8."""
    command_line(__doc__).parse_args()
    pipe = DiffusionPipeline.from_pretrained(ASSETS / "scenes_pipeline")
    prompts = [prompt for prompt in PROMPTS for _ in range(EACH)]
    images = pipe(
        prompts,
        negative_prompt=[""] * len(prompts),
        true_cfg_scale=8.0,
        num_inference_steps=100,
        generator=torch.Generator().manual_seed(0),
        height=64,
        width=64,
        max_sequence_length=12,
        output_type="np",
    ).images

    figure, axes = plt.subplots(len(PROMPTS), EACH, figsize=(5, 6.6), layout="constrained")
    for axis, image in zip(axes.flat, images, strict=True):
        axis.imshow(image)
        axis.axis("off")
    for row, prompt in zip(axes, PROMPTS, strict=True):
        row[EACH // 2].set_title(prompt, fontsize=8)
    keep(__file__, "samples.png", png(figure))


if __name__ == "__main__":
    main()
