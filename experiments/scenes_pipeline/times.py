"""At which times the prompt helps the network: its loss with the prompt and without.

python -m experiments.scenes_pipeline.times
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hydra.utils import instantiate

from experiments.common import command_line, configuration, keep, table
from experiments.scenes_pipeline.data import scenes
from experiments.scenes_pipeline.latents import BATCH, encoded
from oss_exp.files import ASSETS
from oss_exp.models.guidance import NO_CLASS

TIMES = (0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2)
FIRST = 300_000  # scenes that the network was not trained on


@torch.no_grad()
def main() -> None:
    """Write a table of the mean squared error of v, on BATCH scenes."""
    command_line(__doc__).parse_args()
    captions = scenes([]).dataset.captions
    model = instantiate(configuration("model=flux_scenes").model, prompts=captions)
    latents, labels = encoded(FIRST, ASSETS / "scenes_pipeline" / "vae")
    x0 = latents.float()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))

    rows = []
    for t in TIMES:
        x = (1 - t) * x0 + t * noise
        losses = []
        for prompts in (labels, torch.full_like(labels, NO_CLASS)):
            v = model.backbone(x, torch.full((BATCH,), t), prompts)
            losses.append(float(F.mse_loss(v, noise - x0)))
        with_prompt, without = losses
        rows.append([f"{t}", *(f"{x:.3f}" for x in (*losses, without - with_prompt))])
    keep(__file__, "times.md", table(["t", "with the prompt", "without", "difference"], rows))


if __name__ == "__main__":
    main()
