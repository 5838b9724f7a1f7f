"""Compare trained velocities with exact ones, on samples of a mixture.

python -m experiments.pretrain_mixture.run [--steps 1500]

Trains a small transformer (flow matching) and a small U-Net (EDM) with task=pretrain on 50,000
samples of the digits mixture, and compares their velocities with the exact ones on fresh noisy
samples, a number for each t.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from hydra.utils import instantiate
from torch import Tensor

from experiments.common import OUTPUTS, command_line, configuration, keep, png, run_program, table
from oss_exp.models.families.mixture import GaussianMixture
from oss_exp.models.guidance import Guidance
from oss_exp.tensors import rowwise

TIMES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
NETWORKS = {
    "dit_fashion": [
        "model.backbone.size=8",
        "model.backbone.patch=2",
        "model.backbone.num_layers=4",
        "task.times.mean=0",
    ],
    "unet_fashion": [
        "model.backbone.size=8",
        "model.backbone.patch=1",
        "model.backbone.block_out_channels=[32,64]",
        "model.backbone.down_block_types=[DownBlock2D,AttnDownBlock2D]",
        "model.backbone.up_block_types=[AttnUpBlock2D,UpBlock2D]",
        "model.parameterization.sigma_data=0.7",
    ],
}


COUNT = 4096  # noisy samples of every t


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()

    # Fresh samples: the training set has seed 0.
    exact = GaussianMixture.from_asset(
        "mixture_digits.safetensors", guidance=Guidance(), micro_batch=4096
    )
    x0, labels = exact.draw(COUNT, seed=10**6)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))

    # Errors of both networks.
    errors = {}
    for name, settings in NETWORKS.items():
        model = trained(name, [*settings, "model.event_shape=[1,8,8]"], options.steps)
        for question, condition in (("given the class", labels), ("of all classes", None)):
            row = [relative_error(model, exact, x0, noise, t, condition) for t in TIMES]
            errors[f"{name}, {question}"] = row

    # Table and picture.
    header = ["relative error of v at t =", *(f"{t:g}" for t in TIMES)]
    rows = []
    for name, row in errors.items():
        rows.append([name, *(f"{error:.3f}" for error in row)])
    keep(__file__, "errors.md", table(header, rows))
    keep(__file__, "errors.png", picture(errors))


@torch.no_grad()
def relative_error(
    model, exact: GaussianMixture, x0: Tensor, noise: Tensor, t: float, condition: Tensor | None
) -> float:
    """Return the root mean square of a velocity's error, relative to the exact velocity's."""
    time = torch.full((len(x0),), t, dtype=torch.float64)
    x = rowwise(1 - time, x0) * x0 + rowwise(time, x0) * noise
    v = model.velocity(condition)(x, time)
    truth = exact.velocity(condition)(x, time)
    return float(((v - truth).square().mean() / truth.square().mean()).sqrt())


def picture(errors: dict[str, list[float]]) -> bytes:
    """Draw the errors against t."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, row in errors.items():
        axis.plot(TIMES, row, marker="o", label=name, ls="--" if "all" in name else "-")
    axis.set(xlabel="t  (1 noise, 0 data)", ylabel="rms error of v / rms of v", yscale="log")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3, which="both")
    return png(figure)


def trained(name: str, settings: list[str], steps: int):
    """Return the network of `oss-exp task=pretrain`, trained unless it is there already."""
    folder = OUTPUTS / "pretrain_mixture" / f"{name}_{steps}"
    weights = folder / f"{name}.safetensors"
    if not weights.exists():
        overrides = ["task=pretrain", f"model={name}", "images=mixture_samples", *settings]
        overrides += [f"task.max_steps={steps}", "task.batch_size=128"]
        run_program(*overrides, "trainer.precision=32-true", f"hydra.run.dir={folder}")
    sizes = [setting for setting in settings if setting.startswith("model.")]
    return instantiate(configuration(f"model={name}", *sizes, f"model.checkpoint={weights}").model)


if __name__ == "__main__":
    main()
