"""The shipped networks: how good they are, what every strategy makes of them, and whether a schedule transfers.

python -m experiments.small_networks.run quality    # grids, FID and class agreement of the teacher
python -m experiments.small_networks.run compare    # K = 5, 10, 20 with Euler and DPM-Solver++ of orders up to 3
python -m experiments.small_networks.run transfer   # to the other network, and to other guidance

Each can be limited to one network: `... quality unet_fashion`. Finished runs are kept in outputs/experiments.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from torchvision.utils import make_grid

from experiments.common import OUTPUTS, configuration, finished, keep, measure, table
from oss_exp.evaluation.comparison import Result
from oss_exp.evaluation.metrics import FID
from oss_exp.evaluation.pictures import as_bytes, encoded
from oss_exp.evaluation.psnr import Interval, psnr
from oss_exp.noise import FlowSchedule
from oss_exp.report.plots import samples
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler

BY_HAND = "ddim,ddim_analytic,edm,fm,dm,gits"
NETWORKS = ("unet_fashion", "dit_fashion")
QUICK = [  # a search of a twentieth of the calls: coarse to fine, and not refined
    f"stepsize.{name}.{setting}"
    for name in ("oss_shared", "oss_fit")
    for setting in ("band={stride: 8, width: 1}", "refine=false")
]
SOLVERS = {  # and what is compared with them
    "euler": ["solver=euler", f"stepsize=[{BY_HAND},oss_ave,oss_shared,oss_fit]"],
    "dpm_solver_pp": [
        "solver=dpm_solver_pp",
        "solver.order=3",
        f"stepsize=[{BY_HAND},oss_shared,oss_fit]",
        *QUICK,
    ],
}
FINE = ["solver=dpm_solver_pp", "solver.order=2", "noise_schedule=edm", "num_teacher_steps=25"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("quality", "compare", "transfer"))
    parser.add_argument(
        "networks", nargs="*", default=NETWORKS, metavar="network", help=" | ".join(NETWORKS)
    )
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    {"quality": quality, "compare": compare, "transfer": transfer}[options.part](options.networks)


def quality(networks) -> None:
    """Grids by 200 Euler steps; the many samples of FID by 25 steps of DPM-Solver++, beside how near the two are."""
    real = [
        "60,000 training images, the first 10,000",
        "-",
        "10000",
        f"{fid_of_training_images():.2f}",
        *["-"] * 4,
    ]
    rows = [real]
    for name in networks:
        picture, agreement = grid(name)
        keep(__file__, f"{name}.png", picture)
        for scale, count in ((1.0, 10_000), (1.5, 1_000)):
            folder = finished(
                f"small_networks/{name}_teacher_{scale}",
                f"model={name}",
                f"model.guidance.scale={scale}",
                *FINE,
                "stepsize=ddim",
                "num_steps=[1]",
                f"data.eval_samples={count}",
                "data.batch_size=250",
                "metric=[fid,kid,precision_recall,class_agreement]",
                "metric.kid.subset_size=1000",
            )
            found = json.loads((folder / "metrics.json").read_text())["teacher_metrics"]
            numbers = [f"{found['fid']:.2f}", f"{1000 * found['kid']:.2f}"]
            numbers += [
                f"{found['precision']:.3f} / {found['recall']:.3f}",
                f"{found['class_agreement']:.1f} %",
            ]
            rows.append(
                [name, f"{scale:g}", str(count), *numbers, agreement if scale == 1.5 else "-"]
            )
    header = ["images", "guidance", "n", "FID", "1000 KID", "precision / recall", "class agreement"]
    header += ["PSNR to 200 Euler steps, n = 100"]
    keep(__file__, f"quality_{'_'.join(networks)}.md", table(header, rows))


def compare(networks) -> None:
    for name in networks:
        for solver in SOLVERS:
            run = f"{name}_{solver}"
            results = compared(run, name, solver)
            folder = OUTPUTS / "small_networks" / run
            keep(__file__, f"{run}.md", (folder / "table.md").read_text())
            for picture in ("schedules", "samples"):
                keep(__file__, f"{run}_{picture}.png", (folder / f"{picture}.png").read_bytes())
            if run == "unet_fashion_dpm_solver_pp":
                keep(__file__, "front.png", front(folder, results))


def front(folder: Path, results: list[Result]) -> bytes:
    """The picture of the project's README: a few of the strategies with ten calls."""
    with np.load(folder / "samples.npz") as file:
        labels = [
            "teacher",
            *(f"{name} K=10" for name in ("oss_shared", "dm", "fm", "edm", "ddim")),
        ]
        return samples({label: file[label] for label in labels}, results)


def compared(run: str, name: str, solver: str) -> list[Result]:
    return measure(
        f"small_networks/{run}",
        f"model={name}",
        *SOLVERS[solver],
        "num_steps=[5,10,20]",
        "data.search_samples=32",
        "data.eval_samples=256",
        "metric=[fid,kid,class_agreement]",
        "metric.kid.subset_size=256",
    )


def transfer(networks) -> None:
    """oss_shared for Euler, searched by `compare` and measured elsewhere, beside what a search there finds."""
    rows = []
    for name in networks:
        other = next(network for network in NETWORKS if network != name)
        for source, guidance in ((other, 1.0), (name, 3.0)):
            there = [f"model={name}", f"model.guidance.scale={guidance}"]
            there += ["data.search_samples=32", "data.eval_samples=128"]
            if guidance == 1:
                own = compared(f"{name}_euler", name, "euler")
            else:
                strategies = ["stepsize=[ddim,dm,gits,oss_shared]", "num_steps=[5,10]", *QUICK[:2]]
                own = measure(f"small_networks/{name}_guidance_{guidance}", *there, *strategies)
            for k in (5, 10):
                file = OUTPUTS / f"small_networks/{source}_euler/schedules/oss_shared_{k}.json"
                settings = ["task=evaluate", f"task.schedule={file}", "task.allow_other_model=true"]
                (found,) = measure(
                    f"small_networks/{source}_to_{name}_{guidance}_{k}", *settings, *there
                )
                rivals = {result.strategy: result for result in own if result.num_steps == k}
                best = max(
                    (rivals[strategy] for strategy in ("ddim", "dm", "gits")),
                    key=lambda r: r.psnr.mean,
                )
                numbers = [
                    str(on_the_same(result, found))
                    for result in (found, rivals["oss_shared"], best)
                ]
                rows.append(
                    [f"{source}, 1", f"{name}, {guidance:g}", str(k), *numbers, best.strategy]
                )
    header = [
        "searched on, guidance",
        "run on, guidance",
        "K",
        "PSNR",
        "of its own search",
        "best of DDIM, DM, GITS",
        "",
    ]
    keep(__file__, "transfer.md", table(header, rows))


def on_the_same(result: Result, other: Result) -> Interval:
    """PSNR on the samples that both have."""
    return Interval.of(
        np.array([value for index, value in result.values.items() if index in other.values])
    )


def grid(name: str) -> tuple[bytes, str]:
    """Ten samples of each class from the 200-step teacher at guidance 1.5, as a PNG; the PSNR of FINE's to them."""
    settings = [f"model={name}", "model.guidance.scale=1.5"]
    model = instantiate(configuration(*settings).model)
    noise = torch.randn(100, *model.event_shape, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(10).repeat_interleave(10)
    images = model.generate(
        Euler(), StepSchedule(FlowSchedule(shift=1.0).nodes(200)), noise, classes
    )

    fine = configuration(*FINE)
    nodes = instantiate(fine.noise_schedule).nodes(fine.num_teacher_steps)
    steps = StepSchedule(nodes)
    others = model.generate(instantiate(fine.solver), steps, steps.start_time * noise, classes)
    agreement = str(Interval.of(psnr(others, images).numpy()))

    picture = as_bytes(make_grid(images, nrow=10)[None])[0].numpy()
    return encoded(picture.repeat(2, axis=0).repeat(2, axis=1)), agreement


def fid_of_training_images() -> float:
    cfg = configuration("task=statistics")
    images = (instantiate(cfg.images)[0][:10_000] + 1) / 2
    parts = {key: instantiate(cfg.evaluation[key]) for key in ("extractor", "reference")}
    metric = FID(**parts, num_images=10_000)
    for part in images.split(500):
        metric.update(part, part, torch.full((len(part),), -1))
    return metric.compute()["fid"]


if __name__ == "__main__":
    main()
