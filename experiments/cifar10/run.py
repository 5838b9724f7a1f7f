"""unet_cifar10, a network of photographs: its samples and FID, and tables 2 and 6 with FID.

python -m experiments.cifar10.run statistics   # Inception's, of the 50,000 training images
python -m experiments.cifar10.run quality      # a grid, and FID of the teacher by guidance
python -m experiments.cifar10.run tables       # strategies of tables 2 and 6, and fitted steps

All need `--inception FILE`, the weights, and `statistics` also `--cifar10 FOLDER`, the images.
Finished runs are kept in outputs/experiments.
"""

from __future__ import annotations

import json

import torch

from experiments.common import OUTPUTS, command_line, finished, keep, measure, table
from experiments.small_networks.run import FINE, grid

NAME = "unet_cifar10"
STATISTICS = (OUTPUTS / "cifar10/statistics/cifar10_train.npz").absolute()
# Guidance, and number of images.
QUALITY = ((1.0, 1_000), (1.5, 1_000), (2.0, 1_000), (3.0, 1_000), (2.0, 10_000))
STRATEGIES = "edm,ddim,fm,dm,gits,oss_ave,oss_fit"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("part", choices=("statistics", "quality", "tables"))
    parser.add_argument("--inception", required=True, help="a file of Inception-V3's weights")
    parser.add_argument("--cifar10", help="the folder of CIFAR-10")
    options = parser.parse_args()
    if options.part == "statistics" and options.cifar10 is None:
        parser.error("statistics needs --cifar10 FOLDER")
    torch.set_grad_enabled(False)

    extractor = ["evaluation=inception", f"evaluation.extractor.weights={options.inception}"]
    if options.part == "statistics":
        statistics(options.cifar10, extractor)
    else:
        fid = [*extractor, f"evaluation.reference.path={STATISTICS}", "metric=[fid]"]
        {"quality": quality, "tables": tables}[options.part](fid)


def statistics(images: str, extractor: list[str]) -> None:
    """Write mean and covariance of Inception's features of the training images."""
    settings = ["task=statistics", "images=cifar10", f"images.root={images}", *extractor]
    finished("cifar10/statistics", *settings, f"task.output={STATISTICS}", file=STATISTICS.name)


def quality(fid: list[str]) -> None:
    """Write a grid of samples, and FID of the teacher and of ten fitted steps by guidance.

    The grid is by 200 Euler steps. The images of FID are by 25 steps of DPM-Solver++; a column
    says how near the two are.
    """
    picture, agreement = grid(NAME)
    keep(__file__, "quality.png", picture)

    rows = []
    for scale, count in QUALITY:
        folder = finished(
            f"cifar10/teacher_{scale}_{count}",
            f"model={NAME}",
            f"model.guidance.scale={scale}",
            *FINE,
            *fid,
            "stepsize=oss_fit",
            "num_steps=[10]",
            "data.search_samples=32",
            f"data.eval_samples={count}",
            "data.batch_size=250",
        )
        metrics = json.loads((folder / "metrics.json").read_text())
        (fitted,) = metrics["rows"]
        cells = [metrics["teacher_metrics"]["fid"], fitted["metrics"]["fid"]]
        row = [f"{scale:g}", str(count), *(f"{cell:.2f}" for cell in cells)]
        rows.append([*row, agreement if scale == 1.5 else "-"])
    header = ["guidance", "n", "FID, teacher", "FID, ten calls of oss_fit"]
    keep(__file__, "quality.md", table([*header, "PSNR to 200 Euler steps, n = 100"], rows))


def tables(fid: list[str]) -> None:
    """Write PSNR and FID of every strategy with Euler steps, teacher on EDM's schedule."""
    name = "cifar10/tables"
    measure(
        name,
        f"model={NAME}",
        "noise_schedule=edm",
        f"stepsize=[{STRATEGIES}]",
        "num_steps=[5,10]",
        "data.search_samples=32",
        "data.eval_samples=1000",
        "data.batch_size=250",
        *fid,
    )
    keep(__file__, "table.md", (OUTPUTS / name / "table.md").read_text())


if __name__ == "__main__":
    main()
