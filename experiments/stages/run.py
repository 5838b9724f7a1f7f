"""Stages cut at uniform (DDIM) times and at searched ones, before and after they are trained.

python -m experiments.stages.run dit_fashion 5    # a network and a number of stages; without any: all of them

Each cell is a training of every stage and four evaluations, and goes on where it was stopped.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.common import OUTPUTS, finished, keep, png, table
from oss_exp.evaluation.psnr import Interval

NETWORKS = ("dit_fashion", "unet_fashion")
STAGES = (5, 3, 8)
CUTS = {"ddim": "uniform (DDIM)", "oss_ave": "OSS"}
LONG = ("dit_fashion", 5)  # with a longer training and more images for FID


def main() -> None:
    chosen = (
        [(sys.argv[1], int(sys.argv[2]))]
        if len(sys.argv) > 1
        else [(n, k) for k in STAGES for n in NETWORKS]
    )
    for network, stages in chosen:
        for cuts in CUTS:
            cell(network, stages, cuts)
    show()


def cell(network: str, stages: int, cuts: str) -> dict[str, Any]:
    """What a network says of one way to cut it: {"before", "after"} of FID, PSNR, class agreement; the stages' records.

    The teacher of the images for FID takes few steps, for it is not looked at. PSNR is of 256 images.
    """
    name = f"stages/{network}_{stages}_{cuts}"
    steps, trajectories, count = (
        (250, 1024, 10_000) if (network, stages) == LONG else (100, 512, 2_000)
    )
    training = [
        f"task.max_steps={steps}",
        f"task.save_every={steps // 2}",
        f"task.trajectories={trajectories}",
    ]
    model = [f"model={network}", f"noise_schedule={'edm' if network == 'unet_fashion' else 'fm'}"]
    search = [f"stepsize={cuts}", f"num_steps=[{stages}]", f"task.num_stages={stages}"]
    run = finished(name, "task=finetune", *model, *search, *training, file="finetune.json")
    schedule = [f"task.schedule={run / 'stages' / 'schedule.json'}", "data.batch_size=100"]
    few = [f"num_teacher_steps={stages}", f"num_steps=[{stages}]"]
    images = [f"data.eval_samples={count}", *few, "metric=[fid,class_agreement]"]
    records = json.loads((run / "finetune.json").read_text())["stages"]
    found: dict[str, Any] = {"stages": records, "n": count, "steps": steps}
    for when, more in (("before", []), ("after", [f"stages={run / 'stages'}"])):
        (quality,) = rows(
            finished(f"{name}_{when}", "task=evaluate", *model, *schedule, *more, *images)
        )
        (pictures,) = rows(
            finished(f"{name}_{when}_psnr", "task=evaluate", *model, *schedule, *more)
        )
        found[when] = {**quality["metrics"], "psnr": pictures["psnr"]}
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "metrics.json").read_text())["rows"]


def show() -> None:
    """The table and the figure of all cells that are there."""
    lines, records = [], {}
    for network in NETWORKS:
        for stages in sorted(STAGES):
            folders = [OUTPUTS / f"stages/{network}_{stages}_{cuts}_after_psnr" for cuts in CUTS]
            if not all((folder / "metrics.json").is_file() for folder in folders):
                continue
            for cuts, label in CUTS.items():
                found = records[network, stages, cuts] = cell(network, stages, cuts)
                before, after = found["before"], found["after"]
                psnr = [str(Interval(**each["psnr"])) for each in (before, after)]
                right = [f"{each['class_agreement']:.1f} %" for each in (before, after)]
                fids = [f"{each['fid']:.3f}" for each in (before, after)]
                sizes = [str(found["steps"]), f"{found['n']:,}"]
                lines.append([network, str(stages), label, *fids, *psnr, *right, *sizes])
    header = [
        "network",
        "stages",
        "cuts",
        "FID before",
        "after",
        "PSNR before",
        "after",
        "right class before",
        "after",
    ]
    keep(__file__, "table.md", table([*header, "training steps a stage", "n of FID"], lines))
    keep(__file__, "difficulty.png", png(difficulty(records)))


def difficulty(records: dict[tuple[str, int, str], dict[str, Any]]) -> plt.Figure:
    """The error of each stage's jump before (bars) and after its training (dots), a panel a network and number."""
    networks, numbers = (sorted({key[i] for key in records}) for i in (0, 1))
    size = (4.2 * len(numbers), 3.3 * len(networks))
    figure, axes = plt.subplots(
        len(networks), len(numbers), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (network, stages) in zip(axes.flat, product(networks, numbers), strict=True):
        if (network, stages, "ddim") not in records:
            axis.remove()
            continue
        places = np.arange(stages)
        for offset, (cuts, label) in zip((-0.2, 0.2), CUTS.items(), strict=True):
            training = [stage["training"] for stage in records[network, stages, cuts]["stages"]]
            bars = axis.bar(
                places + offset,
                [each["loss_before"] for each in training],
                0.4,
                label=label,
                alpha=0.6,
            )
            after = [each["loss_after"] for each in training]
            axis.plot(
                places + offset,
                after,
                "o",
                color=bars.patches[0].get_facecolor(),
                mec="black",
                ms=5,
            )
        axis.set(
            title=f"{network}, {stages} stages",
            xlabel="stage (0: noise)",
            yscale="log",
            xticks=places,
        )
        axis.grid(alpha=0.3)
    figure.supylabel("mean squared error of its jump", fontsize=10)
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
