"""The small relatives of FLUX, Open-Sora and MAR: their samples, and every strategy on them.

python -m experiments.large_families.run quality    # 100 Euler steps, and how many samples fit
python -m experiments.large_families.run blind      # video: twelve without captions, and the key
python -m experiments.large_families.run compare    # K = 5, 10, 20 Euler steps, 100 for the teacher
python -m experiments.large_families.run figure_7   # MAR: FID against the steps of every token

Each can be limited to some networks: `... quality flux_fashion`. Finished runs are kept in
outputs/experiments.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import Tensor
from torchvision.utils import make_grid

from experiments.common import (
    OUTPUTS,
    command_line,
    configuration,
    finished,
    keep,
    measure,
    png,
    table,
)
from oss_exp.data.captioned import MOVES, MovingFashion
from oss_exp.data.prompts import read_prompts
from oss_exp.evaluation.classifier import FashionFeatures
from oss_exp.evaluation.pictures import as_bytes, encoded, frames_of
from oss_exp.geneval.detectors import nearest_colours
from oss_exp.geneval.garments import GARMENTS
from oss_exp.noise import FlowSchedule
from oss_exp.report.plots import gif
from oss_exp.schedule import StepSchedule
from oss_exp.solvers import Euler


@dataclass(frozen=True)
class Network:
    """How a network is measured; a video is 8 times as much work as an image.

    Attributes:
        data: Where its conditions and its noise schedule come from.
        compared: Numbers of samples, and the guidance, of `compare`.
        guidance: Guidance of `quality`.
        count: Samples of `quality`.
    """

    data: Sequence[str]
    compared: Sequence[str] = ("data.search_samples=32", "data.eval_samples=256")
    guidance: float = 1.5
    count: int = 240


NETWORKS = {
    "flux_fashion": Network(["data=prompts", "data.prompts=coloured_fashion.txt"]),
    "video_fashion": Network(
        ["data=prompts", "data.prompts=moving_fashion.txt"],
        ["data.search_samples=16", "data.eval_samples=32", "model.guidance.scale=3.0"],
        guidance=3.0,
        count=120,
    ),
    "mar_fashion": Network(["noise_schedule=cosine"]),
}
# An analytic start needs one mean for all samples. Here every prompt has its own, and so has every
# token in MAR's later iterations.
PINNED = "stepsize.oss_shared.start=pinned"
STRATEGIES = "stepsize=[fm,fm_shifted,ddim,edm,dm,gits,oss_ave,oss_shared,oss_fit,oss_best]"
QUICK = [  # searches with a twentieth of the calls: coarse to fine, and not refined
    "stepsize.oss_ave.band={stride: 8, width: 1}",
    "stepsize.oss_ave.refine=false",
    "stepsize.oss_shared.band={stride: 8, width: 1}",
    "stepsize.oss_shared.refine=false",
    "stepsize.oss_fit.band={stride: 8, width: 1}",
    "stepsize.oss_fit.refine=false",
]
SHARE = 0.2  # of the brightest pixel, above which a pixel belongs to the garment


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("part", choices=("quality", "blind", "compare", "figure_7"))
    parser.add_argument(
        "networks", nargs="*", default=list(NETWORKS), metavar="network", help=" | ".join(NETWORKS)
    )
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    if options.part in ("blind", "figure_7"):
        {"blind": blind, "figure_7": figure_7}[options.part]()
    else:
        for name in options.networks:
            {"quality": quality, "compare": compare}[options.part](name)


def compare(name: str) -> None:
    search = ["num_steps=[5,10,20]", "data.batch_size=64"]
    run = f"large_families/{name}"
    settings = [*NETWORKS[name].data, *NETWORKS[name].compared, *search]
    folder = finished(run, f"model={name}", STRATEGIES, *QUICK, PINNED, *settings)
    keep(__file__, f"{name}.md", (folder / "table.md").read_text())
    for picture in ("schedules.png", "samples.png"):
        if (folder / picture).exists():
            keep(__file__, f"{name}_{picture}", (folder / picture).read_bytes())


# --------------------------------------------------------------------------------------------------
# Quality
# --------------------------------------------------------------------------------------------------


def quality(name: str) -> None:
    """Draw some of the teacher's samples, and tabulate how many fit their texts."""
    network = NETWORKS[name]
    folder = finished(
        f"large_families/{name}_quality",
        f"model={name}",
        f"model.guidance.scale={network.guidance}",
        *network.data,
        "stepsize=ddim",
        "num_steps=[1]",
        "evaluation.save_images=npz",
        "data.batch_size=40",
        f"data.eval_samples={network.count}",
    )
    with np.load(folder / "images" / "teacher.npz") as file:
        images = torch.from_numpy(file["arr_0"]).movedim(-1, 1) / 255
    texts = texts_of(name, network.count)

    # Table; videos beside real ones.
    is_video = images.ndim == 5
    columns = {"as asked": agreement(images, texts)}
    if is_video:
        columns["real videos"] = agreement(*real_videos(network.count))
    rows = []
    for part in columns["as asked"]:
        rows.append([part, *(f"{100 * values[part]:.1f} %" for values in columns.values())])
    header = [f"{name}, guidance {network.guidance:g}, n = {network.count}", *columns]
    keep(__file__, f"{name}_quality.md", table(header, rows))

    # Pictures.
    if is_video:
        keep(__file__, f"{name}_quality.gif", captioned(images, texts))
    else:
        keep(__file__, f"{name}_quality.png", encoded(as_bytes(make_grid(images[:80], nrow=10))))


def blind() -> None:
    """Draw the teacher's samples of twelve random prompts, numbered, and write the prompts apart.

    Whoever names garment and move of each should not have seen the prompts.
    """
    count, draw = 12, torch.Generator().manual_seed(1)
    prompts = read_prompts("moving_fashion.txt")
    texts = [prompts[i] for i in torch.randperm(len(prompts), generator=draw)[:count]]

    # The samples.
    guidance = f"model.guidance.scale={NETWORKS['video_fashion'].guidance}"
    model = instantiate(
        configuration("model=video_fashion", guidance, f"+model.prompts={texts}").model
    )
    noise = torch.randn(count, *model.event_shape, generator=draw)
    steps = StepSchedule(FlowSchedule().nodes(100))
    videos = model.generate(Euler(), steps, noise, torch.arange(count))

    numbers = [str(number + 1) for number in range(count)]
    keep(__file__, "video_fashion_blind.gif", captioned(videos, numbers, rows=3, columns=4))
    rows = [list(row) for row in zip(numbers, texts, strict=True)]
    keep(__file__, "video_fashion_blind.md", table(["clip", "prompt"], rows))


def captioned(videos: Tensor, texts: list[str], rows: int = 4, columns: int = 5) -> bytes:
    """Return a GIF of the first videos (n, C, F, H, W), in [0, 1], under their texts."""
    figure, axes = plt.subplots(rows, columns, figsize=(7, 6.2), dpi=75, layout="constrained")
    videos = videos.movedim(1, -1)[: rows * columns]  # (n, F, H, W, C)
    panels = []
    for axis, video, text in zip(axes.flat, videos, texts, strict=False):
        panels.append(axis.imshow(video[0], vmin=0, vmax=1, cmap="gray"))
        axis.set_title(text, fontsize=8)
        axis.axis("off")
    return gif(figure, panels, videos.numpy().swapaxes(0, 1), milliseconds=250)


def texts_of(name: str, count: int) -> list[str]:
    """Return the texts of the held-out samples."""
    if name == "mar_fashion":
        return [GARMENTS[i % 10] for i in range(count)]
    # Held-out prompts are from the back of the list.
    prompts = read_prompts(NETWORKS[name].data[1].removeprefix("data.prompts="))
    return [prompts[(-1 - i) % len(prompts)] for i in range(count)]


def real_videos(count: int) -> tuple[Tensor, list[str]]:
    """Return videos (n, 1, 8, 32, 32) in [0, 1] of unseen garments, and their texts."""
    root = configuration("task=pretrain", "images=moving_fashion").images.root
    data = MovingFashion(root, "test")
    items = [data[i * len(data) // count] for i in range(count)]
    videos = torch.stack([video for video, _ in items])
    return (videos + 1) / 2, [data.captions[label] for _, label in items]


def agreement(images: Tensor, texts: list[str]) -> dict[str, float]:
    """Return the shares of images that have the garment, the colour and the move of their texts.

    A garment is what the classifier sees in most of a video's frames. A colour is the nearest of
    the eight to the mean colour of the garment. A move is where the garment's middle goes, and how
    its area changes. Of videos also the likeness of consecutive frames.

    Args:
        images: (n, C, H, W) or (n, C, F, H, W) in [0, 1].
        texts: n texts.
    """
    frames = frames_of(images).unflatten(0, (len(images), -1))  # (n, F, C, H, W)
    bright = frames.amax(2)
    drawn = bright > SHARE * bright.amax((2, 3), keepdim=True)

    # What every image has.
    labels = {"garment": garments(bright, drawn)}
    if images.shape[1] == 3:
        labels["colour"] = nearest_colours((frames * drawn[:, :, None]).sum((1, 3, 4)))

    # What is right.
    right = {}
    for part, names in labels.items():
        right[part] = np.array([n in text.split() for n, text in zip(names, texts, strict=True)])
    if images.ndim == 5:
        right["move"] = np.array([m in text for m, text in zip(moves(drawn), texts, strict=True)])
    right["all of it"] = np.logical_and.reduce(list(right.values()))
    if images.ndim == 5:
        right["likeness of consecutive frames"] = likeness(bright, drawn)
    return {part: float(values.mean()) for part, values in right.items()}


def garments(bright: Tensor, drawn: Tensor) -> list[str]:
    """Return what the classifier sees in most frames.

    Args:
        bright: Brightness (n, F, 32, 32).
        drawn: Pixels of the garment (n, F, 32, 32).
    """
    classifier = FashionFeatures.from_asset()
    names = []
    for frames, masks in zip(bright, drawn, strict=True):
        pictures = [centred(frame, mask) for frame, mask in zip(frames, masks, strict=True)]
        votes = classifier.logits(torch.cat(pictures)).softmax(1).sum(0)
        names.append(GARMENTS[int(votes.argmax())])
    return names


def likeness(bright: Tensor, drawn: Tensor) -> np.ndarray:
    """Return the mean correlation (n,) of a garment in a frame and the next, scaled and centred."""
    means = []
    for frames, masks in zip(bright, drawn, strict=True):
        pictures = [centred(frame, mask) for frame, mask in zip(frames, masks, strict=True)]
        correlations = torch.corrcoef(torch.cat(pictures).flatten(1))
        means.append(float(correlations.diagonal(1).mean()))
    return np.array(means)


def centred(frame: Tensor, mask: Tensor) -> Tensor:
    """Scale and centre the garment of a frame (32, 32) as in Fashion-MNIST: (1, 1, 32, 32)."""
    # The box around the garment.
    rows = mask.any(1).nonzero()[:, 0]
    columns = mask.any(0).nonzero()[:, 0]
    box = frame[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1][None, None]

    # Its longer side has 28 pixels.
    factor = 28 / max(box.shape[2:])
    height = max(1, round(factor * box.shape[2]))
    width = max(1, round(factor * box.shape[3]))
    box = F.interpolate(box, (height, width), mode="bilinear", antialias=factor < 1)

    top = (32 - height) // 2
    left = (32 - width) // 2
    return F.pad(box, (left, 32 - width - left, top, 32 - height - top)).clamp(0, 1)


def moves(drawn: Tensor) -> list[str]:
    """Return the move of MOVES that is nearest to that of every video.

    Compared are the travel of the garment's middle and its growth, between the first and the last
    two frames.

    Args:
        drawn: Pixels of the garment (n, F, 32, 32).
    """
    place = torch.linspace(-1, 1, drawn.shape[-1])
    area = drawn.sum((2, 3)).clamp(min=1)
    across = (drawn * place).sum((2, 3)) / area
    down = (drawn * place[:, None]).sum((2, 3)) / area

    changes = []
    for track in (across, down, area.log() / 2):
        changes.append(track[:, -2:].mean(1) - track[:, :2].mean(1))
    expected = torch.tensor([[x, y, np.log(growth)] for x, y, growth in MOVES.values()])
    nearest = torch.cdist(torch.stack(changes, dim=1), expected.float()).argmin(1)
    return [list(MOVES)[i] for i in nearest]


# --------------------------------------------------------------------------------------------------
# Figure 7
# --------------------------------------------------------------------------------------------------

BUDGETS = (5, 10, 20, 50)


def figure_7(count: int = 500) -> None:
    """Write FID, PSNR and the share of right garments against the steps of every token.

    The schedule is searched in four of the iterations together and used in all.
    """
    run = "large_families/figure_7"
    results = measure(
        run,
        "model=mar_fashion",
        "noise_schedule=cosine",
        PINNED,
        "stepsize=[ddim,fm,oss_ave,oss_shared]",
        *QUICK[:4],
        "num_steps=[5,10,20,50]",
        "data.search_samples=32",
        f"data.eval_samples={count}",
        "data.batch_size=100",
        "metric=[fid,class_agreement]",
    )
    teacher = json.loads((OUTPUTS / run / "metrics.json").read_text())["teacher_metrics"]
    by_key = {(result.strategy, result.num_steps): result for result in results}
    names = list(dict.fromkeys(result.strategy for result in results))

    # Table.
    right = "class_agreement"
    rows = [["teacher", "100", f"{teacher['fid']:.3f}", f"{teacher[right]:.1f}", "-"]]
    for name, k in itertools.product(names, BUDGETS):
        metrics = by_key[name, k].metrics
        cells = [f"{metrics['fid']:.3f}", f"{metrics[right]:.1f}", str(by_key[name, k].psnr)]
        rows.append([name, str(k), *cells])
    header = ["strategy", "K", "FID", "right garment, %", "PSNR, dB"]

    # Figure.
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in names:
        fids = [by_key[name, k].metrics["fid"] for k in BUDGETS]
        axis.plot(BUDGETS, fids, marker="o", label=name)
    axis.axhline(teacher["fid"], color="0.5", ls="--", label="teacher, 100 steps")
    axis.set(xlabel="steps of each token", ylabel=f"FID, {count} images")
    axis.set(xscale="log", ylim=(0, None))
    axis.set_xticks(BUDGETS, map(str, BUDGETS))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    keep(__file__, "figure_7.png", png(figure))
    keep(__file__, "figure_7.md", table(header, rows))


if __name__ == "__main__":
    main()
