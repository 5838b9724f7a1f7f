"""The shipped networks: their quality, every strategy on them, and whether schedules transfer.

python -m experiments.small_networks.run quality    # grids, FID and class agreement of the teacher
python -m experiments.small_networks.run compare    # K = 5, 10, 20 with Euler and DPM-Solver++ 3
python -m experiments.small_networks.run transfer   # to the other network, and to other guidance

Each can be limited to one network: `... quality unet_fashion`. Finished runs are kept in
outputs/experiments.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from torchvision.utils import make_grid

from experiments.common import OUTPUTS, command_line, configuration, finished, keep, measure, table
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
QUICK = [  # searches with a twentieth of the calls: coarse to fine, and not refined
    "stepsize.oss_shared.band={stride: 8, width: 1}",
    "stepsize.oss_shared.refine=false",
    "stepsize.oss_fit.band={stride: 8, width: 1}",
    "stepsize.oss_fit.refine=false",
]
SOLVERS = {  # with the strategies that are compared
    "euler": ["solver=euler", f"stepsize=[{BY_HAND},oss_ave,oss_shared,oss_fit]"],
    "dpm_solver_pp": [
        "solver=dpm_solver_pp",
        "solver.order=3",
        f"stepsize=[{BY_HAND},oss_shared,oss_fit]",
        *QUICK,
    ],
}
FINE = ["solver=dpm_solver_pp", "solver.order=2", "noise_schedule=edm", "num_teacher_steps=25"]
METRICS = "metric=[fid,kid,precision_recall,class_agreement]"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("part", choices=("quality", "compare", "transfer"))
    parser.add_argument(
        "networks", nargs="*", default=NETWORKS, metavar="network", help=" | ".join(NETWORKS)
    )
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    {"quality": quality, "compare": compare, "transfer": transfer}[options.part](options.networks)


# --------------------------------------------------------------------------------------------------
# Quality
# --------------------------------------------------------------------------------------------------


def quality(networks) -> None:
    """Write a grid of samples and a row of metrics for each network.

    The grids are by 200 Euler steps. The many samples of FID are by 25 steps of DPM-Solver++; a
    column says how near the two are.
    """
    training_images = "60,000 training images, the first 10,000"
    rows = [[training_images, "-", "10000", f"{fid_of_training_images():.2f}", *["-"] * 4]]
    for name in networks:
        picture, agreement = grid(name)
        keep(__file__, f"{name}.png", picture)
        for scale, count in ((1.0, 10_000), (1.5, 1_000)):
            row = [name, f"{scale:g}", str(count), *teacher_metrics(name, scale, count)]
            rows.append([*row, agreement if scale == 1.5 else "-"])

    header = ["images", "guidance", "n", "FID", "1000 KID", "precision / recall", "class agreement"]
    header.append("PSNR to 200 Euler steps, n = 100")
    keep(__file__, f"quality_{'_'.join(networks)}.md", table(header, rows))


def teacher_metrics(name: str, scale: float, count: int) -> list[str]:
    """Return the cells of FID, KID, precision and recall, and class agreement."""
    folder = finished(
        f"small_networks/{name}_teacher_{scale}",
        f"model={name}",
        f"model.guidance.scale={scale}",
        *FINE,
        "stepsize=ddim",
        "num_steps=[1]",
        f"data.eval_samples={count}",
        "data.batch_size=250",
        METRICS,
        "metric.kid.subset_size=1000",
    )
    metrics = json.loads((folder / "metrics.json").read_text())["teacher_metrics"]
    return [
        f"{metrics['fid']:.2f}",
        f"{1000 * metrics['kid']:.2f}",
        f"{metrics['precision']:.3f} / {metrics['recall']:.3f}",
        f"{metrics['class_agreement']:.1f} %",
    ]


def grid(name: str) -> tuple[bytes, str]:
    """Draw ten samples of each class from the 200-step teacher at guidance 1.5.

    Returns:
        The picture as a PNG, and the PSNR of the samples by FINE's steps to these.
    """
    settings = [f"model={name}", "model.guidance.scale=1.5"]
    model = instantiate(configuration(*settings).model)
    noise = torch.randn(100, *model.event_shape, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(10).repeat_interleave(10)
    teacher = StepSchedule(FlowSchedule(shift=1.0).nodes(200))
    images = model.generate(Euler(), teacher, noise, classes)

    # The same noises by fewer steps.
    fine = configuration(*FINE)
    nodes = instantiate(fine.noise_schedule).nodes(fine.num_teacher_steps)
    steps = StepSchedule(nodes)
    others = model.generate(instantiate(fine.solver), steps, steps.start_time * noise, classes)
    agreement = str(Interval.of(psnr(others, images).numpy()))

    # Every pixel twice as large.
    picture = as_bytes(make_grid(images, nrow=10)[None])[0].numpy()
    return encoded(picture.repeat(2, axis=0).repeat(2, axis=1)), agreement


def fid_of_training_images() -> float:
    cfg = configuration("task=statistics")
    images = (instantiate(cfg.images)[0][:10_000] + 1) / 2
    extractor = instantiate(cfg.evaluation.extractor)
    reference = instantiate(cfg.evaluation.reference)
    metric = FID(extractor=extractor, reference=reference, num_images=10_000)
    for part in images.split(500):
        metric.update(part, part, torch.full((len(part),), -1))
    return metric.compute()["fid"]


# --------------------------------------------------------------------------------------------------
# Strategies
# --------------------------------------------------------------------------------------------------


def compare(networks) -> None:
    """Write the table and the pictures of every network and solver."""
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


def front(folder: Path, results: list[Result]) -> bytes:
    """Draw the picture of the project's README: some strategies with ten calls."""
    names = ("oss_shared", "dm", "fm", "edm", "ddim")
    labels = ["teacher", *(f"{name} K=10" for name in names)]
    with np.load(folder / "samples.npz") as file:
        return samples({label: file[label] for label in labels}, results)


# --------------------------------------------------------------------------------------------------
# Transfer
# --------------------------------------------------------------------------------------------------


def transfer(networks) -> None:
    """Run oss_shared for Euler on another network or guidance than it was searched for."""
    rows = []
    for name in networks:
        other = next(network for network in NETWORKS if network != name)
        for source, guidance in ((other, 1.0), (name, 3.0)):
            for k in (5, 10):
                row = [f"{source}, 1", f"{name}, {guidance:g}", str(k)]
                rows.append([*row, *transferred(source, name, guidance, k)])
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


def transferred(source: str, name: str, guidance: float, k: int) -> list[str]:
    """Return three PSNRs, and the name of the best baseline.

    The PSNRs are those of the schedule searched on `source` by `compare`, of one searched on the
    network that it runs on, and of the best baseline there.
    """
    setting = [f"model={name}", f"model.guidance.scale={guidance}"]
    setting += ["data.search_samples=32", "data.eval_samples=128"]

    # Strategies that are made for the setting.
    if guidance == 1:
        results = compared(f"{name}_euler", name, "euler")
    else:
        strategies = ["stepsize=[ddim,dm,gits,oss_shared]", "num_steps=[5,10]", *QUICK[:2]]
        results = measure(f"small_networks/{name}_guidance_{guidance}", *setting, *strategies)
    by_strategy = {result.strategy: result for result in results if result.num_steps == k}
    baselines = [by_strategy[strategy] for strategy in ("ddim", "dm", "gits")]
    baseline = max(baselines, key=lambda result: result.psnr.mean)

    # The schedule from elsewhere.
    file = OUTPUTS / f"small_networks/{source}_euler/schedules/oss_shared_{k}.json"
    evaluate = ["task=evaluate", f"task.schedule={file}", "task.allow_other_model=true"]
    run = f"small_networks/{source}_to_{name}_{guidance}_{k}"
    (result,) = measure(run, *evaluate, *setting)

    # On the same samples.
    rivals = (result, by_strategy["oss_shared"], baseline)
    return [*(str(on_common_samples(rival, result)) for rival in rivals), baseline.strategy]


def on_common_samples(result: Result, other: Result) -> Interval:
    """Return the PSNR on the samples that both results have."""
    values = [value for index, value in result.values.items() if index in other.values]
    return Interval.of(np.array(values))


if __name__ == "__main__":
    main()
