"""Stages cut at uniform (DDIM) times and at searched ones, before and after they are trained.

python -m experiments.stages.run dit_fashion 5    # one cell; without arguments: all

Each cell is a training of every stage and four evaluations, and continues where it was stopped.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.common import OUTPUTS, command_line, finished, keep, png, table
from oss_exp.evaluation.psnr import Interval

NETWORKS = ("dit_fashion", "unet_fashion")
STAGES = (5, 3, 8)
CUTS = {"ddim": "uniform (DDIM)", "oss_ave": "OSS"}
LONG = ("dit_fashion", 5)  # with a longer training and more images for FID


HEADER = [
    "network",
    "stages",
    "cuts",
    "FID before",
    "after",
    "PSNR before",
    "after",
    "right class before",
    "after",
    "training steps a stage",
    "n of FID",
]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("network", nargs="?", choices=NETWORKS, help="left out: all cells")
    parser.add_argument("stages", nargs="?", type=int, choices=STAGES, default=STAGES[0])
    options = parser.parse_args()
    cells = [(network, stages) for stages in STAGES for network in NETWORKS]
    if options.network:
        cells = [(options.network, options.stages)]
    for network, stages in cells:
        for cuts in CUTS:
            cell(network, stages, cuts)
    show()


def cell(network: str, stages: int, cuts: str) -> dict[str, Any]:
    """Train and evaluate a network that is cut in one way.

    The teacher of the images for FID takes few steps, because its images are not used. PSNR is of
    256 images.

    Returns:
        FID, PSNR and class agreement as "before" and "after", the records of the "stages", the
        number "n" of images for FID, and the training "steps" of a stage.
    """
    name = f"stages/{network}_{stages}_{cuts}"
    is_long = (network, stages) == LONG
    steps, trajectories, count = (250, 1024, 10_000) if is_long else (100, 512, 2_000)

    # Search the cuts and train the stages.
    noise_schedule = "edm" if network == "unet_fashion" else "fm"
    model = [f"model={network}", f"noise_schedule={noise_schedule}"]
    search = [f"stepsize={cuts}", f"num_steps=[{stages}]", f"task.num_stages={stages}"]
    training = [f"task.max_steps={steps}", f"task.save_every={steps // 2}"]
    training.append(f"task.trajectories={trajectories}")
    run = finished(name, "task=finetune", *model, *search, *training, file="finetune.json")
    records = json.loads((run / "finetune.json").read_text())["stages"]

    # Evaluate before and after.
    evaluate = ["task=evaluate", *model, f"task.schedule={run / 'stages' / 'schedule.json'}"]
    evaluate.append("data.batch_size=100")
    few = [f"num_teacher_steps={stages}", f"num_steps=[{stages}]"]
    images = [f"data.eval_samples={count}", *few, "metric=[fid,class_agreement]"]
    result: dict[str, Any] = {"stages": records, "n": count, "steps": steps}
    for moment, weights in (("before", []), ("after", [f"stages={run / 'stages'}"])):
        (quality,) = rows(finished(f"{name}_{moment}", *evaluate, *weights, *images))
        (pairs,) = rows(finished(f"{name}_{moment}_psnr", *evaluate, *weights))
        result[moment] = {**quality["metrics"], "psnr": pairs["psnr"]}
    return result


def rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "metrics.json").read_text())["rows"]


def show() -> None:
    """Write the table and the figure of all cells that are there."""
    lines = []
    records = {}
    for network, stages in product(NETWORKS, sorted(STAGES)):
        folders = [OUTPUTS / f"stages/{network}_{stages}_{cuts}_after_psnr" for cuts in CUTS]
        if not all((folder / "metrics.json").is_file() for folder in folders):
            continue
        for cuts, label in CUTS.items():
            record = cell(network, stages, cuts)
            records[network, stages, cuts] = record
            lines.append([network, str(stages), label, *table_cells(record)])
    keep(__file__, "table.md", table(HEADER, lines))
    keep(__file__, "difficulty.png", png(difficulty(records)))


def table_cells(record: dict[str, Any]) -> list[str]:
    moments = (record["before"], record["after"])
    fids = [f"{moment['fid']:.3f}" for moment in moments]
    psnr = [str(Interval(**moment["psnr"])) for moment in moments]
    classes = [f"{moment['class_agreement']:.1f} %" for moment in moments]
    return [*fids, *psnr, *classes, str(record["steps"]), f"{record['n']:,}"]


def difficulty(records: dict[tuple[str, int, str], dict[str, Any]]) -> plt.Figure:
    """Draw the error of each stage's jump before (bars) and after its training (dots)."""
    networks = sorted({network for network, _, _ in records})
    numbers = sorted({stages for _, stages, _ in records})
    size = (4.2 * len(numbers), 3.3 * len(networks))
    figure, axes = plt.subplots(
        len(networks), len(numbers), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )

    # A panel for each network and number of stages.
    for axis, (network, stages) in zip(axes.flat, product(networks, numbers), strict=True):
        if (network, stages, "ddim") not in records:
            axis.remove()
            continue
        for offset, (cuts, label) in zip((-0.2, 0.2), CUTS.items(), strict=True):
            training = [stage["training"] for stage in records[network, stages, cuts]["stages"]]
            before = [stage["loss_before"] for stage in training]
            after = [stage["loss_after"] for stage in training]
            places = np.arange(stages) + offset
            bars = axis.bar(places, before, 0.4, label=label, alpha=0.6)
            color = bars.patches[0].get_facecolor()
            axis.plot(places, after, "o", color=color, mec="black", ms=5)
        title = f"{network}, {stages} stages"
        axis.set(title=title, xlabel="stage (0: noise)", yscale="log", xticks=range(stages))
        axis.grid(alpha=0.3)

    figure.supylabel("mean squared error of its jump", fontsize=10)
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
