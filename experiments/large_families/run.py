"""The small relatives of FLUX, Open-Sora and MAR: what they draw, and what every strategy makes of them.

python -m experiments.large_families.run quality    # pictures by 100 Euler steps, and how many are what was asked for
python -m experiments.large_families.run compare    # K = 5, 10, 20 of Euler's steps, 100 for the teacher
python -m experiments.large_families.run figure_7   # MAR: FID against the steps of every token, one schedule for all

Each can be limited to some networks: `... quality flux_fashion`. Finished runs are kept in outputs/experiments.
"""

from __future__ import annotations

import argparse
import json

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from experiments.common import OUTPUTS, finished, keep, measure, png, table
from oss_exp.data.captioned import MOVES
from oss_exp.data.prompts import read_prompts
from oss_exp.evaluation.classifier import FashionFeatures
from oss_exp.evaluation.pictures import as_bytes, encoded, frames_of
from oss_exp.geneval.detectors import nearest_colours
from oss_exp.geneval.garments import GARMENTS

NETWORKS = {
    "flux_fashion": ["data=prompts", "data.prompts=coloured_fashion.txt", "data.eval_samples=256"],
    "video_fashion": ["data=prompts", "data.prompts=moving_fashion.txt", "data.eval_samples=128"],
    "mar_fashion": ["noise_schedule=cosine", "data.eval_samples=256"],
}
# An analytic start is from a mean: a prompt has its own, and so has each token in MAR's later iterations.
PINNED = "stepsize.oss_shared.start=pinned"
STRATEGIES = "stepsize=[fm,fm_shifted,ddim,edm,dm,gits,oss_ave,oss_shared,oss_fit,oss_best]"
QUICK = [  # a search of a twentieth of the calls: coarse to fine, and not refined
    f"stepsize.{name}.{setting}"
    for name in ("oss_ave", "oss_shared", "oss_fit")
    for setting in ("band={stride: 8, width: 1}", "refine=false")
]
SHARE = 0.2  # of the brightest pixel, above which a pixel is of the garment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("quality", "compare", "figure_7"))
    parser.add_argument(
        "networks", nargs="*", default=list(NETWORKS), metavar="network", help=" | ".join(NETWORKS)
    )
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    if options.part == "figure_7":
        figure_7()
    else:
        for name in options.networks:
            {"quality": quality, "compare": compare}[options.part](name)


def compare(name: str) -> None:
    search = ["num_steps=[5,10,20]", "data.search_samples=32", "data.batch_size=64"]
    run = f"large_families/{name}"
    folder = finished(run, f"model={name}", STRATEGIES, *QUICK, PINNED, *search, *NETWORKS[name])
    keep(__file__, f"{name}.md", (folder / "table.md").read_text())
    for picture in ("schedules.png", "samples.png", "samples.gif"):
        if (folder / picture).exists():
            keep(__file__, f"{name}_{picture}", (folder / picture).read_bytes())


# --------------------------------------------------------------------------------------------------------------
# What they draw
# --------------------------------------------------------------------------------------------------------------


def quality(name: str, scale: float = 1.5, count: int = 240) -> None:
    """A picture of some of the teacher's samples, and the shares of `count` that show what was asked for."""
    once = ["stepsize=ddim", "num_steps=[1]", "evaluation.save_images=npz", "data.batch_size=40"]
    settings = [each for each in NETWORKS[name] if "eval_samples" not in each]
    model = [f"model={name}", f"model.guidance.scale={scale}"]
    folder = finished(
        f"large_families/{name}_quality", *model, *settings, *once, f"data.eval_samples={count}"
    )
    images = (
        torch.from_numpy(np.load(folder / "images" / "teacher.npz")["arr_0"]).movedim(-1, 1) / 255
    )
    if name == "mar_fashion":
        texts = [GARMENTS[i % 10] for i in range(count)]
    else:  # held-out prompts are from the back of the list
        prompts = read_prompts(settings[1].removeprefix("data.prompts="))
        texts = [prompts[(-1 - i) % len(prompts)] for i in range(count)]
    rows = [[part, f"{100 * share:.1f} %"] for part, share in agreement(images, texts).items()]
    keep(
        __file__,
        f"{name}_quality.md",
        table([f"{name}, guidance {scale:g}, n = {count}", "as asked"], rows),
    )
    shown = frames_of(images).unflatten(0, (count, -1))[
        : 40 if images.ndim == 5 else 80
    ]  # (n, F, C, H, W)
    grid = torch.stack([make_grid(frame, nrow=10) for frame in shown.unbind(1)])
    frames = as_bytes(grid).numpy()
    if images.ndim == 5:
        keep(__file__, f"{name}_quality.gif", encoded(frames))
    else:
        keep(__file__, f"{name}_quality.png", encoded(frames[0]))


def agreement(images: Tensor, texts: list[str]) -> dict[str, float]:
    """images (n, C, H, W) or (n, C, F, H, W) in [0, 1] -> the share that has each thing that their texts ask for.

    A garment is what the classifier sees, in most of a video's frames; a colour is the nearest of the eight to the mean
    colour of what is drawn; a move is where its middle goes, and what becomes of its area.
    """
    frames = frames_of(images).unflatten(0, (len(images), -1))  # (n, F, C, H, W)
    bright = frames.amax(2)
    drawn = bright > SHARE * bright.amax((2, 3), keepdim=True)
    seen = garments(bright, drawn)
    right = {
        "garment": np.array(
            [label in text.split() for text, label in zip(texts, seen, strict=True)]
        )
    }
    if images.shape[1] == 3:
        names = nearest_colours((frames * drawn[:, :, None]).sum((1, 3, 4)))
        right["colour"] = np.array(
            [name in text.split() for name, text in zip(names, texts, strict=True)]
        )
    if images.ndim == 5:
        right["move"] = np.array(
            [move in text for move, text in zip(moves(drawn), texts, strict=True)]
        )
    right["all of it"] = np.logical_and.reduce(list(right.values()))
    return {name: float(each.mean()) for name, each in right.items()}


def garments(bright: Tensor, drawn: Tensor) -> list[str]:
    """(n, F, 32, 32): what the classifier sees in most frames of the drawn part, scaled to 28 pixels and centred."""
    classifier = FashionFeatures.from_asset()
    found = []
    for frames, masks in zip(bright, drawn, strict=True):
        cut = torch.cat([centred(frame, mask) for frame, mask in zip(frames, masks, strict=True)])
        votes = classifier.logits(cut).softmax(1).sum(0)
        found.append(GARMENTS[int(votes.argmax())])
    return found


def centred(frame: Tensor, mask: Tensor) -> Tensor:
    """(32, 32) -> (1, 1, 32, 32), the box around what is drawn as large as in Fashion-MNIST."""
    rows, columns = (mask.any(axis).nonzero()[:, 0] for axis in (1, 0))
    box = frame[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1][None, None]
    factor = 28 / max(box.shape[2:])
    height, width = (max(1, round(factor * side)) for side in box.shape[2:])
    box = F.interpolate(box, (height, width), mode="bilinear", antialias=factor < 1)
    top, left = (32 - height) // 2, (32 - width) // 2
    return F.pad(box, (left, 32 - width - left, top, 32 - height - top)).clamp(0, 1)


def moves(drawn: Tensor) -> list[str]:
    """(n, F, 32, 32) -> the move whose travel and growth, first to last quarter of the frames, are nearest."""
    place = torch.linspace(-1, 1, drawn.shape[-1])
    area = drawn.sum((2, 3)).clamp(min=1)
    across = (drawn * place).sum((2, 3)) / area
    down = (drawn * place[:, None]).sum((2, 3)) / area
    late, early = slice(-2, None), slice(0, 2)
    change = [
        each[:, late].mean(1) - each[:, early].mean(1) for each in (across, down, area.log() / 2)
    ]
    expected = torch.tensor([[x, y, np.log(growth)] for x, y, growth in MOVES.values()])
    nearest = torch.cdist(torch.stack(change, dim=1), expected.float()).argmin(1)
    return [list(MOVES)[i] for i in nearest]


# --------------------------------------------------------------------------------------------------------------
# Figure 7
# --------------------------------------------------------------------------------------------------------------


def figure_7(count: int = 500) -> None:
    """The same schedule of each token's diffusion in every iteration, found in the first one."""
    budgets = [5, 10, 20, 50]
    results = measure(
        "large_families/figure_7",
        "model=mar_fashion",
        "noise_schedule=cosine",
        PINNED,
        "stepsize=[ddim,fm,oss_ave,oss_shared]",
        *QUICK[:4],
        f"num_steps={budgets}".replace(" ", ""),
        "data.search_samples=32",
        f"data.eval_samples={count}",
        "data.batch_size=100",
        "metric=[fid,class_agreement]",
    )
    names = list(dict.fromkeys(result.strategy for result in results))
    rows = []
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in names:
        own = {result.num_steps: result for result in results if result.strategy == name}
        fids = [own[k].metrics["fid"] for k in budgets]
        rows.append(
            [name, *(f"{fid:.3f}" for fid in fids), *(f"{own[k].psnr.mean:.2f}" for k in budgets)]
        )
        axis.plot(budgets, fids, marker="o", label=name)
    found = json.loads((OUTPUTS / "large_families" / "figure_7" / "metrics.json").read_text())[
        "teacher_metrics"
    ]["fid"]
    axis.axhline(found, color="0.5", ls="--", label="teacher, 100 steps")
    axis.set(
        xlabel="steps of each token", ylabel=f"FID, {count} images", xscale="log", ylim=(0, None)
    )
    axis.set_xticks(budgets, map(str, budgets))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    keep(__file__, "figure_7.png", png(figure))
    header = ["strategy", *(f"FID, {k}" for k in budgets), *(f"PSNR, {k}" for k in budgets)]
    keep(__file__, "figure_7.md", table(header, rows))


if __name__ == "__main__":
    main()
